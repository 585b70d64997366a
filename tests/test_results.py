"""What lies in results is in an index, is linked where it is a picture, and can be read."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import label_errors
from experiments import compare, worth
from l2t_jax.presets import PRESETS
from l2t_jax.runs import tables
from l2t_jax.runs.cells import cell_name
from l2t_jax.runs.config import Config, Noise
from l2t_jax.runs.records import read_record
from l2t_jax.runs.texts import shown
from l2t_jax.types import Metric

pytestmark = pytest.mark.results

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


@pytest.mark.parametrize("table", [name(path) for path in TABLES])
def test_records_of_a_table_name_its_environments(table):
    """Each cell names one of environments.json, where nothing is that no cell names."""
    paths = sorted((ROOT / table / "records").glob("*.json"))
    keys = {json.loads(path.read_text())["environment"] for path in paths}
    assert keys == json.loads((ROOT / table / "environments.json").read_text()).keys()
    assert all({"versions", "git", "hardware"} == read_record(path)["environment"].keys() for path in paths)


def test_the_page_of_label_errors_is_its_record():
    """Every row of the table, letter for letter; and ours first where the page says so."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "label_errors.json").read_text())["rows"]
    text = (ROOT / "docs" / "label_errors.md").read_text()
    assert text.endswith(label_errors.table(rows).partition("\n## ")[2].rstrip() + "\n")
    for name in {row["set"] for row in rows}:
        first = text.partition(f"## {name},")[2].split("|---|---|---|---|\n")[1].splitlines()[0]
        assert ", trust |" in first


def test_rows_of_a_long_tail_are_their_records():
    """Accuracy and that of the rarest class, of both sets; table.md is written from them."""
    expected = {}
    for folder, label in (("long_tail", "{}"), ("long_tail_balanced", "{}, `--class_weight=balanced`")):
        records = [read_record(path) for path in sorted((RESULTS / folder / "records").glob("*.json"))]
        assert (RESULTS / folder / "table.md").read_text() == tables.markdown(compare.table(records, "clean labels"))
        for record in records:
            for method, found in record["methods"].items():
                score = shown(found["score"], record["metric"]).removesuffix(" %")
                rarest = f"{100 * found['scores']['accuracy of 9']['mean']:.0f}"
                expected.setdefault(label.format(method.replace("_", " ")), {})[record["dataset"]] = (score, rarest)
    assert len(expected) == 31
    text = (ROOT / "docs" / "rare_classes.md").read_text()
    for method, cells in expected.items():
        assert f"| {method} | {' | '.join([*cells['digits'], *cells['mnist']])} |" in text


def chosen(folder, worth=None, most=math.inf):
    """Of each method what was found with the rate that was best on held-out examples: rate, outcome, all rates."""
    tuned, final = {}, {}
    for path in (RESULTS / folder).iterdir():
        record = read_record(path)
        part, rate = re.fullmatch(r"(held_out|final)_([0-9.e-]+)(?:_taught)?", path.stem).groups()
        assert (record["config"]["held_out"] > 0) == (part == "held_out")
        assert record["config"]["settings"]["student_lr"] == float(rate)
        for method, found in record["methods"].items():
            (tuned if part == "held_out" else final).setdefault(method, {})[float(rate)] = found
    for method, rates in tuned.items():
        key = worth or (lambda found: found["score"]["mean"])
        best = max(sorted(rate for rate in rates if rate <= most), key=lambda rate: key(rates[rate]))  # or the smallest
        yield method, best, final[method][best], rates


def test_rows_of_ranking_are_their_records():
    """No rate is the last that was tried."""
    text = (ROOT / "docs" / "rare_classes.md").read_text()
    for method, best, found, rates in chosen("digits_aucpr"):
        assert min(rates) < best < max(rates)
        score = shown(found["score"], Metric("AUCPR", "%")._asdict()).removesuffix(" %")
        seconds = found["wall_time_s"] / len(found["score"]["per_seed"])
        assert f"| {method.replace('_', ' ')} | {score} | {best:g} | {seconds:.0f} |" in text


def token_accuracy(found):
    return found["scores"]["token accuracy"]["mean"]


