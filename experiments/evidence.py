"""Where does teaching pay? One table and one picture of the results that are kept, from their records.

  python -m experiments.evidence
  python -m experiments.evidence --results=DIR --workdir=DIR

A row for each data set and kind of labels: plain training, the best other method that was run beside it (named), and
L2T-DLN, online. Differences are over the same seeds, in points of the score; times are of seconds, within one table.
Reads records of --results (default: the results of this repository), writes table.md and gains.png to --workdir
(default runs/evidence).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments._command import reader, start
from l2t_jax.runs import plots, tables
from l2t_jax.runs.config import UsageError
from l2t_jax.runs.records import read_record
from l2t_jax.runs.tables import Column, Row, Section, Table, words
from l2t_jax.runs.texts import points

RESULTS = Path(__file__).parent / "results"
flags.DEFINE_string("results", None, "Folder of results. Default: that of this repository.")
flags.declare_key_flag("workdir")
FLAGS = flags.FLAGS
OURS, FROZEN = "l2t_dln", "l2t_dln_transfer"


class Place(NamedTuple):
    """Where methods were run beside each other."""

    name: str
    files: str  # patterns of its records, below the folder of results: of each method one run
    plain: str = "cross_entropy"


PLACES = (
    Place("digits, right labels", "replication_digits/records/digits_mlp_[!fu]*.json"),
    Place("MNIST, right labels", "replication_mnist/records/mnist_mlp_[!fu]*.json"),
    Place("digits, 40 % flips", "replication_digits/records/digits_mlp_flip240_*.json"),
    Place("MNIST, 40 % flips", "replication_mnist/records/mnist_mlp_flip240_*.json"),
    Place("MNIST, 40 % flips, 40 passes", "worth_mnist_flips/records/final_*_3776.json", "cross_entropy + clean"),
    Place("digits, 60 % uniform", "replication_digits/records/digits_mlp_uniform60_*.json"),
    Place("MNIST, 60 % uniform", "replication_mnist/records/mnist_mlp_uniform60_*.json"),
    Place("CIFAR-10, 40 % flips, short", "cifar10_lenet/records/*.json"),
    Place("news, people's labels", "worth_noisyag_news/records/final_*[!p]_144.json", "cross_entropy + clean"),
    Place("digits, long tail", "long_tail/records/digits_*.json"),
    Place("MNIST, long tail", "long_tail/records/mnist_*.json"),
    Place("digits, few of a class, AUCPR", "digits_aucpr/final_0.3.json digits_aucpr/final_10.0.json"),
    Place("segmentation, mIoU", "coco_voc_seg_mini_pspnet_small.json"),
    Place("detection (head), AP50", "coco_mini_yolov3_tiny.json", "sum_of_terms"),
    Place("made-up translation, BLEU", "made_up_translation/final_3e-3.json"),
    Place("multi30k, BLEU", "multi30k_translation/final_1e-2.json multi30k_translation/final_1e-2_taught.json"),
    Place("Omniglot, recall@1", "omniglot_boundary/taught.json", "margin"),
)


class Found(NamedTuple):
    """The rows of a place."""

    place: Place
    plain: Row
    best: Row | None  # of the other methods
    ours: Row


def write(results: Path, root: Path) -> Iterator[str]:
    """Write the table and the picture.

    Raises:
      UsageError: there are no records of a place.
    """
    found = [rows_of(results, place) for place in PLACES]
    root.mkdir(parents=True, exist_ok=True)
    (root / "table.md").write_text(tables.markdown(table_of(found)))
    draw(root / "gains.png", found)
    yield f"Files: {root} (table.md, gains.png)"


def rows_of(results: Path, place: Place) -> Found:
    """Plain training, the best of the others, L2T-DLN.

    Raises:
      UsageError: one of them has no record, or a method has two.
    """
    rows: dict[str, Row] = {}
    for path in (path for pattern in place.files.split() for path in sorted(results.glob(pattern))):
        record = read_record(path)
        for method in record["methods"]:
            taught = method in (OURS, FROZEN)
            clean = " + clean" if record["config"].get("train_on_clean") else ""
            if taught and record["config"]["teacher"] != "lstm":
                continue
            if method + clean in rows:
                raise UsageError(
                    f"{path} has {method}, and so has another record of the row {place.name!r}: leave one."
                )
            rows[method + clean] = Row(words(method) + clean, record, method)
    for name in (place.plain, OURS):
        if name not in rows:
            raise UsageError(f"--results={results}: {place.files} has no record of {name}, for the row {place.name!r}.")
    plain, ours = rows.pop(place.plain), rows.pop(OURS)
    rows.pop(FROZEN, None)
    best = min((row for row in rows.values() if row.score["mean"] is not None), key=tables.rank, default=None)
    compared = (plain.score, best.score if best else None)
    return Found(place, plain, best, ours._replace(compared=compared))


def table_of(found: list[Found]) -> Table:
    """A row for each place."""
    of = {id(one.ours.record): one for one in found}
    place = lambda row: of[id(row.record)]  # noqa: E731
    columns = [
        Column("where", lambda row: place(row).place.name),
        Column("seeds", lambda row: str(len(row.record["seeds"]))),
        Column("plain", lambda row: _shown(place(row).plain)),
        Column("L2T-DLN", _shown),
        *_differences(0),
        Column("best other", lambda row: f"{best.name}, {_shown(best)}" if (best := place(row).best) else ""),
        *_differences(1),
        Column("times", lambda row: f"{_seconds(row) / _seconds(place(row).plain):.0f}"),
    ]
    return Table(
        "Where does teaching pay?",
        [Section(columns, [one.ours for one in found])],
        "Mean ± sample standard deviation over seeds at equal student steps. L2T-DLN: LSTM, online. Plain: cross "
        "entropy, of the news and of forty passes trained on the clean examples as well, of detection the sum of "
        "YOLOv3's terms, of Omniglot the margin loss. What was chosen for which row is said in docs/replication.md. "
        "Best other: of all methods that were run there, by the mean, so by the same test set. Differences: "
        "L2T-DLN's, over the same seeds; p: paired two-sided t test, not corrected for the many rows. Times: its "
        "seconds in those of plain training.",
    )


def _differences(which: int) -> tuple[Column, Column]:
    """As in other tables, of all scores with two decimals."""
    apart = lambda row: tables.difference(row, which)  # noqa: E731
    head, p = tables.differences(which=which)
    return Column(head.head, lambda row: "" if apart(row) is None else f"{apart(row):+.2f}"), p


def _shown(row: Row) -> str:
    mean, std = (points(row.record["metric"]) * (row.score[of] or 0.0) for of in ("mean", "std"))
    return f"{mean:.2f} ± {std:.2f}"


def _seconds(row: Row) -> float:
    return float(row.outcome["wall_time_s"]) / len(row.score["per_seed"])


def draw(path: Path, found: list[Found]) -> None:
    """Draw what L2T-DLN and the best other method gain over plain training."""
    lines = {
        name: [(one.place.name, *_gain(row, one.plain)) for one in found if (row := getattr(one, part)) is not None]
        for name, part in (("L2T-DLN, LSTM, online", "ours"), ("the best other method", "best"))
    }
    plots.ablation(
        path,
        lines,
        xlabel="",
        ylabel="points above plain training",
        title="Gain over plain training, mean ± std over seeds",
    )


def _gain(row: Row, plain: Row) -> tuple[float, float]:
    """In points of the score, over the seeds that finished in both."""
    pairs = zip(row.score["per_seed"], plain.score["per_seed"], strict=True)
    gains = [points(row.record["metric"]) * (a - b) for a, b in pairs if a is not None and b is not None]
    return float(np.mean(gains)), float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0


main = reader(lambda: write(Path(FLAGS.results or RESULTS), Path(FLAGS.workdir or "runs/evidence")))

if __name__ == "__main__":
    start(main)
