"""Teachers that come with the package: how one becomes a part of it, and that all of them load and teach."""

import json
import shutil

import jax
import numpy as np
import pytest
from launching import SMALL, launch

from experiments import classification, ship
from l2t_jax import teachers
from l2t_jax.runs.records import load_arrays
from l2t_jax.teachers import trained

HELD = (*SMALL, "--method=l2t_dln", "--held_out=0.2", "--seeds=2", "--set=base=sgd,odd=false,dln_lr=0.01")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_lstm):
    workdir = tmp_path_factory.mktemp("shipped") / "run"
    assert launch(classification, *HELD, f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture
def assets(run, tmp_path, monkeypatch):
    """A folder of one teacher, `mine`, in place of the package's."""
    folder = tmp_path / "assets"
    said = ship.ship(str(run), "mine", folder)
    monkeypatch.setattr(trained, "ASSETS", folder)
    return folder, said


def test_the_best_in_transfer_on_held_out_examples_is_taken(run, assets):
    record = json.loads((run / "summary.json").read_text())
    scores = record["methods"]["l2t_dln_transfer"]["score"]["per_seed"]
    card = teachers.card("mine")
    assert scores[card["seed"]] == max(scores) and f"{100 * max(scores):.2f} %" in assets[1]
    kept = load_arrays(run / "teachers" / f"l2t_dln_seed_{card['seed']}.npz")
    for (_, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(teachers.load("mine").init(jax.random.key(9))), kept.values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert card["teacher"]["base"] == "sgd" and card["trained_on"]["dataset"] == "digits"
    assert card["command"] == record["command"] and card["dln"]["squash"] == "softmax"


def test_it_teaches_as_the_run_it_is_from(run, assets, tmp_path):
    """--teacher_from=shipped:NAME is bit-equal to --teacher_from=RUN, for the seed whose teacher is shipped."""
    seed, rows = teachers.card("mine")["seed"], []
    for name, source in (("one", "shipped:mine"), ("two", str(run))):
        workdir = tmp_path / name
        arguments = (*HELD, f"--seeds={seed},", f"--teacher_from={source}", f"--workdir={workdir}")
        assert launch(classification, *arguments) == 0
        rows.append((workdir / "metrics.jsonl").read_text())
    assert rows[0] == rows[1]


def test_what_cannot_be_used_is_told(run, assets, tmp_path, capsys):
    folder, _ = assets

    def said(*arguments, source="shipped:mine"):
        workdir = f"--workdir={tmp_path / 'run'}"
        assert launch(classification, *HELD, f"--teacher_from={source}", workdir, *arguments) == 2
        return capsys.readouterr().err

    assert "There is no teacher 'yours'; choose one of mine" in said(source="shipped:yours")
    assert "add --set=dln_lr=0.01,base=sgd" in said("--set=odd=false,dln_lr=0.1")
    assert "units=64-64-64" in said("--set=units=8,base=sgd,odd=false,dln_lr=0.01")
    assert "leave ala out" in said("--method=ala")
    assert "leave --teacher out" in said("--teacher=adam")
    (folder / "mine.npz").write_bytes(b"PK")
    assert "damaged" in said()
    assert not (tmp_path / "run").exists()


def test_only_what_was_chosen_without_the_test_set_is_shipped(run, tmp_path):
    def refused(message, workdir=run, name="mine"):
        with pytest.raises(ship.UsageError, match=message):
            ship.ship(str(workdir), name, tmp_path / "none")

    refused("both needed", name="no name")
    refused("no finished run", workdir=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(record | {"config": record["config"] | {"held_out": 0.0}}))
    refused("tested on the test set", workdir=copy)
    (copy / "summary.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "teachers")
    refused("optax teacher has nothing", workdir=copy)
    assert not (tmp_path / "none").exists()
