"""The table of L2T-DLN against tuned baselines: what is run, and what is called held or missed."""

import pytest
from launching import SMALL, launch, write_record

from experiments import replication
from experiments.replication import CE, FROZEN, GCE, LSTM, MWN, TUNED, promises
from l2t_jax.runs.tables import Row
from l2t_jax.types import Metric

ADAM = "L2T-DLN, Adam, frozen"


def rows(**accuracies):
    names = {"lstm": LSTM, "frozen": FROZEN, "adam": ADAM, "ce": CE, "gce": GCE, "mwn": MWN}
    methods = {
        names[name]: {"score": {"mean": sum(seeds) / len(seeds), "per_seed": seeds}, "failed": []}
        for name, seeds in accuracies.items()
    }
    record = {"metric": Metric("accuracy", "%")._asdict(), "methods": methods}
    return {name: Row(name, record, name) for name in methods}


def missed(labels, found):
    return [what for what, held in promises(labels, found) if not held]


def test_a_single_seed_far_below_breaks_the_promise_on_clean_labels():
    good = rows(lstm=[0.98, 0.97], frozen=[0.98, 0.97], adam=[0.97, 0.97], ce=[0.97, 0.972])
    assert missed("clean", good) == []
    (what,) = missed("clean", rows(lstm=[0.99, 0.968], frozen=[0.98, 0.97], adam=[0.9, 0.9], ce=[0.97, 0.972]))
    assert what == f"{LSTM}: no seed is more than 0.3 points below cross entropy (-0.40)"
    level = rows(lstm=[0.97, 0.97], frozen=[0.98, 0.97], adam=[0.9, 0.9], ce=[0.97, 0.97])
    assert missed("clean", level) == [f"{LSTM}: above cross entropy in the mean (+0.00 from {CE})"]


def test_each_bar_on_wrong_labels_is_seen_alone():
    base = {"lstm": [0.95], "frozen": [0.95], "adam": [0.95], "ce": [0.84], "gce": [0.95], "mwn": [0.95]}
    assert missed("flips", rows(**base)) == [] == missed("uniform", rows(**base))
    for name, value, words in (("ce", 0.86, "10 points"), ("gce", 0.951, "generalized"), ("mwn", 0.951, "Meta-Weight")):
        found = missed("flips", rows(**base | {name: [value]}))
        assert len(found) == 2 and all(words in what for what in found)
    assert missed("flips", rows(**base | {"adam": [0.951]})) == [
        f"{FROZEN}: not below the best optax teacher (-0.10 from {ADAM})"
    ]
    assert missed("uniform", rows(**base | {"gce": [0.954]})) == []
    assert len(missed("uniform", rows(**base | {"mwn": [0.956]}))) == 2
    level = rows(**base)
    level[ADAM].score["mean"] += 2e-8  # the same accuracies, rounded to float32
    assert missed("uniform", level) == []
    stopped = rows(**base)
    stopped[LSTM].outcome["failed"] = [{"seed": 0, "reason": "x"}]
    assert "stops early" in missed("uniform", stopped)[0]


def test_the_table_is_of_tuned_settings(tmp_path, monkeypatch):
    """Every run is trained elsewhere; here, which runs are asked for and how they are told."""
    asked = {}

    def run_cell(cell, options, load):
        config = asked[cell.name] = cell.config
        names = ["l2t_dln", "l2t_dln_transfer"] if config.methods == ("l2t_dln",) else config.methods
        write_record(tmp_path, cell.name, config, [0.9] * len(config.seeds), names)
        return 0

    (tmp_path / "records").mkdir()
    monkeypatch.setattr("l2t_jax.runs.cells.run_cell", run_cell)
    assert launch(replication, "--rounds=2", f"--workdir={tmp_path}") == 0
    clean = {"digits_mlp_lstm_l2t_dln", "digits_mlp_adam_l2t_dln", f"digits_mlp_{CE}"}
    assert clean < set(asked) and len(asked) == 3 + 5 + 5
    for config in asked.values():
        labels = "clean" if config.noise is None else {"flip2": "flips"}.get(config.noise.kind, config.noise.kind)
        settings = config.settings
        given = settings.student_lr, settings.student_schedule, settings.student_clip
        (method,) = config.methods
        tuned = TUNED["digits", "mlp", labels] | {"l2t_dln": (0.3, "cosine", 1.0)}  # which is as the preset is
        assert given == tuned[method]
        assert config.preset == "stable" and settings.window == 5 and len(config.seeds) == 5
    table = (tmp_path / "table.md").read_text()
    assert "| L2T-DLN, LSTM, frozen | 90.00 ± 7.00 |" in table and "\n- held: " in table


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--method=ala", "leave it out"),
        ("--dataset=cifar10", "nothing was tuned"),
        ("--held_out=0.2", "is for choosing"),
    ],
)
def test_what_makes_no_table_is_told(flag, message, capsys):
    assert launch(replication, *SMALL, flag) == 2
    assert message in capsys.readouterr().err
