"""Comparison tables from records: Markdown, and a picture. Every row is tested against cross entropy over the seeds.

Legend: S seeds.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from l2t_jax.methods import method_names
from l2t_jax.runs import plots
from l2t_jax.runs.config import Noise
from l2t_jax.runs.published import PUBLISHED, Setup
from l2t_jax.runs.reporting import headline, points, result, shown

BASELINE = "cross_entropy"
LEVEL = 0.05


class Row(NamedTuple):
    """A method in one group of the table."""

    method: str
    score: dict[str, Any]  # mean, std, per_seed
    metric: dict[str, Any]  # its name, its unit, whether higher or lower is better
    difference: float | None  # of the mean from cross entropy's, in points
    p: float | None  # of the paired test
    published: float | None  # %
    learned: int  # parameters of loss and teacher
    steps: int
    seconds: float
    failed: int


Groups = dict[Setup, list[Row]]


def paired(ours: list[float | None], baseline: list[float | None]) -> float | None:
    """The p value of the paired two-sided t test over the seeds that finished in both; None where it has no meaning.

    None: fewer than two pairs, or differences that do not vary, for which the test has no distribution.
    """
    pairs = [(a, b) for a, b in zip(ours, baseline, strict=True) if a is not None and b is not None]
    differences = [a - b for a, b in pairs]
    if len(pairs) < 2 or np.ptp(differences) < 1e-12:
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def probability(p: float | None) -> str:
    """Write a p value, or nothing where there is none."""
    return "" if p is None else "< 0.001" if p < 1e-3 else f"{p:.3f}"


def collect(records: list[dict[str, Any]]) -> Groups:
    """The rows of every group, in the order of the methods' names in the records."""
    groups: dict[Setup, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        rows = groups.setdefault(setup_of(record), {})
        rows |= {name: (method, record) for name, method in record["methods"].items()}
    return {setup: [_row(setup, name, rows) for name in rows] for setup, rows in sorted(groups.items())}


def setup_of(record: dict[str, Any]) -> Setup:
    """What a record was measured on."""
    noise = record["config"]["noise"]
    return Setup(record["dataset"], record["student"], "" if noise is None else _noise_name(**noise))


def _noise_name(kind: str, ratio: float, **_: Any) -> str:
    return f"{kind} {100 * ratio:g}"


def title_of(dataset: str, student: str, noise: Noise | None) -> str:
    """`name_of` the group of a config."""
    return name_of(Setup(dataset, student, "" if noise is None else _noise_name(noise.kind, noise.ratio)))


def _row(setup: Setup, name: str, rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> Row:
    method, record = rows[name]
    score, difference, p = method["score"], None, None
    base, base_record = rows.get(BASELINE, (None, None))
    if base is not None and base_record is not None and name != BASELINE and base_record["seeds"] == record["seeds"]:
        other = base["score"]
        if score["mean"] is not None and other["mean"] is not None:
            difference = points(record["metric"]) * (score["mean"] - other["mean"])
        p = paired(score["per_seed"], other["per_seed"])
    return Row(
        method=name,
        score=score,
        metric=record["metric"],
        difference=difference,
        p=p,
        published=PUBLISHED.get((setup, name)),
        learned=sum(method["learned_parameters"].values()),
        steps=method["student_steps"],
        seconds=method["wall_time_s"],
        failed=len(method["failed"]),
    )


def sorted_groups(records: list[dict[str, Any]]) -> Groups:
    """`collect`, with the rows in the order of the table."""
    return {setup: sorted(rows, key=_place) for setup, rows in collect(records).items()}


def render(root: Path, records: list[dict[str, Any]], title: str) -> None:
    """Write table.md and table.png."""
    groups = sorted_groups(records)
    (root / "table.md").write_text(markdown(groups, records, title))
    methods = sorted({row.method: row for rows in groups.values() for row in rows}.values(), key=_place)
    cells, colours = [], []
    for method in (row.method for row in methods):
        found = [next((row for row in rows if row.method == method), None) for rows in groups.values()]
        cells.append([method, *("" if row is None else shown(row.score, row.metric) for row in found)])
        colours.append([None, *(None if row is None else _sign(row) for row in found)])
    plots.table(
        root / "table.png",
        [headline(records[0]), *(name_of(setup) for setup in groups)],
        cells,
        colours,
        title=f"{title}: mean ± std over seeds\nshaded: not cross entropy's (paired t test, p < {LEVEL})",
    )


def markdown(groups: Groups, records: list[dict[str, Any]], title: str) -> str:
    """The tables as text, a section for each data set and student."""
    lines, tested = [f"# Comparison, {title}", ""], headline(records[0])
    lines += [
        f"{tested[0].upper()}{tested[1:].replace(', %', ' in %')}, "
        "mean ± sample standard deviation over the seeds, read once after the last step.",
        "Difference and p: against cross entropy over the same seeds, paired two-sided t test, not corrected for the",
        "number of rows. Published: what a paper reports for this student and data set, on its own budget.",
        "",
    ]
    for setup, rows in groups.items():
        record = next(r for r in records if setup_of(r) == setup)
        config, settings = record["config"], record["config"]["settings"]
        lines += [f"## {name_of(setup)}", ""]
        lines += [
            f"{record['student_parameters']} student parameters, {len(record['seeds'])} seeds, "
            f"{config['rounds']} rounds of N = {record['unroll_length']}, batch {settings['batch_size']}, "
            f"validation batch {settings['validation_batch_size']}, SGD {settings['student_lr']:g}, "
            f"preset {record['preset']}{_noise(record)}.",
            "",
            f"| method | {record['metric']['name']} "
            "| difference | p | published | learned parameters | student steps | s a seed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [
                row.method,
                result(row.score, row.failed, row.metric),
                "" if row.difference is None else f"{row.difference:+.2f}",
                probability(row.p),
                "" if row.published is None else f"{row.published:g}",
                str(row.learned),
                str(row.steps),
                f"{row.seconds / max(1, len(record['seeds'])):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _noise(record: dict[str, Any]) -> str:
    config = record["config"]
    if config["noise"] is None:
        return ""
    return f", {100 * config['wrong_labels']:.1f} % of the labels wrong, {config['meta']} clean examples apart"


def name_of(setup: Setup) -> str:
    """A group's name for readers."""
    return ", ".join([setup.dataset, setup.student] + ([f"{setup.noise} %"] if setup.noise else []))


def _place(row: Row) -> tuple[bool, bool, int, str]:
    """Cross entropy first, then what learns nothing, then the rest, each in the order of METHODS."""
    name = row.method.removesuffix("_transfer")
    names = method_names()
    known = names.index(name) if name in names else len(names)
    return row.method != BASELINE, row.learned > 0, known, row.method


def _sign(row: Row) -> bool | None:
    """Whether a row is better (True) or worse than cross entropy, where the test says so."""
    if row.p is None or row.p >= LEVEL or row.difference is None:
        return None
    return (row.difference > 0) == (row.metric["better"] == "higher")
