"""One teacher on many lives: what is drawn, windows that go on bit for bit, the file that teaches elsewhere."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launching import launch

from experiments import many_lives, noisy_labels
from l2t_jax import teachers
from l2t_jax.data.mixtures import mixtures
from l2t_jax.presets import STABLE
from l2t_jax.runs import lives
from l2t_jax.runs.lives import Kind, Trainer, draw
from l2t_jax.runs.records import load_arrays

KIND = Kind("mixtures", 3, "mlp", 4, 40)
SETTINGS = dataclasses.replace(STABLE, unroll_length=2, batch_size=5, validation_batch_size=10, units="3")
SMALL = ("--horizon=2", "--side_by_side=2", "--lstm=3", "--seed=4")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """One kind of short lives (and one of MNIST, which is not there), whose windows are saved one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lives, "ROUNDS", (3, 5))
        patch.setattr(many_lives, "KINDS", (KIND, Kind("mnist", 3, "mlp", 4, 40)))
        patch.setattr(many_lives, "EVERY", 1)
        patch.setattr(many_lives, "STABLE", SETTINGS)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """Six windows without a break: the directory."""
    workdir = tmp_path_factory.mktemp("lives") / "run"
    assert launch(many_lives, *SMALL, "--windows=6", f"--workdir={workdir}") == 0
    return workdir


def trainer():
    return Trainer(SETTINGS, optax.adam(1e-2), kinds=(KIND,), lives=2, rounds=2, seed=4, data_dir=None)


def test_mixtures_are_sets_of_classes_of_their_own_difficulty():
    inputs, labels = mixtures(300, 4, seed=1)
    assert inputs.shape == (300, 64) and inputs.dtype == np.float32 and np.abs(inputs).max() < 1
    assert set(labels) == {0, 1, 2, 3}
    again, other = mixtures(300, 4, seed=1), mixtures(300, 4, seed=2)
    assert np.array_equal(inputs, again[0]) and not np.array_equal(inputs, other[0])
    with pytest.raises(ValueError, match="give classes at least 1"):
        mixtures(10, 0, seed=1)


@pytest.mark.parametrize("kind", [Kind("digits", 5, "mlp", 8, 300), Kind("mixtures", 2, "mlp", 8, 100)])
def test_a_life_has_three_parts_that_share_no_example(kind):
    """Of its own classes; what is clean and what judges is right, and wrong labels are as many as were drawn."""
    shares = []
    for number in range(12):
        lived, rounds = draw(kind, (0, 1, number), None)
        count = int(lived.count)
        parts = [lived.inputs, lived.clean[0][:count], lived.judges[0]]
        seen = [{row.tobytes() for row in part} for part in parts]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
        assert {row.tobytes() for row in lived.clean[0]} == seen[1]  # beyond `count` they are drawn again
        assert len(lived.labels) == kind.examples and 20 <= count <= 500 and 3 <= rounds < 5
        assert set(lived.clean[1]) <= set(range(kind.classes)) and set(lived.judges[1]) == set(range(kind.classes))
        right = {row.tobytes(): label for row, label in zip(*lived.clean, strict=True)}
        assert all(right[row.tobytes()] == label for row, label in zip(*lived.clean, strict=True))
        shares.append(float(lived.rate))
    assert min(shares) >= 0.05 and max(shares) < 0.5 and len(set(shares)) == 12


