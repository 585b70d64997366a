"""`python -m experiments.classification` as a user meets it: files, resuming, failures, bad input."""

import dataclasses
import json
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from altered import altered
from launching import execute, launch

from experiments import _flags, classification, figures
from l2t_jax.presets import PRESETS
from l2t_jax.runs import setting
from l2t_jax.runs.checkpoints import Checkpoints
from l2t_jax.runs.records import load_arrays
from l2t_jax.tasks import TASKS, load
from l2t_jax.tasks.classification import DATASETS

pytestmark = pytest.mark.usefixtures("small_lstm")
ROOT = Path(__file__).parents[1]
SMALL = ("--rounds=3", "--unroll_length=2", "--width=8", "--seeds=2", "--checkpoint_seconds=0")


def numbers(workdir):
    """What must be bit-identical between runs: everything but times, places and commands."""
    summary = json.loads((workdir / "summary.json").read_text())
    for name in ("written", "environment", "command", "resumed"):
        summary.pop(name, None)
    for method in summary["methods"].values():
        del method["wall_time_s"]
    return summary


def last_checkpoints(workdir):
    """The newest checkpoint of each run: its step and the digest its record states."""
    found = {}
    for run in sorted((workdir / "checkpoints").glob("*/*")):
        step = max(int(p.name) for p in run.iterdir() if p.name.isdigit())
        record = json.loads(next((run / str(step) / "record").glob("*")).read_text())
        found[str(run.relative_to(workdir))] = (step, record["sha256"])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert launch(classification, *SMALL, f"--workdir={workdir}", "--tensorboard") == 0
    return workdir


@pytest.mark.versions
def test_files_of_a_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["methods"]) == ["l2t_dln", "l2t_dln_transfer", "cross_entropy"]
    for method in summary["methods"].values():
        accuracy = method["score"]
        assert len(accuracy["per_seed"]) == 2 and all(0 <= a <= 1 for a in accuracy["per_seed"])
        np.testing.assert_allclose(accuracy["mean"], np.mean(accuracy["per_seed"]))
        np.testing.assert_allclose(accuracy["std"], np.std(accuracy["per_seed"], ddof=1))
        assert (method["student_steps"], method["rounds"], method["failed"]) == (6, 3, [])
        assert method["wall_time_s"] > 0
    assert {"config", "environment", "command"} <= set(summary)  # a record that stands for itself
    assert summary["student_parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert (summary["dataset"], summary["preset"], summary["unroll_length"]) == ("digits", "stable", 2)

    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["settings"]["dln_lr"] == PRESETS["stable"].dln_lr
    assert config["config"]["dataset_sha256"] == load("digits").sha256
    assert {"versions", "git", "hardware"} <= set(config["environment"])

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"], r["round"]) for r in rows] == [
        (m, s, r) for m in summary["methods"] for s in (0, 1) for r in range(3)
    ]
    taught = [r for r in rows if r["method"] == "l2t_dln"]
    assert all(r["hypergradient_norm"] > 0 for r in taught)
    assert all((r["dln_update_norm"] > 0) == (r["round"] > 0) for r in taught)  # the LSTM is silent at first
    names = {p.name for p in (finished / "plots").iterdir()}
    assert {"validation_error.png", "validation_accuracy.png", "norms.png", "surfaces_l2t_dln_seed_0.png"} <= names
    assert list((finished / "tensorboard").rglob("events*"))


