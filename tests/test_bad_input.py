"""Whatever is wrong at a public door is said in one clear line of ours: hypothesis thinks of what we did not.

512 malformed command lines, data sets and losses; none may hang, train, or end in a traceback from the depths.
"""

import dataclasses
import io
from contextlib import redirect_stderr, redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import _flags, classification
from l2t_jax import data
from l2t_jax.losses import LOSSES, LossError, check_loss
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.methods import method_names
from l2t_jax.methods.parts import SCHEDULES
from l2t_jax.presets import PRESETS
from l2t_jax.runs import parallel
from l2t_jax.runs.parallel import SHARDS
from l2t_jax.students import STUDENTS
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import Loss

many = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)

text = st.text(max_size=12).filter(lambda x: x.strip() and "," not in x)
no_integer = st.sampled_from(["0", "-1", "-7", "1.5", "x", "nan", "inf", "1e3", "0x", "9.5", "None", "--", "1,2"])
no_rate = st.sampled_from(["0", "-0.1", "nan", "inf", "-inf", "x", "0,1", "1e400", "None"])
SIZES = ("unroll_length", "epochs", "rounds", "batch_size", "validation_batch_size", "width", "head_grid")
COUNTS = ("devices", "seeds_at_once", "num_processes")
NAMES = ("dataset", "student", "method", "preset", "teacher", "memory", "shard", "shortcut")


def flag(name, values):
    return values.map(lambda value: f"--{name}={value}")


# Text may be a constant of our own code, so also a name that is right.
KNOWN = {
    *(*data.DATASETS, *STUDENTS, *method_names(), *PRESETS, *TEACHERS, *MEMORY_MODES),
    *(*SHARDS, *_flags.SHORTCUTS, *SCHEDULES),
}
unknown_name = text.filter(lambda x: x.strip() not in KNOWN)
BAD_FLAGS = st.one_of(
    *(flag(name, no_integer) for name in (*SIZES, *COUNTS)),
    *(flag(name, no_rate) for name in ("student_lr", "dln_lr", "teacher_lr")),
    flag("validation_ratio", st.sampled_from(["0", "1", "-1", "2", "nan", "inf", "x"])),
    *(flag(name, unknown_name) for name in NAMES),
    flag("seeds", st.sampled_from(["0", "-1", "x", "1.5", "1,1", "0,-1", ",", "1,x", "99999999999,", " "])),
    flag("held_out", st.sampled_from(["-0.1", "0.95", "x", "nan"])),
    flag("student_schedule", unknown_name),
    flag("teacher_schedule", unknown_name),
    flag("set", st.sampled_from(["squash", "squash=", "odd=1", "x=1", "unroll_length=1.5", "odd=true,odd=true"])),
    flag("set", st.sampled_from(["update_sign=2", "student_lr=0", "epochs=0", "base=lstm", "preprocess=x", "=1"])),
    flag("checkpoint_seconds", st.sampled_from(["-1", "x"])),
    flag("batch_size", st.integers(719, 10**12)),
    flag("validation_batch_size", st.integers(719, 10**12)),
    flag("devices", st.integers(2, 10**6)),  # one simulated device was there before
    flag("process_id", st.integers(-3, 3)),
    flag("coordinator", st.sampled_from(["here", "here:1", "auto", ""])),
    flag("workdir", st.sampled_from(["/dev/null/x", "/proc/x", "\0"])),
    st.from_regex(r"--[a-z]{3,9}(_[a-z]{2,6})?x", fullmatch=True),
    text.filter(lambda x: not x.startswith("-")),
)
GOOD_FLAGS = st.sampled_from(
    [
        "--student=mlp",
        "--preset=paper",
        "--preset=released",
        "--seeds=2",
        "--teacher=adam",
        "--memory=save",
        "--rounds=2",
    ]
)


@settings(many, max_examples=300)
@given(st.lists(GOOD_FLAGS, max_size=2), BAD_FLAGS)
def test_flags(good, bad):
    said, code = launch(*good, bad)
    assert code == 2, (good, bad, said)
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 15, (good, bad, said)


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
        patch.setattr(data, "load", lambda *_: DIGITS)
        _flags.parse_arguments(["classification.py", *arguments])
        classification.main([])
    return errors.getvalue(), stop.value.code


DIGITS = data.load("digits")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def wrong_labels(change):
    labels = DIGITS.train_labels.copy()
    return change(labels)


def put(value, at=3):
    def change(labels):
        labels[at] = value
        return labels

    return change


def class_gone(gone):
    keep = DIGITS.train_labels != gone
    return {"train_images": DIGITS.train_images[keep], "train_labels": DIGITS.train_labels[keep]}


