"""Tables as they are rendered: by the metric of their records, and those that are committed letter for letter."""

import dataclasses
from pathlib import Path

import pytest

from experiments import ablations, compare, replication, transfer, tune
from l2t_jax.presets import PRESETS
from l2t_jax.runs import plots, tables
from l2t_jax.runs.cells import records_in
from l2t_jax.runs.config import Config, Noise
from l2t_jax.runs.tables import Column, Row, Section, Table
from l2t_jax.types import Metric

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
FLIPS, UNIFORM = Noise("flip2", 0.4, None, 1), Noise("uniform", 0.6, None, 1)
STABLE = Config("digits", "mlp", ("l2t_dln",), "stable", "lstm", 140, "auto", (0,), PRESETS["stable"])
OURS = [0.11, 0.205, 0.305]
TAUGHT = {"l2t_dln": OURS, "l2t_dln_transfer": OURS}


def record(methods, **settings):
    """Of squared errors, whose baseline is another method, trained by nobody."""
    outcomes = {
        name: {
            "score": {"mean": sum(scores) / len(scores) if scores else None, "std": 0.1, "per_seed": scores},
            **{"failed": [], "student_steps": 50, "wall_time_s": 6.0, "rounds": 2},
            "learned_parameters": {"loss": 0, "teacher": 0},
        }
        for name, scores in methods.items()
    }
    config = dataclasses.asdict(dataclasses.replace(STABLE, settings=dataclasses.replace(STABLE.settings, **settings)))
    return {
        "methods": outcomes,
        "metric": Metric("squared error", "", "lower")._asdict(),
        "baseline": "plain_mean",
        "config": config | {"wrong_labels": 0.0, "meta": 0},
        "seeds": [0, 1, 2],
        "student_parameters": 7,
        **{"dataset": "digits", "student": "mlp", "preset": "stable", "unroll_length": 25},
    }


BASE = {"plain_mean": [0.21, 0.3, 0.4]}


def lines(table):
    text = tables.markdown(table)
    assert "%" not in text and "accuracy" not in text and "cross entropy" not in text
    return text.splitlines()


def test_a_table_is_blocks_between_empty_lines():
    rows = [Row("a", {"methods": {}}, "x"), Row("b", {"methods": {}}, "y")]
    section = Section([Column("name", lambda row: row.name), Column("of", lambda row: row.method)], rows)
    table = Table("All", [section, section._replace(title="More", before="Before.", after="After.")], "Intro.")
    grid = "| name | of |\n|---|---|\n| a | x |\n| b | y |\n"
    assert tables.markdown(table) == f"# All\n\nIntro.\n\n{grid}\n## More\n\nBefore.\n\n{grid}\nAfter.\n"
    assert "\n| --- | --- |\n" in tables.markdown(table._replace(rule=" --- "))


def test_a_comparison_of_errors(tmp_path, monkeypatch):
    """Errors are told as they are, against their own baseline, and the lower one is shaded as better."""
    found = lines(
        table := compare.table([record({"focal": OURS}), record(BASE), record({"mae": [9.0, 9.1, 9.2]})], "x")
    )
    assert found[2].startswith("Test squared error, mean ± sample standard deviation over the seeds")
    assert found[3].startswith("Difference and p: against plain mean over")
    rows = [line for line in found if line.startswith("| ")]
    assert rows[0].startswith("| method | squared error | difference | p |")
    assert rows[1].startswith("| plain_mean | 0.3033 ± 0.1000 |  |  |")  # the baseline first
    assert rows[2].startswith("| focal | 0.2067 ± 0.1000 | -0.0967 | < 0.001 |")
    drawn = {}
    monkeypatch.setattr(plots, "table", lambda path, *given, title: drawn.update(given=given, title=title))
    tables.draw(tmp_path / "table.png", table.sections, ["plain_mean", "focal", "mae"], "x")
    assert drawn["given"][0] == ["test squared error", "digits, mlp"] and "not plain mean's" in drawn["title"]
    assert drawn["given"][2] == [[None, None], [None, True], [None, False]]


def test_the_least_error_is_tuned_best():
    errors = {0.1: [0.3], 0.2: [0.1], 0.3: [], 0.4: [0.2]}
    records = [record({"focal": scores}, student_lr=rate) for rate, scores in errors.items()]
    assert lines(tune.table(records))[2:] == [
        "| data | method | student_lr | test squared error |",
        "| --- | --- | --- | --- |",
        "| digits, mlp | focal | 0.2 | 0.1000 ± 0.1000 |",
        "| digits, mlp | focal | 0.4 | 0.2000 ± 0.1000 |",
        "| digits, mlp | focal | 0.1 | 0.3000 ± 0.1000 |",
        "| digits, mlp | focal | 0.3 | - |",  # what has none last
    ]