@pytest.mark.parametrize("folder, worth", [("made_up_translation", None), ("multi30k_translation", token_accuracy)])
def test_rows_of_translation_are_their_records(folder, worth):
    """Of multi30k the rate is that of 1e-2 or below which has the best token accuracy."""
    text = (ROOT / "docs" / "translation.md").read_text()
    names = {"l2t_dln": "L2T-DLN, online", "l2t_dln_transfer": "L2T-DLN, transfer"}
    names |= {"l2t_dlf": "L2T-DLF, online", "l2t_dlf_transfer": "L2T-DLF, transfer"}
    for method, best, found, _ in chosen(folder, worth, most=1e-2):
        score, each = found["score"], ", ".join(f"{bleu:.1f}" for bleu in found["score"]["per_seed"])
        seconds, rate = found["wall_time_s"] / 3, {0.001: "1e-3", 0.003: "3e-3", 0.01: "1e-2"}[best]
        right = 100 * found["scores"]["token accuracy"]["mean"]
        name = names.get(method, method.replace("_", " "))
        row = f"| {name} | {score['mean']:.2f} ± {score['std']:.2f} | {each} | {right:.1f} | {rate} | {seconds:.0f} |"
        assert row in text, row


def test_rows_of_metric_learning_are_their_records():
    text = (ROOT / "docs" / "metric_learning.md").read_text()
    rows = {
        "taught": {
            "l2t_dln": "L2T-DLN, online",
            "l2t_dln_transfer": "L2T-DLN, transfer",
            "margin": "margin, distance-weighted, from 0.9",
            "ala": "ALA, online",
            "ala_transfer": "ALA, transfer",
        },
        "untaught": {"l2t_dln": "mixture, nothing taught", "l2t_dln_transfer": "the same, another draw"},
        "from_other_characters": {
            "l2t_dln_transfer": "L2T-DLN, teacher from other characters",
            "ala_transfer": "ALA, policy from other characters",
        },
    }
    for name, methods in rows.items():
        record = read_record(RESULTS / "omniglot_boundary" / f"{name}.json")
        assert record["methods"].keys() == methods.keys()
        for method, words in methods.items():
            found = record["methods"][method]
            score, scores = shown(found["score"], record["metric"]).removesuffix(" %"), found["scores"]
            each = ", ".join(f"{100 * value:.1f}" for value in found["score"]["per_seed"])
            others = [f"{100 * scores[f'recall@{k}']['mean']:.1f}" for k in (10, 100)]
            assert f"| {words} | {score} | {each} | {' | '.join(others)} | {found['wall_time_s']:.0f} |" in text, words


def test_rows_of_the_teacher_of_many_lives_are_their_records():
    """Its own are of the teacher beside them, the others of the tables they are taken from."""
    folder, mnist, news = RESULTS / "many_lives", RESULTS / "replication_mnist", RESULTS / "worth_noisyag_news"
    digest = json.loads((folder / "teacher.json").read_text())["sha256"]
    assert hashlib.sha256((folder / "teacher.npz").read_bytes()).hexdigest() == digest
    own = [read_record(folder / f"{name}.json") for name in ("clean", "flips", "uniform", "news")]
    assert all(set(record["config"]["taught_by"].values()) == {digest} for record in own)
    rates = (0.03, 0.1, 0.3)
    held_out = {rate: read_record(folder / f"news_held_out_{rate}.json") for rate in rates}
    accuracy = {rate: record["methods"]["l2t_dln_transfer"]["score"]["mean"] for rate, record in held_out.items()}
    assert own[3]["config"]["settings"]["student_lr"] == max(accuracy, key=accuracy.__getitem__)
    rows = {  # name: method, where MNIST's records are, and those of the news
        "LSTM trained there, frozen": ("l2t_dln_transfer", "lstm_l2t_dln", "l2t_dln_lstm"),
        "Adam, frozen": ("l2t_dln_transfer", "adam_l2t_dln", "l2t_dln_adam"),
        "Adam, online": ("l2t_dln", "adam_l2t_dln", "l2t_dln_adam"),
        "Meta-Weight-Net": ("meta_weight_net", "meta_weight_net", "meta_weight_net"),
        "generalized cross entropy": 2 * ("generalized_cross_entropy",) + ("and_clean_generalized_cross_entropy",),
        "cross entropy": 2 * ("cross_entropy",) + ("and_clean_cross_entropy",),
    }
    expected = {"taught on many lives, frozen": [(record, "l2t_dln_transfer") for record in own]}
    for name, (method, there, here) in rows.items():
        paths = [mnist / "records" / f"mnist_mlp_{labels}{there}.json" for labels in ("", "flip240_", "uniform60_")]
        paths.append(news / "records" / f"final_noisyag_news_mlp_{here}_144.json")
        expected[name] = [(read_record(path), method) if path.exists() else None for path in paths]
    text = (ROOT / "docs" / "trained_teachers.md").read_text()
    for name, cells in expected.items():
        told = [shown(c[0]["methods"][c[1]]["score"], c[0]["metric"]).removesuffix(" %") if c else "" for c in cells]
        assert f"| {name} | {' | '.join(told)} |" in text, (name, told)
    anew = read_record(folder / "news_cross_entropy.json")
    assert anew["config"]["dataset_sha256"] == own[3]["config"]["dataset_sha256"]
    assert f"has {shown(anew['methods']['cross_entropy']['score'], anew['metric']).removesuffix(' %')} on" in text


