"""Students that see a batch in parts: what stays exact, what BatchNorm sees, what is saved, what is refused."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from absl.testing import flagsaver
from flax import linen as nn
from launching import launch
from test_students import images, variables_of

from benchmarks import memory
from experiments import classification
from l2t_jax import train
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.runs.config import UsageError
from l2t_jax.runs.records import Metrics, read_record
from l2t_jax.students import STUDENTS
from l2t_jax.students.layers import dropout, from_linen, relu
from l2t_jax.students.micro_batches import in_micro_batches
from l2t_jax.types import Backbone, Batch, Loss, Student
from l2t_jax.unroll import init_state, inner_objective, outer_objective

SGD = optax.sgd(0.1, momentum=0.9)
B, V, N, SIZE = 6, 4, 3, 2
COLUMNS = (("save", False), ("mixed", False), ("nested", False), ("mixed", True), ("nested", True))


@pytest.fixture(autouse=True)
def flags_as_they_were():
    saved = flagsaver.save_flag_values(memory.FLAGS)
    yield
    flagsaver.restore_flag_values(saved, memory.FLAGS)


def example(key, *lead, weight=False):
    inputs = images(key, (*lead, 16, 16, 1), float)
    targets = jnp.asarray(np.random.default_rng(key).integers(0, toy.CLASSES, lead), jnp.int32)
    return Batch(
        inputs, targets, weight=jnp.asarray(np.random.default_rng(9).integers(0, 3, lead) / 2) if weight else ()
    )


def derivative(student, loss, memory="mixed", weight=False):
    """Hypergradient, error, losses and state after N steps."""
    inner, outer = inner_objective(student, toy.task, loss), outer_objective(student, toy.task)
    batches, validation = example(0, N, B, weight=weight), example(1, V, weight=weight)
    phi, state = loss.init(jax.random.key(3)), init_state(student.init(jax.random.key(4), batches.inputs[0]), SGD)
    program = jax.jit(hypergradient(inner, outer, SGD, memory=memory))
    return program(phi, state, batches, validation)


def difference(a, b):
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_without_batch_norm_nothing_changes(memory, x64):
    """LeNet puts a dark border round these images: as it has no bias at first, its rectifiers are at their kink."""
    lenet = STUDENTS["lenet"](num_classes=toy.CLASSES)
    whole = derivative(lenet, LOSSES["dln"](), "save")
    parts = derivative(in_micro_batches(lenet, SIZE), LOSSES["dln"](), memory)
    assert difference(parts.gradient, whole.gradient) < 1e-12 > difference(parts.state, whole.state)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-12)


def test_losses_that_weigh_or_compare_examples_or_read_the_head(x64):
    def compare(params, outputs, targets):
        return params["scale"] * toy.task.error(outputs - outputs.mean(0), targets)

    mlp = STUDENTS["mlp"](num_classes=toy.CLASSES, width=8)
    comparing = Loss(lambda key: {"scale": jnp.array(1.0)}, compare)
    for loss, weight in ((LOSSES["dln"](), True), (comparing, False), (LOSSES["large_margin_softmax"](), False)):
        whole, parts = (derivative(s, loss, weight=weight) for s in (mlp, in_micro_batches(mlp, SIZE)))
        assert difference(parts.state, whole.state) < 1e-12 > abs(parts.error - whole.error)


def by_hand(student, size):
    """The same as a Python loop, with nothing computed again."""

    def apply(variables, inputs, train):
        found = [student.apply(variables, inputs[i : i + size], train) for i in range(0, len(inputs), size)]
        outputs, stats = zip(*found, strict=True)
        return jnp.concatenate(outputs), jax.tree.map(lambda *x: sum(x) / len(x), *stats)

    return student._replace(apply=apply)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return toy.Network(name="net")(x[:, ::4, ::4, 0].reshape(len(x), -1), train)


@pytest.mark.parametrize("memory", ["save", "mixed", "nested"])
def test_batch_norm_sees_a_part_at_a_time(memory, x64, caplog):
    norm = from_linen(Norm())
    with caplog.at_level(logging.WARNING, "l2t_jax"):
        parts = derivative(in_micro_batches(norm, SIZE), LOSSES["dln"](), memory)
    assert set(caplog.messages) == {f"BatchNorm sees 2 examples at a time in place of {n}" for n in (B, V)}
    assert len(caplog.messages) == 2  # however often it is traced
    hand = derivative(by_hand(norm, SIZE), LOSSES["dln"](), "save")
    assert difference(parts.gradient, hand.gradient) < 1e-10 > difference(parts.state, hand.state)
    whole = derivative(norm, LOSSES["dln"](), "save")
    assert difference(whole.gradient, hand.gradient) > 1e-3


def test_what_is_no_float_among_the_statistics_is_kept():
    def apply(variables, inputs, train):
        return inputs, {"steps": variables["batch_stats"]["steps"] + 1, "mean": inputs.mean()}

    inputs = jnp.arange(6.0)[:, None]
    variables = {"params": {}, "batch_stats": {"steps": jnp.int32(4), "mean": jnp.float32(0)}}
    student = in_micro_batches(Student(toy.student.init, apply), 2)
    outputs, stats = student.apply(variables, inputs, True)
    np.testing.assert_array_equal(outputs, inputs)
    assert stats["steps"] == 5 and stats["steps"].dtype == jnp.int32 and stats["mean"] == 2.5


def test_evaluation_fills_the_last_part_up():
    resnet, x = STUDENTS["resnet8"](num_classes=3, width=2), images(shape=(7, 8, 8, 1))
    variables = variables_of(resnet.init, x)
    outputs, stats = in_micro_batches(resnet, 3).apply(variables, x, False)
    np.testing.assert_allclose(outputs, resnet.apply(variables, x, False)[0], atol=1e-5)
    assert outputs.shape == (7, 3) and stats is variables["batch_stats"]


class Drawing(nn.Module):
    @nn.compact
    def __call__(self, x, train, keys=None):
        return nn.Dense(3, name="output")(dropout(nn.Dense(8)(x), 0.5, keys, train))


def test_each_example_draws_by_its_own_key():
    student, x, keys = from_linen(Drawing(), draws=True), images(shape=(6, 5)), jax.random.split(jax.random.key(1), 6)
    variables = variables_of(student.init, x)
    whole, _ = student.apply(variables, x, True, keys)
    np.testing.assert_allclose(in_micro_batches(student, 2).apply(variables, x, True, keys)[0], whole, rtol=1e-5)
    nothing, _ = student.apply(variables, x, True)
    np.testing.assert_allclose(in_micro_batches(student, 2).apply(variables, x, True)[0], nothing, rtol=1e-5)
    assert np.abs(whole - nothing).max() > 0.1


def test_a_backbone_is_computed_in_parts_too():
    sizes = []

    def features(variables, x):
        sizes.append(len(x))
        return {"half": x / variables, "sum": x.sum(1)}

    student = in_micro_batches(toy.student._replace(backbone=Backbone(2.0, features)), 3)
    found = student.backbone.apply(2.0, jnp.arange(14.0).reshape(7, 2))
    np.testing.assert_array_equal(found["half"], jnp.arange(14.0).reshape(7, 2) / 2)
    assert found["sum"].shape == (7,) and set(sizes) == {3}


def test_a_step_needs_the_memory_of_a_part():
    """Twelve layers of 2000 examples in twenty parts: what a gradient keeps of them is a twentieth."""

    def apply(variables, inputs, train):
        for _ in range(12):
            inputs = jnp.tanh(inputs @ variables["params"])
        return inputs[:, : toy.CLASSES], {}

    def temporary(student):
        inner, outer = inner_objective(student, toy.task, toy.small_loss()), outer_objective(student, toy.task)
        batch = Batch(jnp.zeros((2, 2000, 32)), jnp.zeros((2, 2000), jnp.int32))
        state = init_state({"params": jnp.eye(32)}, SGD)
        arguments = toy.small_loss().init(jax.random.key(0)), state, batch, jax.tree.map(lambda x: x[0], batch)
        program = jax.jit(hypergradient(inner, outer, SGD, memory="mixed")).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    deep = Student(toy.student.init, apply)
    assert temporary(in_micro_batches(deep, 100)) < 0.4 * temporary(deep)


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="size=0 is not a positive integer"):
        in_micro_batches(toy.student, 0)
    variables = toy.student.init(jax.random.key(0), jnp.zeros((2, 5)))
    with pytest.raises(
        ValueError, match="a batch of 7 examples cannot be divided into micro-batches of 3: choose a mul"
    ):
        in_micro_batches(toy.student, 3).apply(variables, jnp.zeros((7, 5)), True)
    with pytest.raises(UsageError, match=r"micro_batches=1\.5 is not a positive integer"):
        train("mae", "digits", micro_batches=1.5, rounds=1)


SHORT = ("--unroll_length=3", "--rounds=3", "--seeds=1", "--preset=residual", "--memory=mixed")


def rows(workdir, *flags):
    assert launch(classification, *SHORT, *flags, f"--workdir={workdir}") == 0
    return Metrics.read(workdir / "metrics.jsonl"), read_record(workdir / "summary.json")


@pytest.mark.usefixtures("small_lstm")
def test_a_run_in_parts(tmp_path, capsys):
    flags = ("--method=l2t_dln,meta_weight_net", "--width=8")
    whole, _ = rows(tmp_path / "whole", *flags)
    parts, record = rows(tmp_path / "parts", *flags, "--micro_batches=5")
    assert record["config"]["micro_batches"] == 5 and "BatchNorm" not in capsys.readouterr().err
    for name in ("train_loss", "validation_error"):
        np.testing.assert_allclose([row[name] for row in parts], [row[name] for row in whole], rtol=1e-4)
    rows(tmp_path / "norm", "--student=resnet8", "--width=2", "--method=mae", "--micro_batches=5")
    assert "BatchNorm sees 5 examples at a time in place of 25" in capsys.readouterr().err


def test_a_rectifier_has_no_slope_at_zero_however_often_it_is_differentiated():
    def looped(x):
        return jax.lax.scan(lambda c, y: (c + jnp.tanh(relu(x * y) + x) ** 2, None), 0.0, jnp.ones(3))[0]

    expected = jax.grad(jax.grad(lambda x: 3 * jnp.tanh(x) ** 2))(0.0)
    assert jax.grad(jax.grad(looped))(0.0) == expected == jax.jvp(jax.grad(looped), (0.0,), (1.0,))[1]
    np.testing.assert_array_equal(relu(jnp.array([-1.0, 0.0, 2.0, jnp.nan])), [0, 0, 2, jnp.nan])
    assert relu(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.results
def test_the_page_has_the_rows_of_the_record():
    root = Path(__file__).parents[1]
    record = read_record(root / "benchmarks" / "results" / "memory_cpu.json")
    page = (root / "docs" / "hypergradient.md").read_text()
    told = []
    for student in dict.fromkeys(row["student"] for row in record["rows"]):
        of = [row for row in record["rows"] if row["student"] == student]
        if len(of) < 8:
            continue  # its programs were not all compiled
        for length in (1, 25):
            sizes = {(row["mode"], row["size"] < row["batch"]): row for row in of if row["length"] == length}
            first = sizes["save", False]
            cells = [f"{sizes[column]['mib']:.0f}" if column in sizes else "" for column in COLUMNS]
            parameters = f"{first['parameters']:,}".replace(",", " ")
            name = f"{first['describe']}, {first['image']}"
            told.append(f"| {' | '.join([name, parameters, str(length), *cells])} |")
            assert sizes["mixed", True]["mib"] < 0.25 * sizes["save", False]["mib"]
    assert len(told) >= 6 and all(line in page for line in told), [line for line in told if line not in page]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--students=w9", "'w9' is not one of wide_resnet,"),
        ("--lengths=0", "at least 1"),
        ("--micro_batches=2", "does not divide --batch=25 and --validation alike"),
        ("--validation=101", "does not divide --batch=25 and --validation alike"),
    ],
)
def test_a_benchmark_that_cannot_be_is_told(flag, said, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(["memory", flag])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_benchmark_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """A small student in place of the large ones: its rows are kept, and not compiled again."""
    monkeypatch.setattr(memory, "LARGE", {"small": memory.Large("resnet8", {"width": 2}, 8, 3, "ResNet-8")})
    monkeypatch.setattr(memory, "PROGRAMS", [("save", False), ("mixed", True)])
    given = ["memory", "--students=small", "--lengths=2", "--batch=4", "--validation=4", "--micro_batches=2"]
    memory.main([*given, f"--out={tmp_path / 'r.json'}"])
    rows = read_record(tmp_path / "r.json")["rows"]
    assert [(row["mode"], row["size"]) for row in rows] == [("save", 4), ("mixed", 2)]
    assert rows[0]["parameters"] == rows[1]["parameters"] > 0 and all(row["mib"] > 0 for row in rows)
    monkeypatch.setattr(memory, "measure", lambda **_: pytest.fail("compiled again"))
    memory.main([*given, f"--out={tmp_path / 'r.json'}"])
    assert "ResNet-8, 8" in capsys.readouterr().out