MALFORMED = st.one_of(
    st.tuples(
        st.sampled_from(ARRAYS), st.sampled_from(["float32", "float64", "int64", "bool", "complex64", "object"])
    ).map(lambda x: {x[0]: getattr(DIGITS, x[0]).astype(x[1])}),
    st.tuples(st.sampled_from(ARRAYS), st.integers(0, 3)).map(
        lambda x: {x[0]: np.expand_dims(getattr(DIGITS, x[0]), min(x[1], getattr(DIGITS, x[0]).ndim))}
    ),
    st.tuples(st.sampled_from(ARRAYS), st.integers(1, 300)).map(lambda x: {x[0]: getattr(DIGITS, x[0])[: -x[1]]}),
    st.sampled_from(ARRAYS).map(lambda name: {name: getattr(DIGITS, name)[:0]}),
    st.sampled_from(ARRAYS).map(lambda name: {name: getattr(DIGITS, name).tolist()}),
    st.sampled_from(ARRAYS).map(lambda name: {name: None}),
    st.integers(10, 2**31 - 1).map(lambda x: {"train_labels": wrong_labels(put(x))}),
    st.integers(-(2**31), -1).map(lambda x: {"train_labels": wrong_labels(put(x))}),
    st.just({"train_images": np.where(np.arange(64).reshape(8, 8, 1) == 5, np.nan, DIGITS.train_images)}),  # NaN pixels
    st.integers(0, 9).map(class_gone),
    st.just({"train_labels": np.zeros_like(DIGITS.train_labels)}),  # one class alone
    st.sampled_from([-1, 0, 1, 9, 11, 2.5, None, "10"]).map(lambda x: {"num_classes": x}),
    st.sampled_from([(), (1.0, 2.0), (float("nan"),), (float("inf"),), 3.0]).map(lambda x: {"mean": x}),
    st.sampled_from([(), (0.0,), (-1.0,), (1.0, 2.0), (float("nan"),), (float("inf"),)]).map(lambda x: {"std": x}),
    st.integers(1, 7).map(lambda x: {"test_images": DIGITS.test_images[:, x:]}),
)


@settings(many, max_examples=140)
@given(MALFORMED)
def test_data(changed):
    with pytest.raises(data.DataError) as error:
        data.check(dataclasses.replace(DIGITS, **changed))
    assert "digits" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module", autouse=True)
def the_data_are_good_unless_changed():
    data.check(DIGITS)
    for build in LOSSES.values():
        check_loss(build(), 10)


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


APPLIES = st.sampled_from(
    list(
        {
            "reduced": lambda o, t: fine(o, t).mean(),
            "kept axis": lambda o, t: fine(o, t)[:, None],
            "per class": lambda o, t: jax.nn.log_softmax(o),
            "too few": lambda o, t: fine(o, t)[1:],
            "integers": lambda o, t: (o.argmax(-1) != t).astype(int),
            "booleans": lambda o, t: o.argmax(-1) != t,
            "complex": lambda o, t: fine(o, t) * 1j,
            "NaN": lambda o, t: fine(o, t) * jnp.nan,
            "infinite": lambda o, t: fine(o, t) / 0,
            "NaN in the derivative": lambda o, t: fine(o, t) + jnp.sqrt(o[:, 0] * 0),
            "NaN in the second derivative": lambda o, t: fine(o, t) + jnp.abs(o[:, 0] * 0) ** 1.5,
            "steps": lambda o, t: (o.argmax(-1) != t).astype(o.dtype),
            "a constant": lambda o, t: jnp.ones_like(o[:, 0]),
            "stopped": lambda o, t: jax.lax.stop_gradient(fine(o, t)),
            "no reverse mode": loop,
            "once differentiable": once,
            "host code": lambda o, t: np.asarray(o)[:, 0],
            "control flow": lambda o, t: fine(o, t) if o[0, 0] > 0 else o[:, 0],
            "nothing": lambda o, t: None,
            "a list": lambda o, t: list(fine(o, t)),
            "wrong axis": lambda o, t: jnp.take_along_axis(o, t[None], axis=-1),
            "unknown name": lambda o, t: jnp.no_such_function(o),
            "one argument": lambda o: o,
        }.items()
    )
)
INITS = st.sampled_from(
    list(
        {
            "fine": lambda key: {},
            "NaN": lambda key: {"w": jnp.array(jnp.nan)},
            "fails": lambda key: {}["w"],
            "no argument": lambda: {},
        }.items()
    )
)


@settings(many, max_examples=72)
@given(APPLIES, INITS, st.integers(2, 12))
def test_losses(apply, init, classes):
    loss = Loss(init[1], lambda params, *a, function=apply[1]: function(*a))
    with pytest.raises(LossError) as error:
        check_loss(loss, classes, "mine")
    assert str(error.value).startswith("mine: ") and "\n" not in str(error.value) and len(str(error.value)) > 25


def test_what_a_loss_gives_is_checked_in_training_too():
    """Also where nobody asked `check_loss`: a reduced loss would train with other numbers, silently."""
    import toy

    from l2t_jax.unroll import inner_objective

    loss = Loss(lambda key: {}, lambda params, outputs, targets: fine(outputs, targets).mean())
    variables, batch = toy.student.init(jax.random.key(0), jnp.zeros((2, 5))), toy.batch(0, 6)
    with pytest.raises(ValueError, match="one value for each, not reduced"):
        inner_objective(toy.student, toy.task, loss)(variables["params"], variables["batch_stats"], {}, batch)


def test_layouts():
    for bad in ({"seeds": 0}, {"devices": -1}, {"shard": "x"}):
        with pytest.raises(parallel.ParallelError):
            parallel.Layout(**bad)
