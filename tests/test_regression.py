"""A task that is none of the papers', in this file alone: regression on scikit-learn's diabetes table.

Squared error outside, a learned loss of the residual inside. Run as a program, this file is the command `compare` with
the task among those it knows.
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launching import execute, failing_disk, launch

from experiments import classification, compare, noisy_labels
from experiments._command import start
from l2t_jax.data import Dataset
from l2t_jax.losses import LOSSES, fixed, make_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.runs.records import read_record
from l2t_jax.students import mlp
from l2t_jax.tasks import TASKS, TaskSpec
from l2t_jax.types import Batch, Metric, Read, RoundBatches, Task

ROOT = Path(__file__).parents[1]

# The task


def residual(outputs, targets):
    return Read(outputs[:, 0] - targets, targets)


def regression(dataset):
    return Task(
        error=lambda outputs, targets: residual(outputs, targets).outputs ** 2,
        metrics=lambda outputs, targets: {"absolute": jnp.abs(residual(outputs, targets).outputs)},
        gather=lambda data, indices, keys: Batch(data["x"][indices], data["y"][indices]),
        views=(("residual", residual),),
        metric=Metric("error", "", "lower"),
        outputs=1,
    )


def diabetes(data_dir, download):
    """Scikit-learn's table, standardised: 342 examples to train, 100 to test."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    x, y = (np.float32((a - a.mean(0)) / a.std(0)) for a in (x, y))
    order = np.random.default_rng(0).permutation(len(y))
    train, test = ({"x": x[i], "y": y[i]} for i in (order[100:], order[:100]))
    return Dataset("diabetes", train, test)


def robust(*, floor=1e-3):
    """scale |r|^power, smoothed at 0: how much outliers count is taught."""

    def losses_of(params, residual, targets):
        return jnp.exp(params["scale"]) * (residual**2 + floor) ** (jax.nn.sigmoid(params["power"]) + 0.25)

    return make_loss(losses_of, lambda key: {"scale": jnp.array(0.0), "power": jnp.array(0.5)}, reads="residual")


REGRESSION = TaskSpec(
    build=regression,
    datasets={"diabetes": diabetes},
    classes=False,
    loss="robust",
    baseline="squared_error",
    defaults={"dataset": "diabetes", "student": "mlp"},
    settings={"unroll_length": 3, "batch_size": 16, "validation_batch_size": 32},
)
NEW = (
    (TASKS, "regression", REGRESSION),
    (LOSSES, "robust", robust),
    (LOSSES, "squared_error", fixed(lambda residual, targets: residual**2, reads="residual")),
)

# What a run makes of it

FEW = (
    "--preset=residual",
    "--task=regression",
    "--width=8",
    "--dropout=0.2",
    "--seeds=2",
    "--rounds=12",
    "--memory=save",
    "--student_lr=0.05",
)
METHODS = ("l2t_dln", "l2rw", "squared_error")


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, name, entry in NEW:
            patch.setitem(registry, name, entry)
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of several methods."""
    workdir = tmp_path_factory.mktemp("regression") / "table"
    assert launch(compare, *FEW, "--students=mlp", f"--method={','.join(METHODS)}", f"--workdir={workdir}") == 0
    return workdir


def records(workdir):
    return {name: read_record(workdir / "records" / f"diabetes_mlp_{name}.json") for name in METHODS}


def test_a_table_says_what_was_measured(table):
    """The errors, in no per cent, the lower the better, against squared error; the task's own N and batch sizes."""
    found = records(table)
    text = (table / "table.md").read_text()
    assert "## diabetes, mlp" in text and "squared error" in text and "%" not in text.split("## ")[1]
    assert "12 rounds of N = 3, batch 16, validation batch 32" in text
    for name, record in found.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        score = record["methods"][name]["score"]
        assert f"{score['mean']:.4f}" in row
        assert record["metric"] == {"name": "error", "unit": "", "better": "lower"}
        assert record["baseline"] == "squared_error" and set(record["methods"][name]["scores"]) == {"error", "absolute"}
    assert (table / "table.png").stat().st_size > 5000
    pictures = {path.name for path in (table / "plots").glob("*.png")}
    assert {"diabetes_mlp_validation_error.png", "diabetes_mlp_validation_absolute.png"} <= pictures


