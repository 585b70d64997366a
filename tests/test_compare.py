"""`python -m experiments.compare` and `experiments.noisy_labels` as a user meets them: records, tables, kept cells."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from launching import SMALL, launch

from experiments import _flags, compare, noisy_labels
from l2t_jax.losses import LOSSES
from l2t_jax.methods import TAUGHT, method_names
from l2t_jax.runs import tables
from l2t_jax.runs.published import PUBLISHED
from l2t_jax.runs.setting import build_setting
from l2t_jax.students import STUDENTS
from l2t_jax.tasks import TASKS, load

pytestmark = pytest.mark.usefixtures("small_lstm")
# All but controls and what is of a kind that is there already; `test_every_name_builds` has all.
LEFT_OUT = (
    *("label_smoothing", "generalized_cross_entropy", "mae", "sce", "poly", "taylor_ce", "smooth_zero_one"),
    *(
        "bilinear",
        "meta_only",
        "early_stopped",
        "slf",
        "l2rw",
        "mentornet",
        "mentornet_data_driven",
        "ml3",
        "adalfl",
        "taylor_glo",
    ),
)
METHODS = [name for name in method_names(view="rows") if name not in LEFT_OUT]


TABLE = ("--table=noisy", "--students=mlp", "--seeds=2", f"--method={','.join(METHODS)}", *SMALL)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """All methods there are, on noisy labels."""
    workdir = tmp_path_factory.mktemp("table") / "run"
    assert launch(compare, *TABLE, f"--workdir={workdir}") == 0
    return workdir


def test_every_method_gives_a_record(table):
    records = {path.stem: json.loads(path.read_text()) for path in (table / "records").iterdir()}
    assert set(records) == {f"digits_mlp_flip240_{name}" for name in METHODS}
    for name in METHODS:
        record = records[f"digits_mlp_flip240_{name}"]
        rows = [name, f"{name}_transfer"] if name in TAUGHT else [name]
        assert list(record["methods"]) == rows
        for row in record["methods"].values():
            assert row["failed"] == [] and len(row["score"]["per_seed"]) == 2
            assert row["student_steps"] == 2 * 2  # the same for every method
        assert record["config"]["wrong_labels"] == pytest.approx(0.4, abs=0.07)
        assert (record["config"]["meta"], record["config"]["noise"]["kind"]) == (100, "flip2")
        assert {"environment", "command"} <= set(record)
    learned = {
        name: record["methods"][name]["learned_parameters"] for name, record in records.items() for name in [name[19:]]
    }
    assert learned["cross_entropy"] == {"loss": 0, "teacher": 0}
    assert learned["meta_weight_net"]["loss"] == 1 * 100 + 100 + 100 * 1 + 1
    assert not (table / "cells" / "digits_mlp_flip240_l2t_dln" / "checkpoints").exists()
    for name in METHODS:  # what was learned leaves with every cell
        place = table / "cells" / f"digits_mlp_flip240_{name}"
        assert (place / "examples.csv").exists() and (place / "final" / f"{name}_seed_1.npz").exists()


@pytest.mark.versions
def test_every_name_builds():
    """Each name of --method becomes an entry, and each entry has a state."""
    names = method_names(view="rows")
    with flagsaver.flagsaver():
        _flags.parse_arguments(["test", "--student=mlp", "--width=8", f"--method={','.join(names)}"])
        config, options = _flags.resolve("test")
    _, entries = build_setting(config, options, load("digits"))
    assert [entry.name for entry in entries if entry.teacher_of is None] == names
    for entry in entries:
        state = jax.eval_shape(entry.method.init, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
        assert jax.tree.leaves(state.student.params)


def test_methods_see_the_same_students_and_batches(table):
    """Before the first step all students of a seed are one, so they agree on the training examples they are shown."""
    rows = [json.loads(line) for path in (table / "cells").glob("*/observations.jsonl") for line in path.open()]
    start = {(row["method"], row["seed"]): row["fitted"] for row in rows if row["round"] == 0}
    assert len({start[(name, 0)] for name in METHODS}) == 1
    assert start[("cross_entropy", 0)] != start[("cross_entropy", 1)]


def test_done_cells_are_kept(table, monkeypatch, capsys):
    before = (table / "table.md").read_text()
    monkeypatch.setattr("l2t_jax.runs.cells.run_entries", None)
    assert launch(compare, *TABLE, f"--workdir={table}") == 0
    assert (table / "table.md").read_text() == before
    assert launch(compare, *TABLE, f"--workdir={table}", "--rounds=3") == 2
    assert "is of 2 rounds, not 3: choose another --workdir" in capsys.readouterr().err
    assert launch(compare, *TABLE, f"--workdir={table}", "--student_lr=0.2") == 2
    assert "is of another run (settings differ)" in capsys.readouterr().err


def test_a_missing_cell_is_run_and_the_table_completed(table, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(table, copy)
    lost = copy / "records" / "digits_mlp_flip240_focal.json"
    accuracy = json.loads(lost.read_text())["methods"]["focal"]["score"]
    lost.unlink()
    shutil.rmtree(copy / "cells" / "digits_mlp_flip240_focal")
    assert launch(compare, *TABLE, f"--workdir={copy}") == 0
    assert json.loads(lost.read_text())["methods"]["focal"]["score"] == accuracy
    head = lambda path: [line.split(" | ")[:7] for line in (path / "table.md").read_text().splitlines()]  # noqa: E731
    assert head(copy) == head(table)


def test_table(table):
    text = (table / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| method")]
    assert len(rows) == len(METHODS) + len(TAUGHT) and rows[0].startswith("| cross_entropy |")
    assert "100 clean examples apart" in text and "2 seeds, 2 rounds of N = 2" in text
    assert (table / "table.png").stat().st_size > 10_000
    assert {p.name for p in (table / "plots").iterdir()} == {
        f"digits_mlp_flip240_{name}.png"
        for name in ("validation_error", "validation_accuracy", "memorised", "recovered", "fitted", "wrong_pull")
    }


def record(method, per_seed, seeds=(0, 1, 2), steps=100, noise=None, student="lenet"):
    values = [v for v in per_seed if v is not None]
    accuracy = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "per_seed": list(per_seed)}
    row = {"score": accuracy, "student_steps": steps, "learned_parameters": {"loss": 0, "teacher": 0}}
    settings = {"batch_size": 25, "validation_batch_size": 100, "student_lr": 0.1}
    return {
        "dataset": "mnist",
        "metric": {"name": "accuracy", "unit": "%", "better": "higher"},
        "baseline": "cross_entropy",
        "student": student,
        "student_parameters": 7,
        "seeds": list(seeds),
        "unroll_length": 25,
        "preset": "residual",
        "config": {"noise": noise, "rounds": 4, "settings": settings, "wrong_labels": 0.4, "meta": 1000},
        "methods": {method: row | {"wall_time_s": 9.0, "failed": [0] * (len(per_seed) - len(values))}},
    }


def rows_of(records):
    return {row.name: row for row in compare.section(records).rows}


@pytest.mark.versions
def test_differences_are_paired_by_seed():
    """Seeds vary by 10 points and the method by 1: only a paired test sees it."""
    ours, base = [0.91, 0.815, 0.705], [0.90, 0.80, 0.70]
    rows = rows_of([record("focal", ours), record("cross_entropy", base)])
    assert tables.difference(rows["focal"]) == pytest.approx(1.0)
    d = np.subtract(ours, base)
    t = d.mean() / (d.std(ddof=1) / np.sqrt(3))  # 2 degrees of freedom: p in closed form
    assert tables.p_value(rows["focal"]) == pytest.approx(1 - t / np.sqrt(t**2 + 2))
    assert tables.p_value(rows["cross_entropy"]) is None is tables.difference(rows["cross_entropy"])
    other = rows_of([record("focal", ours, seeds=(3, 4, 5)), record("cross_entropy", base)])
    assert tables.difference(other["focal"]) is None is tables.p_value(other["focal"])


@pytest.mark.parametrize(
    ("ours", "base"), [([0.9, 0.8], [0.9, 0.8]), ([0.9, None], [0.8, 0.7]), ([0.91, 0.81], [0.9, 0.8])]
)
def test_no_test_without_variation(ours, base):
    assert tables.paired(ours, base) is None


def test_groups_and_failures_are_told():
    noise = {"kind": "flip2", "ratio": 0.4}
    records = [record("cross_entropy", [0.9, 0.8, None]), record("cross_entropy", [0.5, 0.4, 0.3], noise=noise)]
    table = compare.table(records, "both")
    assert [section.title for section in table.sections] == ["mnist, lenet", "mnist, lenet, flip2 40 %"]
    text = tables.markdown(table)
    assert "| cross_entropy | 85.00 ± 7.07 (1 stopped early) |  |  | 99.02 |" in text
    assert "## mnist, lenet, flip2 40 %" in text


def test_published_numbers_name_what_can_be_run():
    known = {name for spec in TASKS.values() for name in spec.datasets}
    for group, method in PUBLISHED:
        assert group.dataset in known and group.student in STUDENTS
        assert method.removesuffix("_transfer") in method_names()
    assert set(LOSSES) - set(method_names()) == {
        "dln",
        "linear_dln",
        "weight_net",
        *("triplet_mixture", "margin_mixture", "focal_triplet", "bilinear_low_rank"),
    }  # l2t_dln's, ala's, meta_weight_net's and l2t_dlf's


def test_noisy_labels_resumes_with_its_observations(tmp_path):
    """Observations are of a state after so many rounds: an interruption neither loses nor repeats one."""
    arguments = (*SMALL, "--rounds=4", "--seeds=1", "--method=cross_entropy", "--noise=uniform", "--noise_ratio=0.6")
    assert launch(noisy_labels, *arguments, f"--workdir={tmp_path / 'whole'}") == 0
    whole = (tmp_path / "whole" / "observations.jsonl").read_bytes()
    assert [json.loads(line)["round"] for line in whole.splitlines()] == [0, 1, 2, 3, 4]

    from l2t_jax.runs import training

    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="cut"):
        save = training._save

        def saved(member, state):
            save(member, state)
            if member.done == 2:
                raise RuntimeError("cut")

        patch.setattr(training, "_save", saved)
        with flagsaver.flagsaver():
            _flags.parse_arguments(["noisy_labels.py", *arguments, f"--workdir={cut}"])
            noisy_labels.main([])
    assert launch(noisy_labels, *arguments, f"--workdir={cut}", "--resume") == 0
    assert (cut / "observations.jsonl").read_bytes() == whole


BAD = {
    "--noise_ratio=1.5": "--noise_ratio=1.5 must lie between 0 and 1.",
    "--noise=flp": "Did you mean flip?",
    "--meta=3": "must have an example of each of 10 classes",
    "--meta=1430": "leaves none for training",
    "--meta=20": "fewer than the 1 x 100 of one round",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_noise(argument, tmp_path, capsys):
    assert launch(noisy_labels, argument, f"--workdir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert BAD[argument] in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


BAD_TABLES = {
    "--table=dirty": "--table=dirty is unknown; choose one of clean, noisy. Did you mean noisy?",
    "--dataset=mnist": "--dataset is one of several here: give --datasets.",
    "--datasets=digit": "Did you mean digits?",
    "--students=mlp,mlp": "must name each once",
    "--method=l2t": "--method=l2t is unknown;",
    "--coordinator=localhost:1": "a table is filled by one process",
}


@pytest.mark.parametrize("argument", BAD_TABLES)
def test_bad_tables(argument, tmp_path, capsys):
    assert launch(compare, argument, f"--workdir={tmp_path / 'run'}") == 2
    assert BAD_TABLES[argument] in capsys.readouterr().err
