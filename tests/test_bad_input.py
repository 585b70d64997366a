"""Whatever is wrong at a public door is said in one clear line of ours, that names the fault.

Tables: each row is one fault, everything beside it as it should be, and what the line must say. None may hang, train,
be taken without a word, or end in a traceback from the depths. Hypothesis adds what we did not think of.
"""

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from absl import flags
from absl.testing import flagsaver
from altered import altered
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import _flags, classification
from l2t_jax.analysis import growth, sweep_matrices
from l2t_jax.convolution import conv2d
from l2t_jax.data import DataError, hold_out, noise
from l2t_jax.data.order import Plan
from l2t_jax.losses import LOSSES, LossError, build_loss, check_classes, check_loss, fixed, make_loss
from l2t_jax.losses.checking import as_read
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.weight_net import weight_net
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import method_names
from l2t_jax.methods.common import merge_rounds
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.methods.parts import SCHEDULES
from l2t_jax.presets import PRESETS
from l2t_jax.runs import parallel
from l2t_jax.runs.parallel import SHARDS
from l2t_jax.students import STUDENTS, from_linen
from l2t_jax.students.resnet import SHORTCUTS
from l2t_jax.tasks import evaluate, load
from l2t_jax.tasks.classification import CLASSIFICATION, DATASETS, check
from l2t_jax.teachers import TEACHERS, build_teacher, from_optax, sum_of
from l2t_jax.teachers.coordinate_lstm import coordinate_lstm
from l2t_jax.types import Batch, Loss, RoundBatches

many = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


def said_in_a_line(error, line, longest=400):
    """That an error is one line, and the right one."""
    said = str(error.value)
    assert "\n" not in said and 25 < len(said) < longest, said
    assert re.search(line, said), said


# Command lines

NO_COUNT = ("0", "-7", "1.5", "x", "nan", "0x", "None", "1,2")
NO_RATE = ("0", "-0.1", "nan", "inf", "x", "0,1", "1e400", "None")
NO_NAME = ("x", "", " ", "mlp2")
NO_SWITCH = ("maybe", "2", "")
BAD_VALUES = {  # flag -> values each of which is wrong by itself, and flags that it needs to be read at all
    "task": NO_NAME,
    "dataset": NO_NAME,
    "labels": ("none.npy", "noisy", f"{__file__}", " "),
    "class_weight": ("x", "1,2", "0,0,0,0,0,0,0,0,0,0", "-1,1,1,1,1,1,1,1,1,1", "nan,1,1,1,1,1,1,1,1,1", " "),
    "imbalance": ("0", "0.5", "-1", "nan", "inf", "x"),
    "train_on_clean": (*NO_SWITCH, "true"),  # true: of the digits none is known to be clean
    "clean": ("none.npy", f"{__file__}", " ", "0", "100"),  # 100: the true labels of the digits are not known
    "data_dir": ("/nowhere --dataset=mnist",),
    "download": NO_SWITCH,
    "held_out": ("-0.1", "0.95", "x", "nan"),
    "student": NO_NAME,
    "width": (*NO_COUNT, "8 --student=linear"),
    "depth": (*(f"{depth} --student=wide_resnet" for depth in (*NO_COUNT, "12")), "8 --student=densenet", "10"),
    "growth": (*(f"{count} --student=densenet" for count in NO_COUNT), "12", "12 --student=wide_resnet"),
    "cells": (*(f"{count} --student=nasnet" for count in NO_COUNT), "2"),
    "drop_path": (*(f"{rate} --student=nasnet" for rate in ("1", "-0.1", "x", "nan")), "0.5"),
    "dropout": ("1", "-0.1", "x", "nan", "0.5 --student=lenet"),
    "shortcut": (*(f"{name} --student=resnet8" for name in NO_NAME), "b", "b --student=lenet", "b --student=linear"),
    "head_grid": (*NO_COUNT, "2", "2 --student=lenet", "2 --student=linear", "3 --student=resnet8"),
    "weights": (
        *(f"none.pth --student={name}" for name in ("mlp", "pspnet_small", "pspnet50")),
        *("x", "x --student=pspnet50", "/nowhere --student=yolov3_tiny", f"{__file__} --student=yolov3"),
    ),
    "backbone": ("x --student=pspnet_small", "efficientnet_lite0", "efficientnet_lite0 --student=pspnet50"),
    "stem": ("x --student=pspnet50", "deep", "deep --student=pspnet_small"),
    "norm": ("x --student=pspnet_small", "batch", *(f"{name} --student=yolov3_tiny" for name in NO_NAME)),
    "train": (
        *("x --student=pspnet_small", "head --student=pspnet50", "head --student=pspnet_small", "head", "all"),
        *(f"{name} --student=yolov3" for name in (*NO_NAME, "head")),
    ),
    "fresh_head": (*NO_SWITCH, "true"),
    # Of other tasks; what of them is wrong there: test_segmentation.py, test_detection.py,
    # test_translation.py.
    "crop": NO_COUNT[1:],
    "window": (*NO_COUNT[2:], "33"),
    "scales": ("1",),
    "mirror": (*NO_SWITCH, "true"),
    "size": (*NO_COUNT[2:], "416"),
    "vocabulary": (*NO_COUNT[2:], "100"),
    "max_length": (*NO_COUNT[2:], "32"),
    "reverse": (*NO_SWITCH, "true"),
    "beam": (*NO_COUNT[2:], "5"),
    "length_penalty": ("x", "1"),
    "buckets": (*NO_COUNT[2:], "4"),
    "hidden": (*(f"{count} --student=transformer_small" for count in NO_COUNT), "8"),
    "heads": (*(f"{count} --student=transformer_small" for count in NO_COUNT), "8"),
    "layers": (*(f"{count} --student=transformer_small" for count in NO_COUNT), "8"),
    # test_metric_learning.py
    "embedding": (*NO_COUNT[2:], "8"),
    "per_class": (*NO_COUNT[2:], "2"),
    "side": (*NO_COUNT[2:], "28"),
    "loss": ("triplet_mixture",),
    "validate": ("classes",),
    "method": ("x", "", ",", "mae,mae", "mae,x"),
    "preset": NO_NAME,
    "set": (
        "squash",
        "squash=",
        "odd=1",
        "x=1",
        "unroll_length=1.5",
        "odd=true,odd=true",
        "base=lstm",
        "preprocess=x",
        *("x.q=1", "mae.q=1", "focal.gamma=x", "focal.=1", "ml3.units=2", "focal.gamma=1"),
    ),
    "teacher": NO_NAME,
    "unroll_length": NO_COUNT,
    "epochs": NO_COUNT,
    "rounds": (*NO_COUNT[1:], "2 --epochs=2"),  # none at all scores students as they begin
    "batch_size": (*NO_COUNT, "720", "1000000000000"),
    "validation_batch_size": (*NO_COUNT, "719", "1000000000000"),
    "validation_ratio": ("0", "1", "-1", "2", "nan", "inf", "x"),
    "student_lr": NO_RATE,
    "student_optimizer": NO_NAME,
    "student_schedule": NO_NAME,
    "dln_lr": NO_RATE,
    "teacher_lr": NO_RATE,
    "teacher_schedule": NO_NAME,
    "memory": NO_NAME,
    "compute_dtype": (*NO_NAME, "float16", "float64"),
    "stream": NO_SWITCH,
    "skip_broken": NO_SWITCH,
    "micro_batches": (*NO_COUNT, "2", "50", "5 --validation_batch_size=101"),
    "seeds": ("0", "-1", "x", "1.5", "1,1", "0,-1", ",", "1,x", "99999999999,", " "),
    "seeds_at_once": NO_COUNT,
    "devices": (*NO_COUNT, "2", "1000000"),  # one simulated device was there before
    "shard": NO_NAME,
    "coordinator": ("here", "here:1", ""),
    "num_processes": (*NO_COUNT, "2"),
    "process_id": ("-3", "0", "x"),
    "teacher_from": ("/nowhere", "shipped:x", "x --method=mae"),
    "workdir": ("/dev/null/x", "/proc/x", "\0"),
    "resume": (*NO_SWITCH, "true"),
    "checkpoint_seconds": ("-1", "x", "nan"),
    "tensorboard": NO_SWITCH,
    **dict.fromkeys(("on_row", "on_summary"), ("", "x", "json", "x:y", ":y", "json:", "json:none", "json:__name__")),
}
ROWS = [(name, value) for name, values in BAD_VALUES.items() for value in values]
NAMES = ("dataset", "student", "method", "preset", "teacher", "memory", "shard", "student_schedule")
KNOWN = {  # what a text may be by chance, since hypothesis also draws constants of our own code
    *(*DATASETS, *STUDENTS, *method_names(), *PRESETS, *TEACHERS, *MEMORY_MODES),
    *(*SHARDS, *SHORTCUTS, *SCHEDULES),
}
text = st.text(max_size=12).filter(lambda x: x.strip() and "," not in x)
GOOD_FLAGS = st.sampled_from(
    ["--student=mlp", "--preset=paper", "--preset=released", "--seeds=2", "--teacher=adam", "--memory=save"]
)
STRANGE = st.one_of(
    st.sampled_from(ROWS).map(lambda row: f"--{row[0]}={row[1]}".split(" --")),
    st.tuples(st.sampled_from(NAMES), text.filter(lambda x: x.strip() not in KNOWN)).map(
        lambda x: [f"--{x[0]}={x[1]}"]
    ),
    st.from_regex(r"--[a-z]{3,9}(_[a-z]{2,6})?x", fullmatch=True).map(lambda x: [x]),
    text.filter(lambda x: not x.startswith("-")).map(lambda x: [x]),
)


