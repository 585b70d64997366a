"""Tables from records: rows and columns are declared, and become Markdown or a picture.

A row is a method in a record, with the scores it is compared with. A column is a head and what it says of a row.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from l2t_jax.runs import plots
from l2t_jax.runs.published import Group
from l2t_jax.runs.texts import decimals, headline, noise_of, points, result, shown

LEVEL = 0.05

Record = dict[str, Any]
Score = dict[str, Any]  # mean, std, per_seed


class Row(NamedTuple):
    """A method in a record."""

    name: str  # for readers
    record: Record
    method: str  # its name in the record
    compared: tuple[Score | None, ...] = ()  # with these scores of its section; None: not to be compared

    @property
    def outcome(self) -> dict[str, Any]:
        """What the record says of the method."""
        found: dict[str, Any] = self.record["methods"][self.method]
        return found

    @property
    def score(self) -> Score:
        """Of the method."""
        found: Score = self.outcome["score"]
        return found


class Column(NamedTuple):
    """What a table says of each row."""

    head: str
    text: Callable[[Row], str]


class Section(NamedTuple):
    """Rows under the same heads."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    before: str = ""  # lines above the rows
    after: str = ""


class Table(NamedTuple):
    """All that a table.md says."""

    title: str
    sections: Sequence[Section]
    intro: str = ""
    rule: str = "---"  # below each head


def markdown(table: Table) -> str:
    """A table as text."""
    blocks = [f"# {table.title}", table.intro]
    for section in table.sections:
        blocks += [f"## {section.title}" if section.title else "", section.before]
        blocks += [_lines(section, table.rule), section.after]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _lines(section: Section, rule: str) -> str:
    heads = [column.head for column in section.columns]
    rows = [[column.text(row) for column in section.columns] for row in section.rows]
    texts = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([texts[0], f"|{'|'.join([rule] * len(heads))}|", *texts[1:]])


def write(root: Path, table: Table, *others: str) -> None:
    """Write table.md, and say so with the other files of the directory."""
    (root / "table.md").write_text(markdown(table))
    print(f"Files: {root} ({', '.join(['table.md', *others])})")


def draw(path: Path, sections: Sequence[Section], names: Iterable[str], title: str) -> None:
    """Draw the scores, shaded where a test tells them from what they are compared with.

    Args:
      path: the picture.
      sections: the columns.
      names: the rows, in order.
      title: above it.
    """
    cells: list[list[str]] = []
    shades: list[list[bool | None]] = []
    for name in names:
        found = [next((row for row in section.rows if row.name == name), None) for section in sections]
        cells.append([name, *("" if row is None else shown(row.score, row.record["metric"]) for row in found)])
        shades.append([None, *(None if row is None else better(row) for row in found)])
    record = sections[0].rows[0].record
    baseline = words(baseline_of(record))
    plots.table(
        path,
        [headline(record), *(section.title for section in sections)],
        cells,
        shades,
        title=f"{title}: mean ± std over seeds\nshaded: not {baseline}'s (paired t test, p < {LEVEL})",
    )


# What columns say.


def scores(head: str, method: str | None = None) -> Column:
    """The score of the row's method, or of another one of its record."""

    def text(row: Row) -> str:
        outcome = row.record["methods"][method or row.method]
        return result(outcome["score"], len(outcome["failed"]), row.record["metric"])

    return Column(head, text)


def differences(head: str = "difference", which: int = 0) -> tuple[Column, Column]:
    """The difference from a score that rows are compared with, and the p value of it."""

    def apart(row: Row) -> str:
        found = difference(row, which)
        return "" if found is None else f"{found:+.{decimals(row.record['metric'])}f}"

    return Column(head, apart), Column("p", lambda row: probability(p_value(row, which)))


def published(value: Callable[[Row], float | None], form: str = "g") -> Column:
    """What a paper reports, in the form of numbers that is given."""

    def text(row: Row) -> str:
        found = value(row)
        return "" if found is None else f"{found:{form}}"

    return Column("published", text)


STEPS = Column("student steps", lambda row: str(row.outcome["student_steps"]))
SECONDS = Column("s a seed", lambda row: f"{row.outcome['wall_time_s'] / len(row.score['per_seed']):.0f}")


def written(value: Any) -> str:
    """The value of a setting, as flags have it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def measured(record: Record, seeds: str | None = None) -> str:
    """How tables begin: what a score is. Seeds: how many there are in other words than their number."""
    what = headline(record, " in ")
    over = seeds or f"{len(record['seeds'])} seeds"
    return f"{what[0].upper()}{what[1:]}, mean ± sample standard deviation over {over}"


# What rows are compared with, and how.


def baseline_of(record: Record) -> str:
    """The method that the others are compared with."""
    name: str = record["baseline"]
    return name


def words(name: str) -> str:
    """A name of methods or settings, for readers."""
    return name.replace("_", " ")


def difference(row: Row, which: int = 0) -> float | None:
    """Of the row's mean from the mean of a score it is compared with, in points; None where there is none."""
    other = row.compared[which]
    if other is None or other is row.score or None in (row.score["mean"], other["mean"]):
        return None
    return points(row.record["metric"]) * float(row.score["mean"] - other["mean"])


def p_value(row: Row, which: int = 0) -> float | None:
    """Of the paired test against a score that the row is compared with; None where there is none."""
    other = row.compared[which]
    return None if other is None else paired(row.score["per_seed"], other["per_seed"])


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


def better(row: Row) -> bool | None:
    """Whether a row is better (True) or worse than what it is compared with first; None where the test cannot say."""
    apart, p = difference(row), p_value(row)
    if apart is None or p is None or p >= LEVEL:
        return None
    return (apart > 0) == (row.record["metric"]["better"] == "higher")


def rank(row: Row) -> tuple[bool, float]:
    """A key to sort rows by: the best first, those without a score last."""
    mean = row.score["mean"]
    return mean is None, -worth(row.record) * (mean or 0.0)


def worth(record: Record) -> float:
    """By how much a score is multiplied to be in points of which more are better."""
    return points(record["metric"]) * (1 if record["metric"]["better"] == "higher" else -1)


# What a record was measured on.


def group_of_record(record: Record) -> Group:
    """What a record was measured on; `texts.name_of` is the same for readers."""
    config = record["config"]
    return Group(record["dataset"], record["student"], noise_of(config), config.get("imbalance", 1.0))
