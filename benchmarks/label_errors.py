"""Which labels are wrong? What the methods here say of each example, beside confident learning (cleanlab).

  python -m benchmarks.label_errors --sets=digits_flips,digits_uniform
  python -m benchmarks.label_errors --sets=mnist_flips,mnist_uniform --data_dir=DIR --seeds=3
  python -m benchmarks.label_errors --sets=cifar10_human --data_dir=DIR --human_labels=labels.npz:worse_label

Every row ranks the training examples; it is judged by the area under the ROC curve of wrong against right labels, and
by the precision among as many as there are wrong labels. Ours are said by one run of each method: `trust` is the
probability that the student gives to the label, `weight` how much of cross entropy's pull the loss lets through.
cleanlab reads the predictions of five students under cross entropy, each on the four fifths that it does not predict,
with the clean examples, for the same number of steps each; or for so many that all five take the seconds of L2T-DLN.
Needs cleanlab (pip install l2t_jax[bench]). A set and seed that is in --out is not run again.
"""

import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from sklearn.metrics import roc_auc_score

from benchmarks.command import fail, parse
from l2t_jax.data import DataError, Dataset
from l2t_jax.data.files import read_labels
from l2t_jax.data.noise import with_noise
from l2t_jax.runs.api import Result, train
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import write_json
from l2t_jax.tasks import load
from l2t_jax.tasks.own import with_labels

METHODS = ("l2t_dln", "meta_weight_net", "l2rw", "cross_entropy")
FOLDS = 5
FLAGS = flags.FlagValues()


@dataclasses.dataclass(frozen=True)
class Case:
    """A data set with wrong labels, and the budget on it. Learning rates of the student are those tuned for it."""

    dataset: str
    noise: tuple[str, float] | None  # None: people's own labels
    meta: int
    rounds: int
    student: str
    settings: dict[str, dict[str, Any]]  # of methods that are no `stable` as it is


def _tuned(rate: float, schedule: str, clip: float) -> dict[str, Any]:
    return {"student_lr": rate, "student_schedule": schedule, "student_clip": clip}


CASES = {  # rates as in experiments.replication
    "digits_flips": Case(
        "digits",
        ("flip2", 0.4),
        100,
        140,
        "mlp",
        {"cross_entropy": _tuned(0.03, "cosine", 0.3), "meta_weight_net": _tuned(0.1, "constant", 0.0)},
    ),
    "digits_uniform": Case(
        "digits",
        ("uniform", 0.6),
        100,
        140,
        "mlp",
        {"cross_entropy": _tuned(0.03, "cosine", 0.3), "meta_weight_net": _tuned(0.3, "constant", 0.3)},
    ),
    "mnist_flips": Case(
        "mnist",
        ("flip2", 0.4),
        1000,
        200,
        "mlp",
        {"cross_entropy": _tuned(0.1, "cosine", 0.0), "meta_weight_net": _tuned(0.3, "constant", 0.0)},
    ),
    "mnist_uniform": Case(
        "mnist",
        ("uniform", 0.6),
        1000,
        200,
        "mlp",
        {"cross_entropy": _tuned(0.1, "cosine", 0.0), "meta_weight_net": _tuned(0.3, "constant", 0.0)},
    ),
    "cifar10_human": Case("cifar10", None, 1000, 200, "lenet", {}),
}


def define_flags() -> None:
    """What the command line takes."""
    flags.DEFINE_list("sets", ["digits_flips"], f"Any of {', '.join(CASES)}.", flag_values=FLAGS)
    flags.DEFINE_integer("seeds", 3, "How many.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets.", flag_values=FLAGS)
    flags.DEFINE_string("human_labels", None, "FILE or FILE:NAME of people's labels of CIFAR-10.", flag_values=FLAGS)
    flags.DEFINE_integer("rounds", None, "In place of those of each set.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_string("out", "benchmarks/results/label_errors.json", "File of the record.", flag_values=FLAGS)


define_flags()


def main(argv: list[str]) -> None:
    """Measure what is not measured yet, write the record and its table."""
    parse(FLAGS, __doc__, argv)
    if unknown := [name for name in FLAGS.sets if name not in CASES]:
        fail(f"--sets={unknown[0]} is unknown; choose any of {', '.join(CASES)}.")
    out = Path(FLAGS.out)
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {(row["set"], row["seed"]) for row in record["rows"]}
    for name in FLAGS.sets:
        for seed in range(FLAGS.seeds):
            if (name, seed) in done:
                continue
            try:
                rows = measure(CASES[name], seed)
            except (DataError, ImportError) as error:
                fail(str(error))
            record["rows"] += [{"set": name, "seed": seed, **row} for row in rows]
            record |= {"command": shlex.join(["python", *sys.orig_argv[1:]]), "environment": environment()}
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, record)
            for row in rows:
                print(name, seed, *(f"{value:.4f}" if isinstance(value, float) else value for value in row.values()))
    out.with_suffix(".md").write_text(table(record["rows"]))
    print(f"Files: {out}, {out.with_suffix('.md')}")