def test_every_flag_is_in_the_table():
    assert {flag.name for flag in flags.FLAGS.flags_by_module_dict()["experiments._flags"]} == BAD_VALUES.keys()


@pytest.mark.parametrize("name", BAD_VALUES)
def test_each_flag_by_itself(name, linear_student):
    for value in BAD_VALUES[name]:
        said, code = launch(
            *(part if part.startswith("--") else f"--{part}" for part in f"{name}={value}".split(" --"))
        )
        assert code == 2, (value, said)
        assert said.startswith("error: ") and said.count("\n") == 1 and re.search(rf"\b{name}\b", said), (value, said)


@pytest.mark.versions
@settings(many, max_examples=80)
@given(st.lists(GOOD_FLAGS, max_size=2, unique=True), STRANGE)
def test_flags_together(good, bad):
    said, code = launch(*good, bad[0], *(f"--{part}" for part in bad[1:]))
    assert code == 2, (good, bad, said)
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 15, (good, bad, said)


def test_a_student_of_ones_own_has_the_knobs_of_its_builder(linear_student):
    for flag, has in (("--width=8", "none"), ("--head_grid=2", "none"), ("--shortcut=b", "none")):
        assert f"{flag} is no knob of --student=linear, which has {has}" in launch("--student=linear", flag)[0]
    assert "which has --width, --dropout: leave it out" in launch("--student=mlp", "--shortcut=b")[0]