def test_methods_share_students_and_batches(finished):
    """At round 0 the residual DLN is cross entropy itself, so both see the same errors on the same data."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    start = {(r["method"], r["seed"]): r for r in rows if r["round"] == 0}
    for seed in (0, 1):
        ours, plain = start[("l2t_dln", seed)], start[("cross_entropy", seed)]
        np.testing.assert_allclose(ours["validation_error_stage_one"], plain["validation_error"], rtol=1e-5)
        assert start[("l2t_dln_transfer", seed)]["dln_update_norm"] > 0 == ours["dln_update_norm"]  # it has learned


def test_transfer_is_taught_by_the_frozen_teacher(finished):
    """The teacher of the transfer run is, from its first round to its last, the one that online training ended with."""
    with flagsaver.flagsaver():
        _flags.parse_arguments(["classification.py", *SMALL, f"--workdir={finished}"])
        config, options = _flags.resolve("classification")
    dataset = load("digits")
    built, entries = setting.build_setting(config, options, dataset)
    taught = {}
    for entry in entries[:2]:
        fresh = entry.method.init(jax.random.key(0), built.inputs)
        checkpoints = Checkpoints(finished / "checkpoints" / entry.name / "seed_1")
        taught[entry.name] = checkpoints.restore(fresh).state
    online, transfer = taught["l2t_dln"], taught["l2t_dln_transfer"]
    chex.assert_trees_all_equal(transfer.teacher, online.teacher)
    assert jax.tree.leaves(online.optimizer_state)[0] == 3  # Adam's count: the online teacher did learn, once a round
    assert jax.tree.leaves(transfer.optimizer_state)[0] == 0


def test_snapshots_are_the_dln(finished):
    arrays = load_arrays(finished / "snapshots" / "l2t_dln" / "seed_0" / "round_000003.npz")
    assert arrays["0/kernel"].shape == (4, 40) and arrays["4/kernel"].shape == (40, 1)
    start = load_arrays(finished / "snapshots" / "l2t_dln" / "seed_0" / "round_000000.npz")
    assert np.all(start["4/kernel"] == 0) and np.any(arrays["4/kernel"] != 0)


@pytest.mark.versions
def test_finished_run_is_refused_resumed_and_not_mixed(finished, capsys):
    before = (numbers(finished), (finished / "metrics.jsonl").read_bytes())
    assert launch(classification, *SMALL, f"--workdir={finished}") == 2
    assert "pass --resume to go on with it" in capsys.readouterr().err
    assert launch(classification, *SMALL, f"--workdir={finished}", "--dln_lr=0.5", "--resume") == 2
    assert "settings.dln_lr: there 0.01, asked 0.5" in capsys.readouterr().err
    assert launch(classification, *SMALL, f"--workdir={finished}", "--resume") == 0
    assert (numbers(finished), (finished / "metrics.jsonl").read_bytes()) == before


def test_figures_are_drawn_again_from_the_files(finished, tmp_path, capsys):
    assert launch(figures, f"--runs={finished}", f"--workdir={tmp_path}") == 0
    drawn = {path.name: path.read_bytes() for path in (tmp_path / finished.name).iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (finished / "plots").iterdir()}
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)
    other = tmp_path / "other"
    other.mkdir()
    (other / "summary.json").write_text('{"rows": []}')
    for arguments, message in (
        ((), "there is nothing to draw: give --runs=DIR"),
        ((f"--runs={tmp_path}",), "name a finished run"),
        ((f"--runs={finished},{finished}",), "has two runs of one name"),
        ((f"--runs={other}",), "is something else"),
    ):
        assert launch(figures, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(("preset", "teacher"), [("paper", "lstm"), ("released", "adam")])
def test_presets_and_teachers_run(preset, teacher, tmp_path):
    """Released with the LSTM is in test_teacher_from.py."""
    arguments = ("--rounds=1", "--unroll_length=2", "--width=4", "--seeds=1", "--method=l2t_dln", "--memory=save")
    arguments += (f"--preset={preset}", f"--teacher={teacher}", f"--workdir={tmp_path}/r")
    assert launch(classification, *arguments) == 0
    steps = numbers(tmp_path / "r")["methods"]["l2t_dln"]["student_steps"]
    assert steps == (4 if preset == "paper" else 2)


def test_one_seed_that_diverges_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """Seed 1 gets a data order with an example whose pixels overflow; seeds 0 and 2 finish, and the exit code is 1."""
    from l2t_jax.runs import training

    real = training._dispatch

    def poisoned(seed, done, *rest):
        dispatch = real(seed, done, *rest)
        if seed == 1 and done >= 1:
            # An index past the end is filled with NaN by the gather below.
            return dispatch._replace(validation=np.full_like(dispatch.validation, 2**30))
        return dispatch

    monkeypatch.setattr(training, "_dispatch", poisoned)
    spec = TASKS["classification"]

    def task_with_holes(dataset):
        task = spec.build(dataset)

        def gather(data, indices, keys):
            import jax.numpy as jnp

            batch = task.gather(data, jnp.where(indices == 2**30, 0, indices), keys)
            hole = (indices == 2**30)[..., None, None, None]
            return batch._replace(inputs=jnp.where(hole, jnp.nan, batch.inputs))

        return task._replace(gather=gather)

    monkeypatch.setitem(TASKS, "classification", dataclasses.replace(spec, build=task_with_holes))
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--rounds=2", "--seeds=3", "--teacher=adam", "--memory=save")
    assert launch(classification, *arguments, f"--workdir={workdir}") == 1
    methods = numbers(workdir)["methods"]
    for name in ("l2t_dln", "cross_entropy"):
        accuracy = methods[name]["score"]["per_seed"]
        assert accuracy[1] is None and accuracy[0] is not None and accuracy[2] is not None
    assert methods["l2t_dln"]["failed"] == [
        {"seed": 1, "reason": "round 1: validation error of stage one is not finite (leaf e_val)"}
    ]
    assert "no trained teacher" in methods["l2t_dln_transfer"]["failed"][0]["reason"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    failed = [r for r in rows if r["method"] == "l2t_dln" and r["seed"] == 1]
    assert [r["round"] for r in failed] == [0, 1] and failed[1]["validation_error"] is None
    assert (workdir / "checkpoints" / "l2t_dln" / "seed_1" / "1").exists()
    assert "l2t_dln, seed 1 stopped at round 1" in capsys.readouterr().err


BAD = {
    "--dataset=mnsit": "Did you mean mnist?",
    "--datset=mnist": "Did you mean: dataset",
    "--student=resnet9": "Did you mean resnet8?",
    "--method=l2t_dln,cros_entropy": "Did you mean cross_entropy?",
    "--method=": "at least one",
    "--method=l2t_dln,l2t_dln": "each method once",
    "--preset=papr": "Did you mean paper?",
    "--teacher=lst": "Did you mean lstm?",
    "--memory=mixd": "Did you mean mixed?",
    "--unroll_length=0": "not a positive integer",
    "--rounds=-1": "not a non-negative integer",
    "--rounds=ten": "invalid literal",
    "--rounds=3 --epochs=2": "give one of them",
    "--validation_ratio=0": "between 0 and 1",
    "--validation_ratio=1": "between 0 and 1",
    "--batch_size=800": "fewer than batch_size=800",
    "--validation_batch_size=719": "fewer than the 1 x 719",
    "--student_lr=0": "must be a positive",
    "--dln_lr=nan": "must be a positive",
    "--seeds=0": "neither a count",
    "--seeds=1,1": "neither a count",
    "--seeds=x": "neither a count",
    "--resume": "add --workdir",
    "--devices=0": "not a positive integer",
    "--devices=9999": "devices",
    "--shard=sedes": "Did you mean seeds?",
    "--seeds_at_once=0": "not a positive integer",
    "--num_processes=2": "go together",
    "--coordinator=here:1 --num_processes=2 --process_id=2": "give 0 to 1",
    "--coordinator=auto": "did not find each other",
    "--set=compress=-1": "must be a positive number, or 0 for none",
    "--set=student_clip=-1": "must be a norm, or 0 for none",
    "--set=window=-1": "a number of rounds, or 0",
    "--set=lives=0": "at least 1",
    "--set=teach_every=0": "teach_every=0 must be at least 1",
    "--set=units=20-": "units of each layer but the last",
    "--shortcut=b": "is no knob of --student=mlp, which has --width",
    "--student=resnet8 --head_grid=3": "does not divide",
    "--dataset=mnist --data_dir=/nonexistent": "run once with --download",
    "--workdir=/dev/null/x": "cannot be used as a run directory",
    "dataset=mnist": "is not a flag",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys):
    assert launch(classification, *arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and BAD[arguments] in said


def test_labels_out_of_range_are_refused(monkeypatch, capsys, tmp_path):
    digits = load("digits")
    labels = digits.train["labels"].copy()
    labels[5] = 10
    broken = altered(digits, train_labels=labels)
    monkeypatch.setitem(DATASETS, "digits", lambda data_dir, download: broken)
    assert launch(classification, *SMALL, f"--workdir={tmp_path}/r") == 2
    said = capsys.readouterr().err
    assert "10" in said and "label" in said and said.count("\n") == 1


@pytest.mark.versions
def test_help_teaches_every_flag():
    said = execute([sys.executable, "-m", "experiments.classification", "--help"], cwd=ROOT).stdout
    for flag in flags.FLAGS.get_key_flags_for_module(_flags):
        assert f"--{flag.name}" in said or f"--[no]{flag.name}" in said
    said = " ".join(said.split())
    assert "stable 20, cheap 60, residual 20, paper 10" in said and "python -m experiments.classification" in said


def test_the_sheet_in_the_docstring_is_the_code():
    """The table beside the presets must not drift from them."""
    import l2t_jax.presets as presets

    rows = {}
    for line in presets.__doc__.splitlines():
        if line.startswith("|") and not line.startswith("|--"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0]] = dict(zip(("paper", "released", "residual", "stable"), cells[1:5], strict=True))
    stable, cheap = PRESETS["stable"], PRESETS["cheap"]  # which has no column
    assert cheap == dataclasses.replace(stable, units="8", unroll_length=5, teach_every=5, epochs=60)
    for name, preset in PRESETS.items():
        if name == "cheap":
            continue
        assert rows["unroll length N"][name] == str(preset.unroll_length)
        assert rows["epochs"][name] == str(preset.epochs)
        assert rows["batch, validation batch"][name] == f"{preset.batch_size}, {preset.validation_batch_size}"
        assert float(rows["teacher"][name].split()[1]) == preset.teacher_lr
        assert rows["student"][name] == f"{preset.student_optimizer.upper()} {preset.student_lr:g}"
        gamma, sign = rows["gamma, sign of its step"][name].split(", ")
        assert float(gamma) == preset.dln_lr and sign == {1: "plus", -1: "minus"}[preset.update_sign]
        assert rows["its learning rate"][name] == preset.student_schedule
        assert rows["teacher's learning rate"][name] == preset.teacher_schedule
        assert rows["clip of its gradient"][name] == (
            f"norm {preset.student_clip:g}" if preset.student_clip else "none"
        )
        assert rows["LSTM at the start"][name] == ("silent" if preset.silent else "random")
        assert rows["cleared after rounds"][name] == (str(preset.window) if preset.window else "never")
        assert rows["N steps of an update"][name] == {1: "each"}[preset.teach_every]
        assert rows["LSTM layers, then 1"][name] == preset.units.replace("-", ", ")
        assert rows["lives of the student"][name] == str(preset.lives)
        assert rows["added to the LSTM"][name].lower() == preset.base.replace("none", "-")
        assert rows["second stage"][name] == {"continue": "goes on", "restart": "starts again"}[preset.second_stage]
        assert rows["predictions"][name] == preset.squash
        assert rows["pairs compressed beyond"][name] == (f"{preset.compress:g}" if preset.compress else "never")
