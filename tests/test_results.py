"""What lies in results is in an index, is linked where it is a picture, and can be read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import label_errors
from l2t_jax.runs.cells import cell_name
from l2t_jax.runs.records import read_record

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "experiments", "benchmarks", "l2t_jax", "tests")  # not runs/, which is of no commit
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
PAGES = [*sorted(ROOT.glob("*.md")), *(path for path in FILES if path.suffix == ".md")]
RESULTS = ROOT / "experiments" / "results"
TABLES = sorted(path.parent for path in RESULTS.rglob("records"))


def links(page: Path) -> list[str]:
    """The local files that a page links to, as it names them."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in found if not re.match("#|[a-z]+:", link)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_links_to_exist(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_every_picture_is_linked_by_a_page():
    linked = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert [name(path) for path in FILES if path.suffix == ".png" and path.resolve() not in linked] == []


@pytest.mark.parametrize("index", ["experiments/results/README.md", "benchmarks/README.md"])
def test_the_index_names_what_is_there(index):
    """All of the top of results and nothing else; that of the benchmarks links to what else it speaks of."""
    page = ROOT / index
    folder = page.parent if page.parent.name == "results" else page.parent / "results"
    named = {(page.parent / link).resolve() for link in links(page)}
    assert {path for path in named if path.parent == folder} == set(folder.iterdir()) - {page}


def test_names_have_no_spaces():
    assert [name(path) for path in FILES if " " in path.name] == []
    assert cell_name("digits_mlp", "", "as it is", 0.1) == "digits_mlp_as_it_is_0.1"


@pytest.mark.parametrize("table", TABLES, ids=name)
def test_records_of_a_table_name_its_environments(table):
    """Each cell names one of environments.json, where nothing is that no cell names."""
    paths = sorted((table / "records").glob("*.json"))
    keys = {json.loads(path.read_text())["environment"] for path in paths}
    assert keys == json.loads((table / "environments.json").read_text()).keys()
    assert all({"versions", "git", "hardware"} == read_record(path)["environment"].keys() for path in paths)


def test_the_page_of_label_errors_is_its_record():
    """Every row of the table, letter for letter; and ours first where the page says so."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "label_errors.json").read_text())["rows"]
    text = (ROOT / "docs" / "label_errors.md").read_text()
    assert text.endswith(label_errors.table(rows).partition("\n## ")[2].rstrip() + "\n")
    for name in {row["set"] for row in rows}:
        first = text.partition(f"## {name},")[2].split("|---|---|---|---|\n")[1].splitlines()[0]
        assert ", trust |" in first


def test_rankings_are_judged():
    """Small scores are suspicious: a ranking that knows has an area of 1, one that is turned round 0."""
    wrong = np.array([True, False, True, False, False])
    scores = np.array([0.1, 0.9, 0.2, 0.5, 0.3])
    best = label_errors._row("x", scores, wrong, 1.0)
    assert best["auroc"] == best["precision"] == 1
    assert label_errors._row("x", -scores, wrong, 1.0)["auroc"] == 0
    first = label_errors._first(np.array([3, 1]), scores)
    assert np.argsort(first).tolist()[:2] == [3, 1] and np.argsort(first).tolist()[2:] == [0, 2, 4]