@pytest.fixture
def linear_student(monkeypatch):
    """The README's own student."""

    class Linear(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(self.num_classes, name="output")(x.reshape(x.shape[0], -1))

    monkeypatch.setitem(STUDENTS, "linear", lambda *, num_classes: from_linen(Linear(num_classes)))


def launch(*arguments):
    """What the command says on standard error, and its exit code. Nothing must come so far as to train."""
    errors = io.StringIO()
    with (
        flagsaver.flagsaver(),
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(errors),
        redirect_stdout(io.StringIO()),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr("l2t_jax.runs.running.train", None)
        digits = lambda name, *rest, **task: DIGITS if name == "digits" else load(name, *rest, **task)  # noqa: E731
        patch.setattr("l2t_jax.runs.setting.load", digits)
        _flags.parse_arguments(["classification.py", *arguments])
        classification.main([])
    return errors.getvalue(), stop.value.code


# Data sets

DIGITS = load("digits")
INPUTS, LABELS = ("train_inputs", "test_inputs"), ("train_labels", "test_labels")


def array_of(name):
    part, leaf = name.split("_")
    return getattr(DIGITS, part)[leaf]


def changed(name, change):
    return {name: change(array_of(name))}


def put(value, name="train_labels"):
    labels = array_of(name).copy()
    labels[3] = value
    return {name: labels}


def part(name):
    """As the errors call it."""
    return name.split("_")[0]


BAD_DATA = {
    **{
        f"{name} {dtype}": (changed(name, lambda x, d=dtype: x.astype(d)), rf"{part(name)}: inputs are {dtype} .*uint8")
        for name in INPUTS
        for dtype in ("float16", "float64", "int64", "bool", "complex64", "object")
    },
    **{
        f"{name} {dtype}": (changed(name, lambda x, d=dtype: x.astype(d)), rf"{part(name)}: labels are {dtype} .*int32")
        for name in LABELS
        for dtype in ("float32", "float64", "int64", "bool", "complex64", "object")
    },
    **{
        f"{name} with an axis {axis} more": (
            changed(name, lambda x, a=axis: np.expand_dims(x, a)),
            (rf"{part(name)}: labels are .*expected" if "labels" in name else "train inputs are .* and test inputs")
            if axis
            else "expected one of each",
        )
        for name in (*INPUTS, *LABELS)
        for axis in (0, 1)
    },
    **{f"{name} too few": (changed(name, lambda x: x[:-1]), "inputs have .* labels") for name in (*INPUTS, *LABELS)},
    **{f"{name} none": (changed(name, lambda x: x[:0]), "there is no example") for name in (*INPUTS, *LABELS)},
    **{f"{name} a list": (changed(name, lambda x: x.tolist()), "are a list") for name in (*INPUTS, *LABELS)},
    **{f"{name} missing": ({name: None}, "are a NoneType") for name in (*INPUTS, *LABELS)},
    **{
        f"label {value} in {name}": (put(value, name), rf"{part(name)}: label {value} at index 3 is outside 0\.\.9")
        for name in LABELS
        for value in (10, 2**31 - 1, -1, -(2**31))
    },
    "NaN pixels": (
        changed("train_inputs", lambda x: np.where(np.arange(64).reshape(8, 8, 1) == 5, np.nan, x)),
        "inputs are float64",
    ),
    **{
        f"class {gone} gone": (
            {f"train_{what}": DIGITS.train[what][DIGITS.train["labels"] != gone] for what in ("inputs", "labels")},
            rf"classes \[{gone}\] have no training example",
        )
        for gone in (0, 9)
    },
    "one class alone": (changed("train_labels", np.zeros_like), r"classes \[1, .*9\] have no training example"),
    **{f"{x!r} classes": ({"num_classes": x}, "num_classes=.* expected 2") for x in (-1, 0, 1, 2.5, None, "10", True)},
    "9 classes": ({"num_classes": 9}, r"label 9 .* outside 0\.\.8"),
    "11 classes": ({"num_classes": 11}, r"classes \[10\] have no training example"),
    **{
        f"mean {x}": ({"mean": x}, "mean .* must have one finite value")
        for x in ((), (1.0, 2.0), (float("nan"),), (float("inf"),), 3.0)
    },
    **{
        f"std {x}": ({"std": x}, "every std must be positive")
        for x in ((), (0.0,), (-1.0,), (1.0, 2.0), (float("nan"),), (float("inf"),))
    },
    "test images of another size": (changed("test_inputs", lambda x: x[:, 1:]), "train inputs are .* and test inputs"),
    "a meta set below 0": ({"meta": -1}, "meta=-1, expected"),
    "a meta set of all": ({"meta": DIGITS.examples}, "meta=1437, expected"),
    "true labels too few": ({"train_true": DIGITS.train["labels"][1:]}, "have 1436 true"),
    "a true label of no class": ({"train_true": put(10)["train_labels"]}, "true label 10 at index 3"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data(name):
    change, line = BAD_DATA[name]
    with pytest.raises(DataError) as error:
        check(altered(DIGITS, **change))
    said_in_a_line(error, line)
    assert "digits" in str(error.value)


@pytest.fixture(scope="module", autouse=True)
def the_data_are_good_unless_changed():
    check(DIGITS)


# Losses of one's own


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_a_loss_of_ours_passes(name):
    check_loss(LOSSES[name](), 10)


def fine(outputs, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=-1)[:, 0]


def loop(outputs, targets):  # has no reverse mode
    return jax.lax.while_loop(lambda x: x[0] < 3, lambda x: (x[0] + 1, x[1] * 1.5), (0, fine(outputs, targets)))[1]


def once(outputs, targets):  # its derivative has none
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (f(x), None), lambda _, g: (jax.pure_callback(lambda g: g, g, g),))
    return f(fine(outputs, targets))


def once_inside(outputs, targets):  # the same, where what comes back depends on the outputs
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (f(x), None), lambda _, g: (jax.pure_callback(lambda g: g, g, g),))
    return fine(f(outputs), targets) ** 2


ONE_EACH = "expected one float for each, not reduced"
NOT_TWICE = "cannot be differentiated twice"
BAD_APPLIES = {  # name -> apply, what the line says, number of classes
    "reduced": (lambda o, t: fine(o, t).mean(), rf"apply gives float32\[\] for \d+ examples; {ONE_EACH}"),
    "kept axis": (lambda o, t: fine(o, t)[:, None], rf"gives float32\[\d+, 1\] .*{ONE_EACH}"),
    "per class": (lambda o, t: jax.nn.log_softmax(o), rf"gives float32\[\d+, 5\] .*{ONE_EACH}"),
    "too few": (lambda o, t: fine(o, t)[1:], rf"gives float32\[11\] for 12 .*{ONE_EACH}"),
    "integers": (lambda o, t: (o.argmax(-1) != t).astype(int), rf"gives int32\[12\] .*{ONE_EACH}"),
    "booleans": (lambda o, t: o.argmax(-1) != t, rf"gives bool\[12\] .*{ONE_EACH}"),
    "complex": (lambda o, t: fine(o, t) * 1j, rf"gives complex64\[12\] .*{ONE_EACH}"),
    "NaN": (lambda o, t: fine(o, t) * jnp.nan, "values are not finite for ordinary outputs"),
    "infinite": (lambda o, t: fine(o, t) / 0, "values are not finite for ordinary outputs"),
    "NaN for certain predictions": (
        lambda o, t: -jnp.log(jnp.take_along_axis(jax.nn.softmax(o), t[:, None], -1)[:, 0]),
        "values are not finite for confident outputs",
    ),
    "NaN in the derivative": (
        lambda o, t: fine(o, t) + jnp.sqrt(o[:, 0] * 0),
        "first derivatives are not finite for ordinary outputs",
    ),
    "NaN in the derivative of certain predictions": (
        lambda o, t: jnp.sqrt(1 - jnp.exp(-fine(o, t))),
        "first derivatives are not finite for confident outputs",
    ),
    "NaN in the derivative of equal logits": (
        lambda o, t: fine(o, t) + jnp.linalg.norm(o, axis=-1),
        "first derivatives are not finite for outputs that are all equal",
    ),
    "NaN in the second derivative": (
        lambda o, t: fine(o, t) + jnp.abs(o[:, 0] * 0) ** 1.5,
        "second derivatives are not finite for ordinary outputs",
    ),
    "NaN for two classes": (lambda o, t: fine(o, t) / (o.shape[1] - 2), "values are not finite for ordinary", 2),
    "steps": (lambda o, t: (o.argmax(-1) != t).astype(o.dtype), "zero everywhere: nothing would be learned"),
    "a constant": (lambda o, t: jnp.ones_like(o[:, 0]), "zero everywhere: nothing would be learned"),
    "stopped": (lambda o, t: jax.lax.stop_gradient(fine(o, t)), "zero everywhere: nothing would be learned"),
    "no reverse mode": (loop, rf"{NOT_TWICE} .*Reverse-mode differentiation does not work"),
    "once differentiable": (once, rf"{NOT_TWICE} .*callbacks do not support JVP"),
    "once differentiable, inside": (once_inside, rf"{NOT_TWICE} .*callbacks do not support JVP"),
    "host code": (lambda o, t: np.asarray(o)[:, 0], r"apply failed \(TracerArrayConversionError"),
    "control flow": (lambda o, t: fine(o, t) if o[0, 0] > 0 else o[:, 0], r"apply failed \(TracerBoolConversionError"),
    "nothing": (lambda o, t: None, "apply gives a NoneType, expected an array of losses"),
    "a list": (lambda o, t: list(fine(o, t)), "apply gives a list, expected an array of losses"),
    "a number": (lambda o, t: 1.0, "apply gives a|apply gives float32"),
    "wrong axis": (lambda o, t: jnp.take_along_axis(o, t[None], axis=-1), rf"gives float32\[12, 12\] .*{ONE_EACH}"),
    "unknown name": (lambda o, t: jnp.no_such_function(o), "apply failed .*no attribute 'no_such_function'"),
    "one argument": (lambda o: o, r"apply failed \(TypeError: .*1 positional argument"),
    "classes as one-hot rows": (
        lambda o, t: -(t * jax.nn.log_softmax(o)).sum(-1),
        "apply failed .*[iI]ncompatible shapes",
    ),
    "the same, as many examples as classes": (
        lambda o, t: -(t * jax.nn.log_softmax(o)).sum(-1),
        "apply failed .*[iI]ncompatible shapes",
        12,
    ),
    "centred over the batch": (
        lambda o, t: fine(o - o.mean(0), t),
        "the value of an example changes with the others of its batch",
    ),
    "weighed by how many are of a class": (
        lambda o, t: fine(o, t) / (t[:, None] == t).sum(1),
        "the value of an example changes with the others of its batch",
    ),
}
BAD_INITS = {
    "NaN": (lambda key: {"w": jnp.array(jnp.nan)}, "init gives parameters that are not finite"),
    "fails": (lambda key: {}["w"], r"init failed \(KeyError: 'w'\)"),
    "no argument": (lambda: {}, r"init failed \(TypeError: .*positional argument"),
    "a name": (
        lambda key: {"w": 1.0, "squash": "tanh"},
        "init failed .*what it gives/squash is a str: expected an array",
    ),
    "a function": (lambda key: {"w": 1.0, "act": jnp.tanh}, "init failed .*what it gives/act is a .*expected an array"),
}


@pytest.mark.parametrize("name", BAD_APPLIES)
def test_bad_applies(name):
    function, line, *classes = BAD_APPLIES[name]
    loss = Loss(lambda key: {}, lambda params, *a: function(*a))
    with pytest.raises(LossError) as error:
        check_loss(loss, *(classes or [5]), "mine")
    said_in_a_line(error, f"^mine: .*{line}")


@pytest.mark.parametrize("name", BAD_INITS)
def test_bad_inits(name):
    init, line = BAD_INITS[name]
    with pytest.raises(LossError) as error:
        check_loss(Loss(init, lambda params, *a: fine(*a)), 5, "mine")
    said_in_a_line(error, f"^mine: {line}")


def test_what_is_no_loss():
    for given_loss, classes, line in (
        (cross_entropy, 5, "is a function, expected a Loss: make one by fixed"),
        (fixed(cross_entropy), 5, "is a function, expected a Loss"),
        (fixed(cross_entropy)(), 1, "num_classes=1 is not an integer of at least 2"),
        (fixed(cross_entropy)(), "5", "num_classes='5' is not an integer"),
    ):
        with pytest.raises(LossError) as error:
            check_loss(given_loss, classes)
        said_in_a_line(error, line)


def test_a_schedule_that_fails_is_found_too():
    with pytest.raises(LossError, match=r"apply failed \(KeyError: 'k'\)"):
        check_loss(make_loss(lambda p, o, t: fine(o, t), at=lambda p, progress: p["k"]), 5)


def test_what_a_loss_gives_is_checked_in_training_too():
    """Also where nobody asked `check_loss`: a reduced loss would train with other numbers, silently."""
    from l2t_jax.unroll import inner_objective

    loss = Loss(lambda key: {}, lambda params, outputs, targets: fine(outputs, targets).mean())
    variables, batch = toy.student.init(jax.random.key(0), jnp.zeros((2, 5))), toy.batch(0, 6)
    with pytest.raises(ValueError, match="one value for each, not reduced"):
        inner_objective(toy.student, toy.task, loss)(variables["params"], variables["batch_stats"], {}, batch)


# Targets, weights and masks: the door of every loss of classes

Z, Y = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3), np.array([0, 1, 2, 0, 1, 2], np.int32)
KEPT = Y != 1
BAD_TARGETS = {  # name -> outputs, targets, what the line says; all but the last rows also where values are traced
    "one-hot": (Z, np.eye(3, dtype=np.int32)[Y], r"targets are int32\[6, 3\]: .*argmax\(-1\)"),
    "one-hot floats": (Z, np.eye(3, dtype=np.float32)[Y], r"targets are float32\[6, 3\]: .*argmax\(-1\)"),
    "several labels": (Z, np.ones((6, 3), bool), "targets are bool.*several labels make a loss of your own"),
    "regression": (Z, Y.astype(np.float32), r"targets are float32\[6\]: .*astype\(int32\); for regression make a loss"),
    "bools": (Z, Y > 0, r"targets are bool\[6\]: .*expects integers \[6\]"),
    "a kept axis": (Z, Y[:, None], r"targets are int32\[6, 1\]: .*expects integers \[6\].*Reshape"),
    "too few": (Z, Y[:5], r"targets are int32\[5\]: .*expects integers \[6\]"),
    "one for all": (Z, Y[0], r"targets are int32\[\]: .*expects integers \[6\]"),
    "integers as outputs": (
        Z.astype(np.int32),
        Y,
        r"outputs are int32\[6, 3\]: a loss of classes reads floats \[B, C\]",
    ),
    "one output": (Z[:, :1], 0 * Y, r"outputs are float32\[6, 1\]: .*jnp.stack\(\[0 \* z, z\], -1\)"),
}
BAD_CLASSES = {
    "-1": (Z, np.where(KEPT, Y, -1), "targets have the class -1: expected 0 to 2.*by mask"),
    "C": (Z, np.where(KEPT, Y, 3), "targets have the class 3: expected 0 to 2"),
    "100": (Z, np.where(KEPT, Y, 100), "targets have the class 100: expected 0 to 2"),
}


def refuses(loss, outputs, targets, line, traced):
    params = loss.init(jax.random.key(0))
    read = as_read(loss, jnp.asarray(outputs))
    with pytest.raises(ValueError) as error:
        if traced:
            jax.eval_shape(loss.apply, params, read, targets)
        else:
            loss.apply(params, read, targets)
    said_in_a_line(error, line, longest=500)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_targets_of_every_loss(name):
    loss = build_loss(name, 3)
    for outputs, targets, line in BAD_TARGETS.values():
        refuses(loss, outputs, targets, line, traced=True)
    for outputs, targets, line in (*BAD_TARGETS.values(), *BAD_CLASSES.values()):
        refuses(loss, outputs, targets, line, traced=False)


def test_targets_of_the_task():
    task = CLASSIFICATION.build(DIGITS)
    for outputs, targets, line in (*BAD_TARGETS.values(), *BAD_CLASSES.values()):
        for of_task in (task.error, task.metrics):
            with pytest.raises(ValueError) as error:
                of_task(outputs, targets)
            said_in_a_line(error, line, longest=500)


@pytest.mark.parametrize("targets", [np.float32([0.5] * 7), np.eye(3, dtype=np.float32)[[0] * 7]])
def test_methods_say_that_they_are_of_classes(targets):
    """Each names class indices where it is given other targets, though the task be of these."""
    task = toy.task._replace(
        error=lambda outputs, targets: jnp.sum(outputs**2, -1), metrics=lambda outputs, targets: {}
    )
    loss, sgd = LOSSES["dln"](), optax.sgd(0.1)
    for method in (
        l2t_dln(toy.student, task, loss, toy.teacher, sgd, sgd, second_stage="restart"),
        meta_weight_net(toy.student, task, sgd),
    ):
        x = np.ones((1, 1, 7, 5), np.float32)
        batches = RoundBatches(Batch(x, targets[None, None]), Batch(x[0], targets[None]), jnp.array(True))
        with pytest.raises(ValueError) as error:
            jax.eval_shape(method.round, jax.eval_shape(method.init, jax.random.key(0), jnp.zeros((2, 5))), batches)
        said_in_a_line(error, r"targets are float32\[.*a loss of classes expects integers \[7\]", longest=500)


@pytest.mark.parametrize("name", toy.OF_CLASSES)
def test_weights_and_masks_of_every_loss(name):
    loss = build_loss(name, 3)
    params, read = loss.init(jax.random.key(0)), as_read(loss, jnp.asarray(Z))
    for options, line in (
        ({"mask": KEPT[:, None]}, r"mask is bool\[6, 1\] for outputs float32\[6, 3\]: expected an array \[6\]"),
        ({"mask": KEPT[:5]}, r"mask is bool\[5\]"),
        ({"mask": [True] * 6}, "mask is a list"),
        ({"mask": np.float32(KEPT)}, r"mask is float32\[6\]: expected bool"),
        ({"sample_weight": np.ones((6, 1))}, r"sample_weight is float64\[6, 1\]"),
        ({"sample_weight": 2.0}, "sample_weight is a float"),
    ):
        with pytest.raises(ValueError) as error:
            jax.eval_shape(lambda options=options: loss.apply(params, read, Y, **options))
        said_in_a_line(error, line)


def test_what_a_mask_hides_needs_no_class():
    """Where padding has the label -1, as is usual; and a Python loop over a Python int is no array."""
    loss, padded = build_loss("cross_entropy", 3), np.where(KEPT, Y, -1)
    found = loss.apply({}, jnp.asarray(Z), padded, mask=KEPT)
    np.testing.assert_array_equal(found, np.where(KEPT, cross_entropy(jnp.asarray(Z), Y), 0))
    with pytest.raises(ValueError, match="targets are a list: expected an array"):
        check_classes(Z, Y.tolist())


def test_losses_of_other_targets_remain_possible():
    """Of several numbers an example, masked and weighed."""
    loss = make_loss(lambda params, outputs, targets: jnp.mean((outputs - targets) ** 2, axis=(1, 2)))
    outputs, targets = np.ones((6, 2, 3), np.float32), np.zeros((6, 2, 3), np.float32)
    targets[1] = np.nan
    found = loss.apply({}, outputs, targets, sample_weight=np.arange(6.0), mask=np.arange(6) != 1)
    np.testing.assert_allclose(found, [0, 0, 2, 3, 4, 5])


# Other doors of the library

PHI = {"a": jnp.ones((3, 2)), "b": jnp.zeros(4)}
MATRIX = noise.transition("flip2", 0.4, 5, 0)
ROUND = {
    "rounds": 1,
    "examples": 100,
    "validation_ratio": 0.5,
    "stages": 1,
    "unroll_length": 2,
    "batch_size": 5,
    "validation_batch_size": 5,
}
X, W = np.ones((2, 5, 5, 3), np.float32), np.ones((3, 3, 3, 4), np.float32)


def taught(teacher, hypergradient=None, hidden=None, params=None):
    params = teacher.init(jax.random.key(0)) if params is None else params
    return teacher.update(
        params, teacher.hidden(PHI) if hidden is None else hidden, PHI if hypergradient is None else hypergradient, PHI
    )


def evaluated(data=None, variables=None, batch_size=10, **task):
    variables = toy.student.init(jax.random.key(0), jnp.zeros((2, 5))) if variables is None else variables
    given_data = toy.batch(0, 20) if data is None else data
    return evaluate(toy.student, variables, given_data, toy.task._replace(**task), batch_size)


def drawn(seed=0, round=0, **change):
    return Plan(**(ROUND | change)).indices(seed, round)


LSTM, ADAM = coordinate_lstm(), from_optax(optax.adam(1e-3))
DOORS = {
    # teachers
    "a hypergradient of other loss parameters": (
        lambda: taught(LSTM, {"a": jnp.ones((3, 2)), "b": jnp.zeros(5)}),
        r"the hypergradient/b is \[5\] and the loss parameters/b is \[4\]: expected the same shape",
    ),
    "of another structure": (lambda: taught(LSTM, {"a": jnp.ones(10)}), "the hypergradient has another structure"),
    "of the same size and another structure": (lambda: taught(LSTM, {"c": jnp.ones(10)}), "another structure"),
    "of integers": (lambda: taught(LSTM, jax.tree.map(lambda x: x.astype(int), PHI)), "hypergradient/a is int32: only"),
    "for optax, of another structure": (lambda: taught(ADAM, {"a": jnp.ones((3, 2))}), "another structure"),
    "for optax, of another shape": (lambda: taught(ADAM, PHI | {"a": jnp.ones(2)}), r"hypergradient/a is \[2\]"),
    "for optax without a state": (lambda: taught(from_optax(optax.sgd(0.1)), {"a": PHI["a"]}), "another structure"),
    "a memory of other loss parameters": (
        lambda: taught(LSTM, hidden=LSTM.hidden(jnp.zeros(3))),
        r"the teacher's hidden state/.* is \[3, 64\] .* is \[10, 64\]",
    ),
    "the memory of an odd teacher": (
        lambda: taught(LSTM, hidden=coordinate_lstm(odd=True).hidden(PHI)),
        "the teacher's hidden state has another structure",
    ),
    "a memory without a window": (
        lambda: taught(coordinate_lstm(window=3), hidden=LSTM.hidden(PHI)),
        "the teacher's hidden state has another structure",
    ),
    "the memory of another optimizer": (
        lambda: taught(ADAM, hidden=from_optax(optax.sgd(0.1)).hidden(PHI)),
        "the teacher's hidden state has another structure",
    ),
    "parameters that preprocess nothing": (
        lambda: taught(LSTM, params=coordinate_lstm(preprocess=None).init(jax.random.key(0))),
        r"the teacher's parameters/0/input_kernel is \[1, 256\]",
    ),
    "gamma NaN": (lambda: coordinate_lstm(float("nan")), "dln_lr=nan is not a finite number"),
    "gamma a name": (lambda: coordinate_lstm("x"), "dln_lr='x' is not a finite number"),
    "a sign of 3": (lambda: coordinate_lstm(update_sign=3), "update_sign=3 is no sign: give 1 or -1"),
    "p = 0": (lambda: coordinate_lstm(preprocess=0.0), "preprocess=0.0 is not a positive"),
    "half a round": (lambda: coordinate_lstm(window=1.5), "a window of 1.5 rounds is none"),
    "a builder of an optimizer": (
        lambda: from_optax(optax.adam),
        r"the teacher is a function.*optax.sgd\(0.1\) and not",
    ),
    "a teacher as an optimizer": (lambda: from_optax(ADAM), "the teacher is a Teacher: expected an optax"),
    "a teacher that wants a value": (lambda: taught(from_optax(optax.polyak_sgd())), "the teacher cannot take a step"),
    "a sum of nothing": (lambda: sum_of(), "sum_of is given none: expected one or more"),
    "a sum of optimizers": (lambda: sum_of(optax.adam(1e-3)), "sum_of is given .*from_optax makes one"),
    "a sum's memory": (lambda: taught(sum_of(ADAM, ADAM), hidden=ADAM.hidden(PHI)), "must be a tuple of 2|structure"),
    "a sum's parameters": (lambda: taught(sum_of(ADAM), params={}), "parameters of a sum of teachers must be a tuple"),
    "an unknown teacher": (lambda: build_teacher("x", 0.1), "teacher 'x' is unknown; choose one of lstm"),
    "an unknown base": (lambda: build_teacher("lstm", 0.1, base="x"), "base 'x' is unknown; choose one of none, lstm"),
    "a knob that Adam has not": (
        lambda: build_teacher("adam", 0.1, odd=True),
        "teacher 'adam' with .*'odd'.*arguments",
    ),
    "a knob that no teacher has": (lambda: build_teacher("lstm", 0.1, even=True), "teacher 'lstm' with .*'even'"),
    "gamma NaN for Adam": (lambda: build_teacher("adam", float("nan")), "dln_lr=nan is not a finite number"),
    "a teacher's optimizer not built": (
        lambda: l2t_dln(toy.student, toy.task, toy.small_loss(), toy.teacher, optax.sgd(0.1), optax.adam),
        "the teacher's optimizer is a function",
    ),
    "a student's optimizer not built": (
        lambda: l2t_dln(toy.student, toy.task, toy.small_loss(), toy.teacher, optax.sgd, optax.adam(0.1)),
        "the student's optimizer is a function",
    ),
    # losses
    "a knob that a loss has not": (lambda: build_loss("focal", 3, gama=1.0), "focal.*'gama'.*arguments of its builder"),
    "a knob that a builder has not": (lambda: build_loss("dln", 3, shape="x"), "loss 'dln' with .*'shape'"),
    "bilinear of one class": (
        lambda: build_loss("bilinear", 1),
        "bilinear num_classes=1 is not an integer of at least 2",
    ),
    "bilinear of other classes": (
        lambda: build_loss("bilinear", 4).apply(build_loss("bilinear", 4).init(jax.random.key(0)), Z, Y),
        "bilinear was built for 4 classes and is given outputs of 3",
    ),
    **{
        f"{name} {knobs}": (lambda name=name, knobs=knobs: build_loss(name, 3, **knobs).apply({}, Z, Y), line)
        for name, knobs, line in (
            ("label_smoothing", {"smoothing": 1.1}, "smoothing=1.1 is not a share"),
            ("generalized_cross_entropy", {"q": 0}, "q=0 is out of range: give 0 < q <= 1"),
            ("generalized_cross_entropy", {"q": float("nan")}, "q=nan is out of range"),
            ("focal", {"gamma": -1.0}, "gamma=-1.0 is out of range"),
            ("sce", {"log_zero": 4.0}, "log_zero=4.0 are out of range"),
            ("sce", {"alpha": -1.0}, "alpha=-1.0, .* out of range"),
            ("poly", {"epsilon": -2.0}, "epsilon=-2.0 is out of range"),
        )
    },
    "units of no number": (lambda: weight_net(units=1.5), "units=1.5 is not a positive integer"),
    # evaluation
    "data of two lengths": (
        lambda: evaluated(toy.batch(0, 20)._replace(targets=toy.batch(0, 7).targets)),
        r"the leaves of data are \[20, 5\], \[7\]: expected \[n, ...\], with one n",
    ),
    "no data": (lambda: evaluated(()), "the leaves of data are none"),
    "data of no examples": (lambda: evaluated(jax.tree.map(lambda x: x[:0], toy.batch(0, 20))), r"\[0, 5\], \[0\]"),
    "a number as data": (lambda: evaluated(toy.batch(0, 20)._replace(targets=jnp.int32(1))), r"\[20, 5\], \[\]"),
    "lists as data": (lambda: evaluated(Batch([[1.0]], [1])), r"the leaves of data are \[\], \[\]"),
    "words as data": (lambda: evaluated({"inputs": np.array(["a"])}), "data/inputs is a NumPy array of <U1"),
    **{
        f"a batch size of {size!r}": (lambda size=size: evaluated(batch_size=size), "batch_size=.* is not a positive")
        for size in (0, -1, 2.5, "10", True)
    },
    "variables without statistics": (lambda: evaluated(variables={"params": {}}), "variables have no 'batch_stats'"),
    "a reduced error": (
        lambda: evaluated(error=lambda z, y: jnp.mean(z)),
        r"the task's error is \[\] for 10 examples: expected one value",
    ),
    "a reduced metric": (
        lambda: evaluated(metrics=lambda z, y: {"p": jnp.mean(z)}),
        r"the task's p is \[\] for 10 examples: expected one value",
    ),
    # noise
    "a label -1": (lambda: noise.corrupt(np.array([-1, 0]), MATRIX, 0), r"label -1 is outside 0\.\.4"),
    "a label C": (lambda: noise.corrupt(np.array([0, 5]), MATRIX, 0), r"label 5 is outside 0\.\.4"),
    "labels of floats": (
        lambda: noise.corrupt(np.array([0.0]), MATRIX, 0),
        r"labels are float64\[1\]: expected integers",
    ),
    "labels of bools": (lambda: noise.corrupt(np.array([True]), MATRIX, 0), r"labels are bool\[1\]: expected integers"),
    "labels in rows": (lambda: noise.corrupt(np.eye(5, dtype=int), MATRIX, 0), r"labels are int64\[5, 5\]: expected"),
    "a matrix that is not square": (
        lambda: noise.corrupt(Y, MATRIX[:, :3], 0),
        r"the matrix \[5, 3\] is none of noise",
    ),
    "rows of 2": (lambda: noise.corrupt(Y, 2 * MATRIX, 0), "rows >= 0 that sum to 1"),
    "rows below 0": (lambda: noise.corrupt(Y, 2 * np.eye(5) - MATRIX, 0), "rows >= 0 that sum to 1"),
    "rows of NaN": (lambda: noise.corrupt(Y, np.nan * MATRIX, 0), "rows >= 0 that sum to 1"),
    "a seed of -1": (lambda: noise.corrupt(Y, MATRIX, -1), "seed=-1 is not an integer of at least 0"),
    "a seed of -1 for a matrix": (lambda: noise.transition("flip", 0.4, 5, -1), "seed=-1 is not an integer"),
    "5.5 classes": (lambda: noise.transition("flip", 0.4, 5.5, 0), "num_classes=5.5 is not a positive integer"),
    "a ratio that is a name": (lambda: noise.transition("flip", "x", 5, 0), "the noise ratio x must lie between"),
    "a ratio of NaN": (lambda: noise.transition("flip", float("nan"), 5, 0), "the noise ratio nan must lie between"),
    "half a meta set": (lambda: noise.with_noise(DIGITS, "flip", 0.4, 100.5, 0), "a meta set of 100.5 must have"),
    "a seed of -1 for a test set": (lambda: hold_out(DIGITS, 0.2, -1), "seed=-1 is not an integer"),
    # the order of data
    "round -1": (lambda: drawn(round=-1), "round=-1 is not an integer of at least 0"),
    "round 1.5": (lambda: drawn(round=1.5), "round=1.5 is not an integer"),
    "seed -1": (lambda: drawn(seed=-1), "seed=-1 is not an integer of at least 0"),
    "seed 1.5": (lambda: drawn(seed=1.5), "seed=1.5 is not an integer"),
    **{
        f"{name} {value!r}": (lambda name=name, value=value: drawn(**{name: value}), f"{name}=.* is not a positive")
        for name in (
            "examples",
            "stages",
            "unroll_length",
            "batch_size",
            "validation_batch_size",
            "epoch_stages",
        )
        for value in (0, -1, 2.5, "x")
    },
    **{
        f"rounds {value!r}": (lambda value=value: drawn(rounds=value), "rounds=.* is not an integer of at least 0")
        for value in (-1, 2.5, "x")  # 0 scores students as they begin
    },
    **{
        f"validation_ratio {value!r}": (lambda value=value: drawn(validation_ratio=value), "must lie between 0 and 1")
        for value in (0, 1, float("nan"), "x", None)
    },
    "epoch -1": (lambda: Plan(**ROUND).split(0, -1), "epoch=-1 is not an integer"),
    "no rounds as one": (
        lambda: merge_rounds(l2rw(toy.student, toy.task, optax.sgd(0.1)), 0),
        "merge_rounds rounds=0 is not",
    ),
    # convolutions
    "pixels": (lambda: conv2d(X.astype(np.uint8), W), "x is uint8: expected an array of floats"),
    "a list of pixels": (lambda: conv2d([[1.0]], W), "x is a list: expected an array of floats"),
    "no images": (lambda: conv2d(X[:0], W), "one of which is empty"),
    "no kernel": (lambda: conv2d(X, W[:0]), "one of which is empty"),
    **{
        f"strides {value!r}": (lambda value=value: conv2d(X, W, strides=value), "strides=.*one or two integers")
        for value in (0, 1.5, None, (1, 1, 1), (1.0, 2.0), "x")
    },
    **{
        f"padding {value!r}": (lambda value=value: conv2d(X, W, padding=value), "padding .* is unknown; choose SAME")
        for value in ("same", 1.0, None, (1, 1), ((1, 1),), ((1,), (1, 1)))
    },
    "groups of a float": (lambda: conv2d(X, W, groups=1.0), "do not fit 1.0 groups"),
    # analysis
    "a list as H": (lambda: growth([[1.0, 0], [0, 1]], 1, 0.1), "H is a list: expected an array"),
    "H that cannot be divided": (lambda: sweep_matrices(jnp.eye(3), 3, 0.1), "cannot be divided after 3"),
    # layouts
    **{
        f"a layout of {bad}": (lambda bad=bad: parallel.Layout(**bad), next(iter(bad)))
        for bad in ({"seeds": 0}, {"devices": -1}, {"shard": "x"})
    },
}


@pytest.mark.parametrize("name", DOORS)
def test_doors(name):
    call, line = DOORS[name]
    with pytest.raises(ValueError) as error:
        call()
    said_in_a_line(error, line, longest=800)  # trees of a teacher's memory are told whole