def measure(case: Case, seed: int) -> list[dict[str, Any]]:
    """All rows of a set for a seed."""
    if FLAGS.rounds is not None:
        case = dataclasses.replace(case, rounds=FLAGS.rounds)
    dataset = noisy(case)
    kept = dataset.examples - dataset.meta
    wrong = dataset.train["labels"][:kept] != dataset.train["true"][:kept]
    rows, seconds = [], {}
    for method in METHODS:
        result = _train(case, method, dataset, seed, case.rounds)
        found, seconds[method] = result.examples, _seconds(result)
        for what, scores in (("trust", found.trust), ("weight", found.weight)):
            if scores is not None and not (method == "cross_entropy" and what == "weight"):  # that is 1 for all
                rows.append(_row(f"{method}, {what}", scores, wrong, seconds[method]))
    once = seconds["cross_entropy"] / case.rounds
    for budget, rounds in (("steps", case.rounds), ("seconds", round(seconds["l2t_dln"] / once / FOLDS))):
        rows += cross_validated(case, dataset, wrong, seed, max(1, rounds), budget)
    return rows


def noisy(case: Case) -> Dataset:
    """The data of a case, with a clean part apart."""
    dataset = load(case.dataset, FLAGS.data_dir)
    if case.noise is not None:
        return with_noise(dataset, *case.noise, case.meta, 1)
    if FLAGS.human_labels is None:
        raise DataError("--human_labels=FILE is not given: which labels did people give?")
    right = with_noise(dataset, "flip", 0.0, case.meta, 1)  # only draws the clean part
    assert right.index is not None
    given = with_labels(right, read_labels(FLAGS.human_labels))
    labels = given.train["labels"].copy()
    labels[-case.meta :] = given.train["true"][-case.meta :]
    return dataclasses.replace(given, train={**given.train, "labels": labels})


def cross_validated(
    case: Case, dataset: Dataset, wrong: np.ndarray, seed: int, rounds: int, budget: str
) -> Iterator[dict[str, Any]]:
    """What confident learning says, from the predictions of students that have not seen what they predict."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    kept = len(wrong)
    fold = np.random.default_rng((seed, 5)).permutation(kept) % FOLDS
    chances, seconds = np.zeros((kept, dataset.info.num_classes)), 0.0
    for part in range(FOLDS):
        seen = np.concatenate([np.flatnonzero(fold != part), np.arange(kept, dataset.examples)])
        result = _train(case, "cross_entropy", dataset.take(seen), seed, rounds)
        chances[fold == part] = result.probabilities(dataset.train["inputs"][:kept][fold == part])
        seconds += _seconds(result)
    given = dataset.train["labels"][:kept]
    for method in ("self_confidence", "normalized_margin"):
        scores = get_label_quality_scores(given, chances, method=method)
        yield _row(f"cleanlab, {method}, equal {budget}", scores, wrong, seconds)
        if method == "self_confidence":
            found = find_label_issues(given, chances, return_indices_ranked_by=method, n_jobs=1)
            row = _row(f"cleanlab, confident learning first, equal {budget}", _first(found, scores), wrong, seconds)
            yield row


def _first(found: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores under which what was found stands first, in its order."""
    moved = 2 + scores
    moved[found] = np.arange(len(found)) / max(1, len(found))
    return moved


def _train(case: Case, method: str, dataset: Dataset, seed: int, rounds: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        settings = case.settings.get(method, {})
        return train(
            method, dataset, student=case.student, rounds=rounds, seeds=[seed], workdir=f"{folder}/run", **settings
        )


def _seconds(result: Result) -> float:
    return float(result.summary["methods"][result.entry.name]["wall_time_s"])


def _row(name: str, scores: np.ndarray, wrong: np.ndarray, seconds: float) -> dict[str, Any]:
    """Small scores are suspicious."""
    suspects = np.argsort(scores, kind="stable")[: wrong.sum()]
    area = float(roc_auc_score(wrong, -scores))
    return {"what": name, "auroc": area, "precision": float(wrong[suspects].mean()), "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds as text, the best area first."""
    lines = ["# Which labels are wrong?", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        seeds = len({row["seed"] for row in mine})
        lines += [
            f"## {name}, {seeds} seeds",
            "",
            "| ranking | area under ROC, % | precision, % | seconds |",
            "|---|---|---|---|",
        ]
        found = []
        for what in dict.fromkeys(row["what"] for row in mine):
            of = [row for row in mine if row["what"] == what]
            areas, precisions = ([100 * row[key] for row in of] for key in ("auroc", "precision"))
            cells = [what, _spread(areas), _spread(precisions), f"{np.mean([row['seconds'] for row in of]):.0f}"]
            found.append((float(np.mean(areas)), f"| {' | '.join(cells)} |"))
        lines += [line for _, line in sorted(found, reverse=True)] + [""]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main(sys.argv)
