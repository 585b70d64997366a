"""The examples of README and docs run as they are written, one after the other, as a reader would paste them."""

import importlib
import json
import re
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from pages import blocks_of
from sklearn.datasets import load_digits

from experiments import _flags, classification, compare, replication
from l2t_jax import losses, methods, students
from l2t_jax.presets import PRESETS
from l2t_jax.runs import tables
from l2t_jax.runs.cells import records_in
from l2t_jax.runs.config import Config
from l2t_jax.runs.records import read_record
from l2t_jax.runs.texts import shown
from l2t_jax.types import Metric

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "experiments" / "results").glob("compare_*"))
ACCURACY = Metric("accuracy", "%")._asdict()
SUSPECTS = ROOT / "experiments" / "results" / "digits_flips_suspects.json"
RECORDS = sorted(set(SUSPECTS.parent.glob("digits_*.json")) - {SUSPECTS})
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Whose examples run in tests of their own; half of the first needs PyTorch.
for _name in ("learned_loss", "extending", "interfaces", "reading_results"):
    PAGES.remove(ROOT / "docs" / f"{_name}.md")
RESULTS_PAGE = (ROOT / "docs" / "results.md").read_text()


@pytest.fixture
def registries():
    """The dicts that readers add to, as they were again afterwards."""
    known = (losses.LOSSES, students.STUDENTS, methods.METHODS)
    before = [dict(registry) for registry in known]
    yield
    for registry, entries in zip(known, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.versions
def test_python_examples_run(registries, tmp_path, monkeypatch):
    blocks = blocks_of(README)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)  # where the files of a run without a workdir go
    x, y = load_digits(return_X_y=True)
    names = ("x", "x_clean", "x_test"), ("y", "y_clean", "y_test")
    parts = [slice(400), slice(400, 600), slice(600, 800)]
    namespace = {}
    for which, whole in zip(names, (x, y), strict=True):
        namespace |= {name: whole[part] for name, part in zip(which, parts, strict=True)}
    for block in blocks:
        short = block.replace("rounds=200, seeds=3", 'rounds=2, seeds=1, teacher="adam"')
        exec(compile(short, "README.md", "exec"), namespace)
    assert namespace["result"].error > 0 and namespace["data"].meta == 200
    assert "brier" in methods.method_names()


def test_readme_is_short():
    """What is longer is for docs/."""
    assert len(README.splitlines()) <= 130
    prose = re.sub(r"```.*?```|^(    |\||!).*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", prose)
    assert [part for part in re.split(r"[.:?]\s|\n\n|\n- ", prose) if len(part.split()) > 30] == []


@pytest.mark.results
def test_the_picture_of_readme_is_of_its_first_command():
    record = read_record(ROOT / "experiments" / "results" / "first_command.json")
    assert record["command"].startswith("python -m experiments.noisy_labels --workdir=")  # and no other flag
    assert record["command"].count("--") == 1 and record["environment"]["git"]["dirty"] is False
    wrong, meta = (record["config"][name] for name in ("wrong_labels", "meta"))
    assert f"{100 * wrong:.0f} % of the digits' training labels are wrong, and {meta} are known to be right" in README


def test_what_questions_say_of_two_processors_is_of_their_records():
    told = []
    for name in ("first_command", "first_command_other_processor"):
        record = read_record(ROOT / "experiments" / "results" / f"{name}.json")
        told.append(shown(record["methods"]["l2t_dln"]["score"], record["metric"]))
        assert shown(record["methods"]["cross_entropy"]["score"], record["metric"]) == "73.24 ± 0.85"
    text = (ROOT / "docs" / "faq.md").read_text()
    assert f"has {told[0]} online on one machine" in text and f"and {told[1]} on another" in text


COMMANDS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), " ".join(command.replace("\\\n", " ").split()))
        for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
        for command in re.findall(r"python -m (experiments\.(?:[^`\n]|\\\n)*)", page.read_text())
    }
)


@pytest.mark.parametrize("page, command", COMMANDS)
def test_commands_of_pages_have_modules_and_flags(page, command):
    module = importlib.import_module(command.split()[0])
    known = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
    assert set(re.findall(r"--(\w+)", command)) - {"help"} <= known


