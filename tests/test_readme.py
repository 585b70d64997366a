"""The README's examples run as they are written, one after the other, as a reader would paste them."""

import json
import re
from pathlib import Path

import pytest

from experiments._report import percent

RECORDS = sorted((Path(__file__).parents[1] / "experiments" / "results").glob("*.json"))
README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["result"].error > 0


def test_files_it_names_exist():
    root = Path(__file__).parents[1]
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).exists(), f"README.md links to {link}, which is not there"


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_results_table_is_the_record(path):
    record = json.loads(path.read_text())
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"results/{path.name})" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = ("l2t_dln", "l2t_dln_transfer", "cross_entropy")
    assert cells[1:4] == [percent(record["methods"][name]["test_accuracy"]) for name in names]
    assert cells[4] == str(record["methods"]["l2t_dln"]["student_steps"])
    assert record["environment"]["git"]["dirty"] is False and record["command"].startswith("python -m experiments.")
