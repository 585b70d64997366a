"""The table of trained teachers where they were not trained."""

import hashlib
import json
from pathlib import Path

import pytest
from launching import SMALL, launch, write_record

from experiments import transfer
from l2t_jax.presets import Preset
from l2t_jax.runs import cells, trained_teachers
from l2t_jax.runs.config import Config
from l2t_jax.runs.records import WorkdirError

pytestmark = pytest.mark.usefixtures("small_lstm")
FEW = (*SMALL, "--seeds=2")


def test_table_has_the_sources_beside_what_is_trained_here(tmp_path, monkeypatch):
    """Every run is trained elsewhere; here, which runs are asked for and how they are told."""
    asked = {}

    def run_cell(cell, options, load):
        methods = cell.config.methods
        asked[cell.name] = methods, cell.config.teacher, cell.teacher_from
        values = [0.9, 0.8] if cell.teacher_from is None else [0.95, 0.86]
        names = ["l2t_dln", "l2t_dln_transfer"] if methods == ("l2t_dln",) else methods
        write_record(tmp_path, cell.name, cell.config, values, names if cell.teacher_from is None else names[1:])
        return 0

    (tmp_path / "records").mkdir()
    monkeypatch.setattr(cells, "run_cell", run_cell)
    sources = ("shipped:mine", "runs/other")
    arguments = (*FEW, "--students=mlp,lenet", f"--sources={','.join(sources)}", f"--workdir={tmp_path}")
    assert launch(transfer, *arguments) == 0
    here = {
        "lstm_cross_entropy": (("cross_entropy",), "lstm", None),
        "adam_l2t_dln": (("l2t_dln",), "adam", None),
        "lstm_l2t_dln": (("l2t_dln",), "lstm", None),
        "from_shipped_mine": (("l2t_dln",), "lstm", "shipped:mine"),
        "from_other": (("l2t_dln",), "lstm", "runs/other"),
    }
    assert asked == {f"digits_{student}_{name}": cell for student in ("mlp", "lenet") for name, cell in here.items()}
    table = (tmp_path / "table.md").read_text()
    sections = table.split("## ")[1:]
    assert [section.splitlines()[0] for section in sections] == ["digits, mlp", "digits, lenet"]
    rows = {texts[1].strip(): texts[2:] for line in sections[0].splitlines() if len(texts := line.split("|")) > 3}
    names = ["cross entropy", "Adam as the teacher", "trained here, online", transfer.HERE]
    assert list(rows)[2:] == [*names, *(f"{source}, frozen" for source in sources)]
    accuracy, less_base, p, less_here, *_ = (cell.strip() for cell in rows["runs/other, frozen"])
    assert (accuracy, less_base, less_here) == ("90.50 ± 7.00", "+5.50", "+5.50") and 0.04 < float(p) < 0.07


def test_a_cell_of_other_teachers_is_not_taken_for_done(tmp_path):
    """Of two directories with one last name, the record of the first is not that of the second."""
    config = Config("digits", "mlp", ("l2t_dln",), "stable", "lstm", 2, "auto", (0,), Preset())
    (tmp_path / "records").mkdir()
    write_record(tmp_path, "cell", config, [0.9], ["l2t_dln_transfer"])
    record = tmp_path / "records" / "cell.json"
    found = json.loads(record.read_text())
    found["config"]["taught_by"] = {"l2t_dln, seed 0": hashlib.sha256(b"one").hexdigest()}
    record.write_text(json.dumps(found))
    with pytest.raises(WorkdirError, match="is of other teachers than"):
        cells._same(record, config, str(tmp_path / "nowhere"))
    for name in ("one", "two"):
        path = trained_teachers.path_of(Path(tmp_path / name), "l2t_dln", 0)
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
    cells._same(record, config, str(tmp_path / "one"))
    with pytest.raises(WorkdirError, match="is of other teachers than"):
        cells._same(record, config, str(tmp_path / "two"))


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
    monkeypatch.setattr(transfer, "bases", lambda baseline: {})
    assert launch(transfer, *FEW, f"--workdir={tmp_path}/t", *arguments) == 2
    assert message in capsys.readouterr().err
