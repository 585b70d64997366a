"""A run read back: the rows as a frame, the summary, and what is said where there is no run."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import run_page

import l2t_jax
from l2t_jax import read_run
from l2t_jax.runs.records import Metrics, WorkdirError, write_json

pd = pytest.importorskip("pandas")
PAGE = Path(__file__).parents[1] / "docs" / "reading_results.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    short = 'rounds=3, unroll_length=2, memory="save", student_knobs={"width": 8},'
    return run_page(PAGE, tmp_path_factory.mktemp("page"), short, long="rounds=40,")


@pytest.mark.versions
def test_a_frame_of_a_run(page):
    frame, lines = page["frame"], Metrics.read(page["folder"] / "runs" / "first" / "metrics.jsonl")
    places = [(m, seed, number) for m in ("l2t_dln", "l2t_dln_transfer") for seed in (0, 1) for number in range(3)]
    assert list(frame[["method", "seed", "round"]].itertuples(index=False, name=None)) == places
    assert list(frame.columns) == list(dict.fromkeys(name for line in lines for name in line))
    found = {(row["method"], row["seed"], row["round"]): row for row in frame.to_dict("records")}
    for line in lines:
        row = found[(line["method"], line["seed"], line["round"])]
        assert all(row[name] == line[name] for name in line if name != "finite") and row["finite"] is True
    for name, value in lines[0].items():
        kind = {"finite": bool, "method": None}.get(name, type(value))
        assert kind is None or frame[name].dtype == kind


def test_what_the_page_says_of_columns(page):
    table = PAGE.read_text().partition("| column |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) <= set(page["frame"].columns)
    run = read_run(page["folder"] / "runs" / "second")
    assert set(re.findall(r"`(\w+)`", table)) == set(run.to_frame().columns) - {"student_gradient_norm"}
    assert run.summary["methods"]["cross_entropy"]["score"]["mean"] > 0 and run.config["rounds"] == 3
    assert page["best"][("cross_entropy", 1)] == run.to_frame().query("seed == 1")["validation_error"].min()


def written(path, rows, torn=""):
    write_json(path / "config.json", {"config": {"rounds": 2}})
    Metrics(path / "metrics.jsonl").append(rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    return read_run(path)


def test_a_run_that_goes_on_and_a_seed_that_ended(tmp_path):
    """Seeds side by side take turns in the file; the last line is being written; NaN is null there."""
    rows = [
        {"method": "b", "seed": 1, "round": 0, "error": 0.5, "finite": {"student": True, "dln": True}},
        {"method": "b", "seed": 0, "round": 0, "error": 0.25, "finite": {"student": True, "dln": True}},
        {"method": "b", "seed": 1, "round": 1, "error": None, "finite": {"student": True, "dln": False}},
        {"method": "a", "seed": 0, "round": 0, "other": 1.0, "finite": {"student": True}},
    ]
    run = written(tmp_path, rows, torn='{"method": "a", "se')
    frame = run.to_frame()
    assert frame["method"].tolist() == ["b", "b", "b", "a"] and frame["seed"].tolist() == [0, 1, 1, 0]
    assert frame["finite"].tolist() == [True, True, False, True]
    np.testing.assert_array_equal(frame["error"], [0.25, 0.5, np.nan, np.nan])
    np.testing.assert_array_equal(frame["other"], [np.nan, np.nan, np.nan, 1.0])
    assert frame["error"].dtype == float and run.summary == {} and run.rows == rows
    (tmp_path / "none").mkdir()
    assert written(tmp_path / "none", []).to_frame().empty


def damaged(path, name, content):
    written(path, [])
    (path / name).write_text(content)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "holds no run: give the --workdir of one"),
        (lambda path: (path / "records").mkdir(), r"holds no run \(it is of a table, whose records are in .*records\)"),
        (lambda path: damaged(path, "config.json", "{"), "config.json is damaged: restore it"),
        (lambda path: damaged(path, "summary.json", "{"), "summary.json is damaged: restore it"),
        (lambda path: damaged(path, "summary.json", "[]"), "summary.json is a list, expected the record of a run"),
        (lambda path: damaged(path, "metrics.jsonl", "{\n"), "metrics.jsonl, line 1, is not JSON"),
    ],
)
def test_what_is_no_run_gets_a_line(make, line, tmp_path):
    make(tmp_path)
    with pytest.raises(WorkdirError, match=line) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_pandas_that_is_absent_is_named(tmp_path, monkeypatch):
    run = written(tmp_path, [])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_frame needs pandas: pip install pandas.$"):
        run.to_frame()
    assert json.loads((tmp_path / "config.json").read_text())["config"] == run.config
    assert l2t_jax.read_run is read_run
