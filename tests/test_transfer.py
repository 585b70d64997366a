"""The table of trained teachers where they were not trained."""

import json

import pytest
from launching import SMALL, launch

from experiments import classification, transfer

pytestmark = pytest.mark.usefixtures("small_lstm")
FEW = (*SMALL, "--seeds=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "trained"
    assert launch(classification, *FEW, "--method=l2t_dln", f"--workdir={workdir}") == 0
    return workdir


def test_table_has_the_source_beside_what_is_trained_here(source, tmp_path, capsys):
    workdir = tmp_path / "table"
    arguments = (*FEW, "--students=mlp", f"--sources={source}", f"--workdir={workdir}")
    assert launch(transfer, *arguments) == 0
    table = (workdir / "table.md").read_text()
    rows = {cells[1].strip(): cells[2:] for line in table.splitlines() if len(cells := line.split("|")) > 3}
    names = ["cross entropy", "Adam as the teacher", "trained here, online", transfer.HERE, f"{source}, frozen"]
    assert [name for name in rows if name in names] == names
    record = json.loads((workdir / "records" / "digits_mlp_from_trained.json").read_text())
    assert list(record["methods"]) == ["l2t_dln_transfer"] and len(record["config"]["taught_by"]) == 2
    mean = record["methods"]["l2t_dln_transfer"]["test_accuracy"]["mean"]
    base = json.loads((workdir / "records" / "digits_mlp_lstm_cross_entropy.json").read_text())
    other = base["methods"]["cross_entropy"]["test_accuracy"]["mean"]
    assert f"{100 * mean:.2f}" in rows[f"{source}, frozen"][0]
    assert rows[f"{source}, frozen"][1].strip() == f"{100 * (mean - other):+.2f}"
    capsys.readouterr()
    assert launch(transfer, *arguments) == 0  # nothing is run again
    assert "s, " not in capsys.readouterr().out and (workdir / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "must name at least one"),
        (("--sources=a/x,b/x",), "another last name"),
        (("--sources=shipped:none", "--students=mlp"), "There is no teacher 'none'"),
        (("--sources=x", "--method=ala"), "leave it out"),
        (("--sources=x", "--student=mlp"), "give --students"),
    ],
)
def test_what_makes_no_table_is_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "BASES", {})
    assert launch(transfer, *FEW, f"--workdir={tmp_path}/t", *arguments) == 2
    assert message in capsys.readouterr().err