def test_an_ablation_of_errors(tmp_path, monkeypatch):
    ablation = ablations.ABLATIONS["6"]._replace(values=("lstm", "adam"))
    found = dict.fromkeys(ablation.values, record(TAUGHT | BASE))
    text = lines(ablations.table(ablation, {"rounds": found}))
    assert text[2].startswith("Test squared error, mean ±") and text[3].startswith("against plain mean over the same")
    head, _, row, _ = (line.split(" | ") for line in text[5:])
    assert head[1:5] == ["L2T-DLN, online", "transfer", "plain mean", "difference"]
    assert row[1:] == [
        "0.2067 ± 0.1000",
        "0.2067 ± 0.1000",
        "0.3033 ± 0.1000",
        "-0.0967",
        "< 0.001",
        "50",
        "1.00",
        " |",
    ]
    drawn = {}
    monkeypatch.setattr(plots, "ablation", lambda path, curves, **given: drawn.update(given, curves=curves))
    ablations.draw(tmp_path / "x.png", ablation, "rounds", found)
    assert drawn["ylabel"] == "test squared error" and list(drawn["curves"]) == [*TAUGHT, *BASE]  # none published
    assert drawn["curves"]["plain_mean"][0] == ("lstm", pytest.approx(0.3033, abs=1e-4), 0.1)


def test_a_transfer_of_errors(monkeypatch):
    bases = {"plain mean": ("plain_mean", "lstm", "plain_mean"), transfer.HERE: transfer.bases("")[transfer.HERE]}
    monkeypatch.setattr(transfer, "bases", lambda baseline: bases)
    cells = transfer.cells(STABLE, {"mine": "shipped:mine"})
    named = {cell.name: record(BASE if method in BASE else TAUGHT) for cell, method in cells.values()}
    text = lines(transfer.table([cells], named))
    assert text[6] == "| teacher | squared error | less plain mean | p | less trained here | p | student steps |"
    assert text[8:] == [
        "| plain mean | 0.3033 ± 0.1000 |  |  | +0.0967 | < 0.001 | 50 |",
        "| trained here, frozen | 0.2067 ± 0.1000 | -0.0967 | < 0.001 |  |  | 50 |",
        "| shipped:mine, frozen | 0.2067 ± 0.1000 | -0.0967 | < 0.001 | +0.0000 |  | 50 |",
    ]


def test_promises_are_of_what_is_better():
    names = (replication.LSTM, replication.FROZEN, "L2T-DLN, Adam, frozen", replication.CE)
    scores = dict(zip(names, ([0.1], [0.1], [0.2], [0.15]), strict=True))
    rows = {name: Row(name, record(scores), name) for name in names}
    assert all(held for _, held in replication.promises("clean", rows))
    assert "| squared error | p |" in tables.markdown(Table("x", [replication.section("clean", rows)]))


def committed(name):
    return (RESULTS / name / "table.md").read_text()


@pytest.mark.results
@pytest.mark.parametrize("name", ["4", "5", "6", "lr", "options", "cost"])
def test_ablations_are_their_records(name):
    ablation, records = ablations.ABLATIONS[name], records_in(RESULTS / f"ablation_{name}")
    config = dataclasses.replace(STABLE, noise=None if name == "4" else FLIPS)
    cells = {equal: ablations.cells(config, ablation, equal) for equal in ablation.equal}
    found = {equal: {value: records[cell.name] for value, cell in of.items()} for equal, of in cells.items()}
    assert tables.markdown(ablations.table(ablation, found)) == committed(f"ablation_{name}")


@pytest.mark.results
@pytest.mark.parametrize("name", ["digits", "mnist", "mnist_one_seed"])
def test_trials_are_their_records(name):
    records = list(records_in(RESULTS / "tuning" / name).values())
    assert tables.markdown(tune.table(records)) == committed(f"tuning/{name}")


@pytest.mark.results
@pytest.mark.parametrize(
    ("dataset", "noise", "name"),
    [("digits", FLIPS, "digits_flips"), ("digits", UNIFORM, "digits_uniform"), ("mnist", FLIPS, "mnist_flips")],
)
def test_transfers_are_their_records(dataset, noise, name):
    """What is trained there is in the records of the replication."""
    records = records_in(RESULTS / f"replication_{dataset}") | records_in(RESULTS / f"transfer_{name}")
    named = transfer.sources("shipped:digits_flips,shipped:digits_uniform,shipped:mnist_flips")
    cells = transfer.cells(dataclasses.replace(STABLE, dataset=dataset, noise=noise), named)
    assert tables.markdown(transfer.table([cells], records)) == committed(f"transfer_{name}")
