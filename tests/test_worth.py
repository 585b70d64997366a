"""What teaching is worth: rates chosen on held-out examples, equal steps and seconds; texts as a data set."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from launching import launch

from experiments import noisy_labels, tfidf, worth
from l2t_jax.presets import PRESETS
from l2t_jax.runs.cells import Cell
from l2t_jax.runs.config import Config
from l2t_jax.runs.tables import Row
from l2t_jax.types import Metric

SMALL = ("--rounds=4", "--shorter=1,2", "--unroll_length=2", "--width=8", "--memory=save", "--seeds=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Cross entropy and the clean examples alone on the digits, at two rates, of which one is absurd."""
    workdir = tmp_path_factory.mktemp("worth") / "run"
    flags = ("--method=cross_entropy,meta_only", "--rates=1e-6,0.3", *SMALL, f"--workdir={workdir}")
    assert launch(worth, *flags) == 0
    return workdir, flags


def test_rates_are_chosen_on_held_out_examples_and_judged_once(run):
    workdir, flags = run
    records = {path.stem: json.loads(path.read_text()) for path in (workdir / "records").iterdir()}
    tried = {name: record for name, record in records.items() if name.startswith("held_out")}
    final = {name: record for name, record in records.items() if name.startswith("final")}
    assert len(tried) == 3 * 2 and len(final) == 3 * 3  # cross entropy in two forms
    assert all(record["config"]["held_out"] == 0.2 and record["seeds"] == [0] for record in tried.values())
    assert all(record["config"]["held_out"] == 0 and record["seeds"] == [0, 1] for record in final.values())
    assert {record["config"]["settings"]["student_lr"] for record in final.values()} == {0.3}
    assert sorted({record["config"]["rounds"] for record in final.values()}) == [1, 2, 4]
    assert sum(record["config"]["train_on_clean"] for record in final.values()) == 3
    before = {path: path.stat().st_mtime_ns for path in (workdir / "records").iterdir()}
    assert launch(worth, *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in (workdir / "records").iterdir()} == before


def test_the_table_and_the_picture(run):
    workdir, _ = run
    text = (workdir / "table.md").read_text()
    for name in ("cross entropy", "cross entropy + clean", "meta only"):
        assert text.count(f"| {name} | ") == 2  # once for steps, once for seconds
    assert "## Equal steps: 8" in text and "100 examples are known to be clean" in text
    assert all((workdir / name).stat().st_size > 10_000 for name in ("seconds.png", "curves.png"))


def test_curves_are_of_the_longest_runs(run, tmp_path, monkeypatch):
    """Of every row; none where the files of the cells are gone."""
    workdir, _ = run
    drawn = []
    monkeypatch.setattr(worth.plots, "overview", lambda path, panels, *_, **__: drawn.append(panels))
    names = ("final_digits_mlp_flip240_cross_entropy", "final_digits_mlp_flip240_meta_only")
    cells = {name: Cell(f"{name}_4", name, None) for name in names}
    assert worth.draw_curves(workdir, cells) and not worth.draw_curves(tmp_path, cells)
    (panels,) = drawn
    assert len(panels) == 2 and all(list(found) == list(names) for found in panels.values())
    assert all(steps[-1] == 8 and values.shape[0] == 2 for found in panels.values() for steps, values in found.values())


def one(name, seconds, *means):
    metric = Metric("accuracy", "%")._asdict()
    scores = [{"mean": mean, "std": 0.0, "per_seed": [mean]} for mean in means]
    rows = [Row(name, {"methods": {name: {"score": score}}, "metric": metric}, name) for score in scores]
    return worth.Reached(name, 0.1, rows, list(seconds))


def test_within_a_budget_is_the_longest_run_that_is_through():
    every = [one("fast", (0.5, 1.0, 2.0), 0.1, 0.2, 0.3), one("slow", (3.0, 5.0, 9.0), 0.5, 0.6, 0.4)]
    assert worth.budgets_of(every) == [2.0, 4.0, 8.0, 16.0]
    of = {reached.name: reached for reached in every}
    columns = [worth._within(of, budget) for budget in (1.5, 2.0, 4.0, 8.0, 16.0)]
    said = [[column.text(reached.rows[-1]).partition(" ")[0] for column in columns] for reached in every]
    assert said == [["20.00", "30.00", "30.00", "30.00", "30.00"], ["", "", "50.00", "60.00", "40.00"]]


def test_a_frozen_teacher_has_cost_its_training():
    """And its rate is that which was best online."""
    config = Config("digits", "mlp", ("l2t_dln",), "stable", "lstm", 4, "auto", (0, 1), PRESETS["stable"])
    (way,) = (way for way in worth.ways_of(config) if way.teacher == "lstm" and not way.cheap)
    metric = Metric("accuracy", "%")._asdict()

    def record(online, frozen):
        scores = {"l2t_dln": online, "l2t_dln_transfer": frozen}
        found = {name: {"score": {"mean": s, "std": 0.0}, "wall_time_s": 20 * s} for name, s in scores.items()}
        return {"methods": found, "metric": metric, "seeds": [0, 1]}

    tried = {0.1: (0.5, 0.9), 0.3: (0.6, 0.2)}
    records = {worth.tried_cell(config, way, rate).name: record(*means) for rate, means in tried.items()}
    assert worth.best_rate(config, way, [0.1, 0.3], records) == 0.3
    records = {worth.final_cell(config, way, 0.3, n).name: record(0.1 * n, 0.2 * n) for n in (1, 2)}
    frozen, online = worth.reached(config, [way], {way.name: 0.3}, [1, 2], records)  # the better one first
    assert (online.name, frozen.name) == ("L2T-DLN, LSTM, online", "L2T-DLN, LSTM, frozen")
    np.testing.assert_allclose((online.seconds, frozen.seconds), ([1, 2], [3, 6]))