def rows_of(workdir):
    """But for their seconds."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


def test_the_same_command_goes_on_bit_for_bit(run, tmp_path, monkeypatch):
    """Interrupted after two windows, in the middle of lives, and again after five."""
    step, begun = Trainer.step, []

    def interrupted(self, state):
        if int(state.windows) in (2, 5) and int(state.windows) not in begun:
            begun.append(int(state.windows))
            raise KeyboardInterrupt
        return step(self, state)

    monkeypatch.setattr(Trainer, "step", interrupted)
    arguments = (*SMALL, "--windows=6", f"--workdir={tmp_path}")
    assert [launch(many_lives, *arguments) for _ in range(3)] == [130, 130, 0]
    for name in ("state.npz", "teacher.npz"):
        chex.assert_trees_all_equal(load_arrays(tmp_path / name), load_arrays(run / name))
    assert rows_of(tmp_path) == rows_of(run)
    assert max(load_arrays(run / "state.npz")["lives/mixtures 3, mlp4/number"]) > 1  # lives ended on the way


def test_the_teacher_is_judged_by_the_examples_that_judge(run):
    """The error of a line is that of the students after the window's rounds; and the teacher moves."""
    rows = rows_of(run)
    assert [row["window"] for row in rows] == list(range(6)) and all(row["kind"] == "mixtures 3, mlp4" for row in rows)
    one = trainer()
    state = one.begin()
    after, told = one.step(state)
    taught = after.lives["mixtures 3, mlp4"].taught
    student = lives.student_of(KIND)
    for place, lived in enumerate(one.lived["mixtures 3, mlp4"]):
        variables = jax.tree.map(lambda x, place=place: x[place], taught.student).variables
        outputs, _ = student.apply(variables, jnp.asarray(lived.judges[0]), False)
        assert told["accuracy"][place] == pytest.approx(
            float(jnp.mean(outputs.argmax(-1) == lived.judges[1])), abs=1e-3
        )
    assert optax.tree.norm(optax.tree.sub(after.tau, state.tau)) > 0


def test_a_student_that_is_lost_begins_anew_and_teaches_nothing(monkeypatch):
    monkeypatch.setattr(lives, "RATES", (1e37, 2e37))
    one = trainer()
    state = one.begin()
    after, told = one.step(state)
    assert told["error"] is None and list(after.lives["mixtures 3, mlp4"].left) == [0, 0]
    chex.assert_trees_all_equal(after.tau, state.tau)
    monkeypatch.setattr(lives, "RATES", (0.1, 0.2))
    after, told = one.step(after)
    assert np.isfinite(told["error"]) and list(after.lives["mixtures 3, mlp4"].number) == [1, 1]


def test_the_file_teaches_elsewhere(run, tmp_path):
    """By its path, for all seeds; its card says which settings it was trained with."""
    path = run / "teacher.npz"
    card = teachers.card(str(path))
    assert card["teacher"]["units"] == [3] and card["trained_on"]["kinds"] == ["mixtures 3, mlp4"]
    arrays = load_arrays(path)
    assert sum(leaf.size for leaf in jax.tree.leaves(teachers.load(str(path)).init(jax.random.key(0)))) == sum(
        array.size for array in arrays.values()
    )
    flags = ("--method=l2t_dln", "--rounds=2", "--seeds=2", "--unroll_length=2", "--width=8", "--memory=save")
    arguments = (*flags, f"--teacher_from={path}", f"--workdir={tmp_path / 'run'}")
    assert launch(noisy_labels, *arguments, "--set=units=3,dln_lr=0.03") == 0
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(record["methods"]) == ["l2t_dln_transfer"]
    assert set(record["config"]["taught_by"].values()) == {card["sha256"]}


def test_what_cannot_be_used_is_told_in_a_line(run, tmp_path, capsys):
    def said(module, *arguments):
        assert launch(module, *arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    workdir = f"--workdir={tmp_path / 'none'}"
    assert "units=3- must be the units" in said(many_lives, "--lstm=3-", workdir)
    assert "--rate=0.0 must be a positive" in said(many_lives, "--rate=0", workdir)
    assert "--dln_lr=0.0 must be a positive" in said(many_lives, "--dln_lr=0", workdir)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.npz").write_bytes(b"PK")
    assert "is damaged" in said(many_lives, *SMALL, "--windows=1", f"--workdir={tmp_path / 'broken'}")
    assert "(seed, windows differ)" in said(many_lives, *SMALL, "--seed=5", "--windows=7", f"--workdir={run}")
    flags = ("--method=l2t_dln", "--rounds=1", "--seeds=1", workdir)
    assert "add --set=dln_lr=0.03,units=3" in said(noisy_labels, *flags, f"--teacher_from={run / 'teacher.npz'}")
    assert "There is no teacher" in said(noisy_labels, *flags, "--teacher_from=none.npz")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK")
    (tmp_path / "damaged.json").write_text((run / "teacher.json").read_text())
    arguments = (*flags, "--set=units=3,dln_lr=0.03", f"--teacher_from={damaged}")
    assert "are damaged" in said(noisy_labels, *arguments)
    (tmp_path / "damaged.json").write_text("{}")
    assert "is no card of a teacher" in said(noisy_labels, *arguments)