ALL_WAYS = tuple(dict.fromkeys(way.method for way in worth.WAYS))
SIX = ("cross_entropy", "generalized_cross_entropy", "early_stopped", "meta_only", "meta_weight_net", "l2t_dln")


@pytest.mark.parametrize(
    ("folder", "preset", "methods", "rows", "lengths"),
    [
        ("worth_noisyag_news", "stable", ALL_WAYS, 12, [18, 36, 72, 144]),
        ("worth_mnist_flips", "cheap", SIX, 8, [472, 3776]),
    ],
)
def test_rows_of_what_teaching_is_worth_are_their_records(folder, preset, methods, rows, lengths):
    """table.md is what its records say, and the page has its rows of equal steps."""
    folder = RESULTS / folder
    records = {path.stem: read_record(path) for path in (folder / "records").iterdir()}
    some = next(record["config"] for name, record in records.items() if name.startswith("final"))
    rates = (0.03, 0.1, 0.3)
    given = {name: some[name] for name in ("dataset", "student", "preset", "teacher", "memory")}
    noise = Noise(**some["noise"]) if some.get("noise") else None
    config = Config(**given, methods=methods, rounds=lengths[-1], seeds=(0,), settings=PRESETS[preset], noise=noise)
    ways = worth.ways_of(config)
    best = {way.name: worth.best_rate(config, way, rates, records) for way in ways}
    text = tables.markdown(worth.table_of(worth.reached(config, ways, best, lengths, records)))
    assert text == (folder / "table.md").read_text()
    assert len(records) == rows * (len(rates) + len(lengths)) and all(
        record["environment"]["git"]["dirty"] is False for record in records.values()
    )
    steps = text.partition("## Equal steps")[2].partition("## Equal seconds")[0]
    page = (ROOT / "docs" / "worth.md").read_text()
    assert all(line in page for line in steps.splitlines() if line.startswith("|"))


def test_rows_of_cost_are_their_records():
    page = (ROOT / "docs" / "replication.md").read_text().partition("| `--set=` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[2:]]
    assert len(rows) == 6
    for name, *cells in rows:
        option = cell_name("digits_mlp_flip240_option", name.partition(":")[0], "equal_steps")
        record = read_record(RESULTS / "ablation_cost" / "records" / f"{option}.json")
        found = [record["methods"][method] for method in ("l2t_dln", "l2t_dln_transfer")]
        scores = [shown(one["score"], record["metric"]).removesuffix(" %") for one in found]
        assert cells == [*scores, f"{found[0]['wall_time_s'] / len(record['seeds']):.0f}"]


def test_rankings_are_judged():
    """Small scores are suspicious: a ranking that knows has an area of 1, one that is turned round 0."""
    wrong = np.array([True, False, True, False, False])
    scores = np.array([0.1, 0.9, 0.2, 0.5, 0.3])
    best = label_errors._row("x", scores, wrong, 1.0)
    assert best["auroc"] == best["precision"] == 1
    assert label_errors._row("x", -scores, wrong, 1.0)["auroc"] == 0
    first = label_errors._first(np.array([3, 1]), scores)
    assert np.argsort(first).tolist()[:2] == [3, 1] and np.argsort(first).tolist()[2:] == [0, 2, 4]
