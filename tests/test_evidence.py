"""Where teaching pays: a table and a picture from the records that are kept."""

import shutil

import numpy as np
import pytest
from launching import launch

from experiments import evidence
from l2t_jax.runs.records import read_record
from l2t_jax.runs.tables import p_value

pytestmark = pytest.mark.results

DIGITS = evidence.PLACES[2]
RECORDS = "replication_digits/records"


def test_rows_are_those_of_the_records():
    """40 % flips of the digits: tuned cross entropy, the best of the rest, the LSTM online and not Adam."""
    found = evidence.rows_of(evidence.RESULTS, DIGITS)
    records = {path.stem: read_record(path) for path in (evidence.RESULTS / RECORDS).glob("digits_mlp_flip240_*")}
    mean = lambda name, method: records[f"digits_mlp_flip240_{name}"]["methods"][method]["score"]["mean"]  # noqa: E731
    assert found.plain.score["mean"] == mean("cross_entropy", "cross_entropy")
    assert found.ours.score["mean"] == mean("lstm_l2t_dln", "l2t_dln") != mean("adam_l2t_dln", "l2t_dln")
    others = {name: mean(name, name) for name in ("generalized_cross_entropy", "meta_weight_net")}
    assert found.best.method == max(others, key=others.get)
    assert p_value(found.ours) < 0.001 < p_value(found.ours, 1)
    gain, spread = evidence._gain(found.ours, found.plain)
    apart = 100 * np.subtract(found.ours.score["per_seed"], found.plain.score["per_seed"])
    np.testing.assert_allclose((gain, spread), (apart.mean(), apart.std(ddof=1)))


def test_what_is_trained_on_the_clean_examples_is_a_row_of_its_own():
    found = evidence.rows_of(evidence.RESULTS, next(p for p in evidence.PLACES if p.name.startswith("news")))
    assert found.plain.record["config"]["train_on_clean"] and found.best.name.endswith("+ clean")
    assert not found.ours.record["config"]["train_on_clean"]


def test_the_page_has_the_table_and_the_command_writes_both(tmp_path, capsys):
    assert launch(evidence, f"--workdir={tmp_path / 'there'}") == 0
    assert capsys.readouterr().out.strip() == f"Files: {tmp_path / 'there'} (table.md, gains.png)"
    text = (tmp_path / "there" / "table.md").read_text()
    assert text == (evidence.RESULTS / "evidence" / "table.md").read_text()
    assert text.count("\n| ") == len(evidence.PLACES) + 1
    page = (evidence.RESULTS.parents[1] / "docs" / "replication.md").read_text()
    assert all(line in page for line in text.splitlines() if line.startswith("|"))
    assert (tmp_path / "there" / "gains.png").stat().st_size > 20_000


def test_two_records_of_a_method_are_refused():
    place = DIGITS._replace(files=f"{DIGITS.files} {RECORDS}/digits_mlp_flip240_cross_entropy.json")
    with pytest.raises(ValueError, match="has cross_entropy, and so has another record"):
        evidence.rows_of(evidence.RESULTS, place)


@pytest.mark.parametrize("missing", ["digits_mlp_flip240_cross_entropy.json", "digits_mlp_flip240_lstm_l2t_dln.json"])
def test_a_row_without_records_says_which(missing, tmp_path, capsys):
    for place in evidence.PLACES:
        for path in (path for pattern in place.files.split() for path in evidence.RESULTS.glob(pattern)):
            there = tmp_path / path.relative_to(evidence.RESULTS)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
            if (kept := path.parent.parent / "environments.json").exists():
                shutil.copyfile(kept, there.parent.parent / "environments.json")
    (tmp_path / RECORDS / missing).unlink()
    assert launch(evidence, f"--results={tmp_path}", f"--workdir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ") and "has no record of" in line and DIGITS.name in line
