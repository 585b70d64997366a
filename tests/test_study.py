"""`experiments.study`: what it measures of a DLN that begins as cross entropy, and its pictures."""

import json
import shutil

import numpy as np
import pytest
from launching import launch

from experiments import figures, study
from l2t_jax.runs import study_pictures

SMALL = ("--rounds=2", "--unroll_length=2", "--width=8", "--seeds=2", "--teacher=sgd", "--dln_lr=3.0")
SMALL += ("--memory=save",)  # auto would trace each mode to choose one


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study") / "run"
    assert launch(study, "--presets=residual", *SMALL, f"--workdir={workdir}") == 0
    return workdir


def test_a_dln_that_is_cross_entropy_measures_as_such(measured):
    """Before the first round the last layer is zero: the same steps, the same errors, a range of nothing."""
    rows = [json.loads(line) for line in (measured / "residual" / "observations.jsonl").open()]
    assert [(row["seed"], row["round"]) for row in rows] == [(seed, done) for seed in (0, 1) for done in (0, 1, 2)]
    for row in rows:
        start = row["round"] == 0
        same = {"step_ratio": 1, "step_cosine": 1, "dln_low": 0, "dln_high": 0, "gain_1": 0, "gain_4": 0, "gain_16": 0}
        for name, value in same.items():
            assert (row[name] == pytest.approx(value, abs=1e-5)) == (start or name == "step_cosine"), (name, row)
        assert row["agreement"] == pytest.approx(1)  # it descends, entry by entry
        positions = [row[f"position_{i}"] for i in (1, 2)]
        assert max(positions) > 0 and "position_3" not in row
        assert row["hypergradient"] <= sum(positions) * (1 + 1e-5)
        assert row["advice_1"] > 0  # so large a step against the hypergradient helps for its own N steps
        assert 0 <= row["update_offset"] <= 1 and 0 <= row["curvature_student"] <= 1
        # Of logits, softmax: what one logit gains the others lose, as long as the DLN adds nothing.
        assert (row["push_right"] == pytest.approx(-row["push_wrong"], abs=1e-6)) and row["push_right"] < 0
        assert row["curvature"] < 0


def test_pictures(measured):
    names = {path.name for path in measured.glob("*.png")}
    assert names == {*(f"{name}.png" for name in study_pictures.PICTURES), "position.png"}
    assert all(path.stat().st_size > 10_000 for path in measured.glob("*.png"))
    assert json.loads((measured / "residual" / "summary.json").read_text())["config"]["held_out"] == 0.2


def test_studies_are_drawn_again_together(measured, tmp_path, capsys):
    """From their files alone, a curve for each; what is no study is told."""
    other = tmp_path / "other"
    shutil.copytree(measured / "residual", other)
    folder = tmp_path / "pictures"
    assert launch(figures, f"--studies={measured / 'residual'},{other}", f"--workdir={folder}") == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in measured.glob("*.png")}
    (other / "observations.jsonl").write_text("")
    for given, message in ((str(other), "other is no run of experiments.study"), (f"{other},{other}", "one name")):
        assert launch(figures, f"--studies={given}", f"--workdir={folder}") == 2
        assert message in capsys.readouterr().err


def test_positions_are_of_the_start_the_half_and_the_end():
    rows = [
        {"method": "a", "round": r, "position_1": 10 * r + seed, "position_2": 1.0}
        for seed in (0, 1)
        for r in (0, 3, 9)
    ]
    found = study_pictures.positions(rows)
    assert list(found) == ["a, start", "a, half", "a, end"]
    np.testing.assert_array_equal(found["a, half"][0], [1, 2])
    np.testing.assert_array_equal(found["a, half"][1], [[30, 1], [31, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset=paper",), "give --presets"),
        (("--presets=papre",), "Did you mean paper?"),
        (("--method=slf",), "leave it out"),
        (("--held_out=0",), "leaves no examples that no run has seen"),
    ],
)
def test_what_cannot_be_studied_is_one_line(arguments, message, tmp_path, capsys):
    assert launch(study, *arguments, f"--workdir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
