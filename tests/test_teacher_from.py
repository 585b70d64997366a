"""--teacher_from: a teacher trained in one run teaches a fresh student in another, on other data."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from launching import launch

from experiments import classification
from l2t_jax.data import at
from l2t_jax.runs import setting
from l2t_jax.runs.records import load_arrays, save_arrays
from l2t_jax.tasks import load
from l2t_jax.teachers.attention import init_attention

SMALL = ("--rounds=3", "--unroll_length=2", "--width=8", "--seeds=2", "--preset=released")
SMALL += ("--memory=save",)  # auto would trace each mode to choose one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert launch(classification, *SMALL, "--method=ala", f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture
def five_classes(monkeypatch):
    """The digits 0 to 4: another data set, of another number of classes."""
    digits = load("digits")

    info = dataclasses.replace(digits.info, num_classes=5)
    half = digits.take(digits.train["labels"] < 5, test=at(digits.test, digits.test["labels"] < 5), info=info)
    monkeypatch.setattr(setting, "load", lambda *_, **__: half)


def test_policy_of_ten_classes_teaches_five(trained, five_classes, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--method=ala", f"--teacher_from={trained}", f"--workdir={workdir}")
    assert launch(classification, *arguments) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert list(summary["methods"]) == ["ala_transfer"]  # nothing was trained here
    path = trained / "teachers" / "ala_seed_1.npz"
    assert summary["config"]["taught_by"]["ala, seed 1"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert launch(classification, *arguments, "--resume") == 0


def test_each_seed_leaves_its_trained_teacher(trained):
    one, two = (load_arrays(trained / "teachers" / f"ala_seed_{seed}.npz") for seed in (0, 1))
    assert set(one) == set(two) and any(np.any(one[name] != two[name]) for name in one)
    assert not list((trained / "teachers").glob("*transfer*"))


def test_what_does_not_fit_is_told(trained, five_classes, tmp_path, capsys):
    def said(*arguments):
        assert launch(classification, *SMALL, f"--workdir={tmp_path / 'run'}", *arguments) == 2
        return capsys.readouterr().err

    assert "has no l2t_dln_seed_0.npz in teachers/ (there: ala_seed_0, ala_seed_1)" in said(
        "--method=l2t_dln", f"--teacher_from={trained}"
    )
    of_ten = tmp_path / "ten" / "teachers" / "l2t_dlf_seed_0.npz"
    of_ten.parent.mkdir(parents=True)
    save_arrays(of_ten, init_attention(jax.random.key(0), num_classes=10))
    assert "values is [10, 10, 10], expected [10, 5, 5]" in said(
        "--method=l2t_dlf", f"--teacher_from={tmp_path / 'ten'}"
    )
    assert "has no ala_seed_4.npz" in said("--method=ala", "--seeds=4,", f"--teacher_from={trained}")
    assert "name one of them in --method" in said("--method=cross_entropy", f"--teacher_from={trained}")
    broken = tmp_path / "broken" / "teachers" / "ala_seed_0.npz"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK")
    assert "is damaged" in said("--method=ala", f"--teacher_from={tmp_path / 'broken'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("small_lstm")
def test_a_teacher_of_several_lives_is_judged_by_a_student_of_one(tmp_path):
    """Every student, also the frozen teacher's, has the rounds of the run; the teacher has learned in all lives."""
    small = (*SMALL, "--rounds=2", "--seeds=1", "--method=l2t_dln", "--set=lives=3")
    workdir = tmp_path / "run"
    assert launch(classification, *small, f"--workdir={workdir}") == 0
    methods = json.loads((workdir / "summary.json").read_text())["methods"]
    assert {name: row["rounds"] for name, row in methods.items()} == {"l2t_dln": 6, "l2t_dln_transfer": 2}
    assert {row["student_steps"] for row in methods.values()} == {4}
    moments = {path.stem for path in (workdir / "snapshots" / "l2t_dln" / "seed_0").iterdir()}
    assert moments == {f"round_{done:06d}" for done in (0, 4, 5, 6)}  # and start, half and end of the last life
    assert (workdir / "plots" / "surfaces_l2t_dln_seed_0.png").exists()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    online = {row["round"]: row for row in rows if row["method"] == "l2t_dln"}
    assert len(online) == 6
    errors = [online[r]["validation_error_stage_one"] for r in (0, 2, 4)]  # of students that have seen one stage only
    assert min(errors) > 2.0 and len(set(errors)) == 3