def test_the_table_of_readme_is_of_the_evidence():
    """Some rows and columns of it, letter for letter."""
    lines = (ROOT / "experiments" / "results" / "evidence" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    kept = {f"| {' | '.join([*row[:4], row[6], row[9]])} |" for row in cells}
    rows = [line for line in README.partition("## Results")[2].splitlines() if line.startswith("| ")]
    assert len(rows) == 7 and set(rows) <= kept


@pytest.mark.versions
def test_what_a_reader_adds_is_known_to_the_command_line(registries, tmp_path):
    """And learns."""
    namespace = {}
    for block in blocks_of((ROOT / "docs" / "extending.md").read_text()):
        exec(compile(block, "extending.md", "exec"), namespace)
    arguments = ("--method=brier,better_of_two", "--student=linear", "--seeds=1", "--rounds=20", "--unroll_length=10")
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        _flags.parse_arguments(["classification.py", *arguments, f"--workdir={tmp_path / 'run'}"])
        classification.main([])
    assert stop.value.code == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]
    assert all(found[name]["score"]["mean"] > 0.8 for name in ("brier", "better_of_two"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_examples_of_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks_of(page.read_text()):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("name", [path.name for path in RECORDS])
def test_results_table_is_the_record(name):
    record = read_record(SUSPECTS.with_name(name))
    (row,) = [line for line in RESULTS_PAGE.splitlines() if line.startswith("|") and f"results/{name})" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = ("l2t_dln", "l2t_dln_transfer", "cross_entropy")
    assert cells[1:4] == [shown(record["methods"][name]["score"], record["metric"]) for name in names]
    assert cells[4] == str(record["methods"]["l2t_dln"]["student_steps"])
    assert record["environment"]["git"]["dirty"] is False and record["command"].startswith("python -m experiments.")


@pytest.mark.results
def test_what_is_said_of_suspects_is_the_record():
    """All of the least trusted tenth under L2T-DLN and Meta-Weight-Net, 96 % under cross entropy; 40 % flips."""
    record = read_record(SUSPECTS)
    found = {name: method["suspects"] for name, method in record["methods"].items()}
    assert {entry["share"] for entry in found.values()} == {0.1} and record["config"]["noise"]["kind"] == "flip2"
    assert found["l2t_dln"]["precision"] == found["meta_weight_net"]["precision"] == 1
    page = (ROOT / "docs" / "own_data.md").read_text().replace("\n", " ")
    assert f"{100 * found['cross_entropy']['precision']:.0f} % under cross entropy" in page
    assert record["environment"]["git"]["dirty"] is False


@pytest.mark.parametrize("name", [path.name for path in TABLES])
def test_comparison_tables_are_their_records(name):
    """table.md is what its records say, they are of clean commits, and the excerpt in docs is taken from them."""
    folder = SUSPECTS.with_name(name)
    records = [read_record(path) for path in sorted((folder / "records").glob("*.json"))]
    kind = folder.name.removeprefix("compare_")
    table = compare.table(records, f"{kind} labels")
    assert (folder / "table.md").read_text() == tables.markdown(table)
    for record in records:
        assert record["environment"]["git"]["dirty"] is False
        assert record["command"].startswith(f"python -m experiments.compare --table={kind} ")
    lines = RESULTS_PAGE.splitlines()
    (heading,) = [line for line in lines if line.startswith("| ") and f"{folder.name}/table.md)" in line]
    setups = [cell.strip() for cell in heading.strip("|").split("|")][1:]
    lines = lines[lines.index(heading) + 2 :]
    for line in lines[: lines.index("")]:
        method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for setup, cell in zip(setups, cells, strict=True):
            rows = next(section.rows for section in table.sections if section.title == setup)
            scores = {row.method: shown(row.score, row.record["metric"]) for row in rows}
            assert cell == scores.get(method, ""), (method, setup)


@pytest.mark.results
@pytest.mark.parametrize("dataset", ["digits", "mnist"])
@pytest.mark.parametrize("kind, page", [("", "tuning.md"), ("_cheap", "replication.md")])
def test_replication_tables_are_their_records(dataset, kind, page):
    """table.md is what its records say, and so are the rows of a page; of the cheap ones those of L2T-DLN."""
    folder = ROOT / "experiments" / "results" / f"replication_{dataset}{kind}"
    given = {"dataset": dataset, "student": "mlp", "rounds": None}
    stable = {"preset": "stable", "settings": PRESETS["stable"], "teacher": "lstm", "methods": ("l2t_dln",)}
    table = replication.table(Config(**given, **stable, memory="auto", seeds=(0,)), records_in(folder))
    assert (folder / "table.md").read_text() == tables.markdown(table)
    columns = [{row.name: row for row in section.rows} for section in table.sections]
    text = (ROOT / "docs" / page).read_text()
    for name in {name for rows in columns for name in rows if not kind or name.startswith("L2T")}:
        cells = [shown(rows[name].score, ACCURACY) if name in rows else "" for rows in columns]
        told = f"{'MNIST' if dataset == 'mnist' else dataset}, {name.removeprefix('L2T-DLN, ')}" if kind else name
        assert f"| {told.replace('_', ' ')} | {' | '.join(cells)} |" in text