def test_something_was_learned(table):
    """A student that knows nothing has an error of 1, the variance of what is predicted."""
    for name, record in records(table).items():
        assert record["methods"][name]["score"]["mean"] < 0.85
    taught = np.load(table / "cells/diabetes_mlp_l2t_dln/snapshots/l2t_dln/seed_0/round_000012.npz")
    assert abs(taught["power"] - 0.5) > 1e-3


def test_it_resumes_bit_for_bit(table, tmp_path):
    """Stopped after every dispatch by a failing disk, and gone on with, it gives what it gives in one piece."""
    arguments = (*FEW, "--students=mlp", "--method=l2t_dln", f"--workdir={tmp_path}/again", "--checkpoint_seconds=0")
    with failing_disk(lambda calls, rows: calls in (2, 5)):
        assert [launch(compare, *arguments) for _ in range(3)] == [1, 1, 0]
    again = read_record(tmp_path / "again/records/diabetes_mlp_l2t_dln.json")
    whole = records(table)["l2t_dln"]
    for name, method in again["methods"].items():
        assert method["scores"] == whole["methods"][name]["scores"]


def test_on_two_devices_the_numbers_are_the_same(table, tmp_path):
    arguments = (*FEW, "--students=mlp", "--method=l2t_dln,l2rw", f"--workdir={tmp_path}/two", "--devices=2")
    said = execute([sys.executable, __file__, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "Files:" in said.stdout
    for name in ("l2t_dln", "l2rw"):
        two = read_record(tmp_path / f"two/records/diabetes_mlp_{name}.json")
        for row, method in two["methods"].items():
            expected = records(table)[name]["methods"][row]["score"]["per_seed"]
            np.testing.assert_allclose(method["score"]["per_seed"], expected, rtol=2e-4)


def test_settings_can_be_held_out(tmp_path):
    assert (
        launch(compare, *FEW, "--students=mlp", "--method=squared_error", "--held_out=0.2", f"--workdir={tmp_path}/h")
        == 0
    )
    record = json.loads((tmp_path / "h/records/diabetes_mlp_squared_error.json").read_text())
    assert record["config"]["held_out"] == 0.2
    assert "Held-out error" in (tmp_path / "h/table.md").read_text()


# What is refused


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        (compare, ("--method=ala",), "--method=ala: it is of classes, and this task has none"),
        (compare, ("--method=meta_weight_net",), "--method=meta_weight_net: it is of classes"),
        (compare, ("--method=mae",), "--method=mae: it is of classes"),
        (compare, ("--datasets=digits",), "--datasets=digits is unknown; choose one of diabetes."),
        (
            compare,
            ("--students=lenet",),
            "--dropout=0.2 is no knob of --student=lenet, which has --width: leave it out",
        ),
        (compare, ("--table=noisy",), "wrong labels are of classes, and this data set has none"),
        (noisy_labels, (), "--task=regression"),
        (classification, (), "--task=regression"),
    ],
)
def test_what_is_of_classes_says_so_in_one_line(module, arguments, line, tmp_path, capsys):
    assert launch(module, *FEW, *arguments, f"--workdir={tmp_path}/r") == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_the_library_says_so_too():
    """L2RW weighs examples by the task's own error; what needs classes is refused when it is built."""
    dataset, student = diabetes(None, False), mlp(num_classes=1, width=8)
    task, optimizer = regression(dataset), optax.sgd(0.1)
    batch = task.gather(dataset.train, np.arange(6), None)
    data = RoundBatches(*(jax.tree.map(lambda x: x[None, None], batch), jax.tree.map(lambda x: x[None], batch)), True)
    method = l2rw(student, task, optimizer)
    state, metrics = jax.jit(method.round)(method.init(jax.random.key(0), batch.inputs), data)
    assert jnp.isfinite(metrics["validation_error"]) and method.pull(state, batch, batch).shape == (6,)
    with pytest.raises(ValueError, match="this loss reads 'rows', and the task offers residual"):
        meta_weight_net(student, task, optimizer)


if __name__ == "__main__":
    for registry, name, entry in NEW:
        registry[name] = entry
    start(compare.main)