@pytest.mark.parametrize("length, every, expected", [(25, 1, (5, 5)), (2, 1, (1, 2)), (5, 4, (4, 5)), (7, 1, (1, 7))])
def test_the_cheap_row_takes_the_same_steps(length, every, expected):
    settings = dataclasses.replace(PRESETS["stable"], unroll_length=length, teach_every=every)
    config = Config("digits", "mlp", ("l2t_dln",), "stable", "lstm", 4, "auto", (0,), settings)
    (way,) = (way for way in worth.ways_of(config) if way.cheap)
    cell = worth.final_cell(config, way, 0.3, 4)
    found = cell.config.settings
    assert (found.unroll_length, found.teach_every) == expected and cell.name == "final_digits_mlp_l2t_dln_lstm_cheap_4"
    assert dataclasses.replace(found, unroll_length=length, teach_every=every, units=settings.units) == settings
    every_row_is = dataclasses.replace(config, settings=worth.cheaper(settings))
    assert [way.name for way in worth.ways_of(every_row_is)] == ["L2T-DLN, LSTM", "L2T-DLN, Adam"]


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--rates=0.1,none",), "--rates=0.1,none: give positive numbers"),
        (("--rates=0.1,0.1",), "each once"),
        (("--shorter=-1",), "--shorter=-1: give positive numbers"),
        (("--method=ala",), "--method=ala is in no row here"),
        (("--teacher=adam",), "--teacher is what the table goes over"),
        (("--student_lr=0.1",), "--student_lr is chosen for each row"),
        (("--set=student_lr=0.1",), "--student_lr is chosen for each row"),
        (("--train_on_clean",), "--train_on_clean is what rows differ in"),
        (("--shorter=9", "--rounds=4"), "--shorter=9: these are rounds of runs shorter than 4"),
        (("--held_out=0.1",), "--held_out is 0.2 where rates are chosen"),
        (("--meta=0", "--rates=0.1", *SMALL), "no examples are known to be clean"),
    ],
)
def test_what_makes_no_table(flags, told, tmp_path, capsys):
    assert launch(worth, *flags, f"--workdir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ") and told in line


# Texts


def table(path, rows, head=("label", "gt", "text")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


@pytest.fixture
def texts(tmp_path):
    """A hundred texts of two kinds, ten of them with the wrong label, and twenty to test on."""
    words = {"cat": "whiskers purr meow", "dog": "bark fetch leash"}
    kinds = ["cat", "dog"] * 50
    rows = [[kinds[(i + (i % 10 == 0)) % 2], kinds[i], f"{words[kinds[i]]} the {i}"] for i in range(100)]
    table(tmp_path / "train.csv", rows)
    table(tmp_path / "test.csv", [[kind, kind, f"{words[kind]} unseen"] for kind in kinds[:20]])
    names = {"texts": "train.csv", "test_texts": "test.csv", "out": "pets.npz"}
    return [f"--{flag}={tmp_path / name}" for flag, name in names.items()]


def test_texts_become_a_data_set(texts, tmp_path, capsys):
    assert launch(tfidf, *texts, "--true_column=gt", "--known=10", "--words=8") == 0
    out = capsys.readouterr().out
    assert "10.00 % of 100 labels are wrong" in out and "10 examples are known to be right" in out
    arrays = np.load(tmp_path / "pets.npz")
    assert arrays["x"].shape == (100, 8) and arrays["x_test"].shape == (20, 8) and arrays["x"].dtype == np.float32
    clean, wrong = arrays["clean"], arrays["y"] != arrays["true"]
    assert len(set(clean)) == 10 and sorted(arrays["true"][clean]) == ["cat"] * 5 + ["dog"] * 5
    assert not wrong[clean].any() and wrong.sum() == 10 - np.isin(np.arange(0, 100, 10), clean).sum()
    np.testing.assert_allclose(np.linalg.norm(arrays["x"], axis=1), 1, rtol=1e-6)
    # Without what is unknown in training: the same three words of either kind.
    np.testing.assert_allclose(arrays["x_test"][0], arrays["x_test"][2])
    flags = ("--method=cross_entropy", "--rounds=40", "--set=unroll_length=5,validation_batch_size=10", "--seeds=1")
    where = (f"--dataset={tmp_path / 'pets.npz'}", "--student=mlp", f"--workdir={tmp_path / 'r'}")
    assert launch(noisy_labels, *where, *flags) == 0
    record = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert record["methods"]["cross_entropy"]["score"]["mean"] == 1.0 and record["config"]["meta"] == 10


@pytest.mark.parametrize(
    "flags, told",
    [
        ((), "--texts is not given"),
        (("TEXTS", "--known=4"), "--known without --true_column"),
        (("TEXTS", "--text_column=body"), "has no column 'body', but label, gt, text"),
        (("TEXTS", "--out=pets.csv"), "give a name that ends in .npz"),
        (("TEXTS", "--true_column=gt", "--known=100"), "a meta set of 100 takes 50 of the 50 examples of class 0"),
        (("TEXTS", "--texts=nothing.csv"), "nothing.csv cannot be read"),
        (("TEXTS", "--out=nowhere/pets.npz"), "nowhere/pets.npz"),
    ],
)
def test_texts_that_are_refused(flags, told, texts, capsys):
    given = [*texts, *flags[1:]] if flags[:1] == ("TEXTS",) else flags
    assert launch(tfidf, *given) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and told in line
