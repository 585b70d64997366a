"""The comparison tables: methods x students x data sets x seeds, each cell a run with a record of its own.

  python -m experiments.compare --table=clean
  python -m experiments.compare --table=noisy --noise=flip2 --noise_ratio=0.4
  python -m experiments.compare --table=clean --datasets=mnist --data_dir=DIR --students=mlp,lenet --rounds=300
  python -m experiments.compare --table=noisy --method=l2t_dln,cross_entropy --workdir=runs/compare_noisy

Every cell has the same student, data, training batches, number of student steps and seeds. A cell that is done is kept:
after an interruption, or with more methods, give the same command and --workdir again. Writes records/ (a JSON file a
cell), table.md, table.png and plots/ to --workdir (default runs/compare_TABLE). The test set is read once for each
seed, after its last step.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags, _groups, _noise, _table_flag
from experiments._command import command, start
from experiments._flags import KINDS_OF_LABELS
from l2t_jax.losses import LOSSES
from l2t_jax.methods import method_names
from l2t_jax.runs import tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, records_in, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.published import PUBLISHED, Group
from l2t_jax.runs.records import Metrics
from l2t_jax.runs.reporting import plot_curves
from l2t_jax.runs.tables import Column, Record, Row, Score, Section, Table, baseline_of, group_of_record
from l2t_jax.runs.texts import name_of

FLAGS = flags.FLAGS
for module in (_flags, _groups, _noise, _table_flag):
    flags.adopt_module_key_flags(module)
FEATURED = (  # curves in a picture of all methods, which would be a tangle
    "cross_entropy",
    "generalized_cross_entropy",
    "l2t_dln",
    "l2t_dlf",
    "ala",
    "slf",
    "meta_weight_net",
    "l2rw",
    "mentornet",
)


def _prepare() -> Noise | None:
    """Defaults of this module where shared flags were not given, and the noise of the table."""
    _groups.refuse_single()
    chosen = _table_flag.table(KINDS_OF_LABELS, "clean")
    if _flags.given_labels() is not None:
        if FLAGS.table is not None:
            raise UsageError(f"--table={FLAGS.table} and --labels both say what labels there are: give one of them.")
        chosen = "given"
    methods = ",".join(method_names(view=LOSSES[_flags.spec().baseline]().reads))
    _flags.set_table_defaults(method=methods, seeds="5", workdir=f"runs/compare_{chosen}")
    return _noise.of_labels(chosen)


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then render the table from all records of the directory."""
    root, load, code = Path(options.workdir), loader(config, options), 0
    for group in _groups.groups(config):
        records, failed = run_cells(cells(group), options, load)
        _plot(root, group_of(group), next(iter(records.values())))
        code |= failed
    title = f"{'noisy' if config.noise and config.noise.ratio else 'given' if config.labels else 'clean'} labels"
    found = table(list(records_in(root).values()), title)
    rows = {row.name: row for section in found.sections for row in section.rows}
    tables.draw(root / "table.png", found.sections, sorted(rows, key=lambda name: _place(rows[name])), title)
    tables.write(root, found, "table.png", "records/", "plots/")
    return code


def cells(group: Config) -> list[Cell]:
    """A cell for each method."""
    where = group_of(group)
    return [Cell(cell_name(where, name), where, dataclasses.replace(group, methods=(name,))) for name in group.methods]


def table(records: list[Record], title: str) -> Table:
    """A section for each data set and student."""
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(group_of_record(record), []).append(record)
    return Table(
        title=f"Comparison, {title}",
        intro=f"{tables.measured(records[0], 'the seeds')}, read once after the last step.\n"
        f"Difference and p: against {tables.words(baseline_of(records[0]))} over the same seeds, paired two-sided t "
        "test, not corrected for the\n"
        "number of rows. Published: what a paper reports for this student and data set, on its own budget.",
        sections=[section(found) for _, found in sorted(groups.items())],
    )


def section(records: list[Record]) -> Section:
    """A row for each method of the records, which are of one data set and student."""
    some, found = records[0], {name: record for record in records for name in record["methods"]}
    base = found.get(baseline_of(some))
    columns = [
        Column("method", lambda row: row.name),
        tables.scores(some["metric"]["name"]),
        *tables.differences(),
        tables.published(lambda row: PUBLISHED.get((group_of_record(row.record), row.method))),
        Column("learned parameters", lambda row: str(_learned(row))),
        tables.STEPS,
        tables.SECONDS,
    ]
    rows = [Row(name, record, name, (_base_score(record, base),)) for name, record in found.items()]
    return Section(columns, sorted(rows, key=_place), name_of(some), _budget(some))


def _base_score(record: Record, base: Record | None) -> Score | None:
    """The baseline's score, where it is of the same seeds as a record."""
    if base is None or base["seeds"] != record["seeds"]:
        return None
    found: Score = base["methods"][baseline_of(base)]["score"]
    return found


def _budget(record: Record) -> str:
    config, settings = record["config"], record["config"]["settings"]
    wrong = f", {100 * config['wrong_labels']:.1f} % of the labels wrong, {config['meta']} clean examples apart"
    return (
        f"{record['student_parameters']} student parameters, {len(record['seeds'])} seeds, "
        f"{config['rounds']} rounds of N = {record['unroll_length']}, batch {settings['batch_size']}, "
        f"validation batch {settings['validation_batch_size']}, {_optimizer(settings)} {settings['student_lr']:g}, "
        f"preset {record['preset']}{wrong if config['noise'] else ''}."
    )


def _optimizer(settings: dict[str, Any]) -> str:
    name: str = settings.get("student_optimizer", "sgd")  # older records lack it
    return name.upper() if name == "sgd" else name


def _learned(row: Row) -> int:
    return sum(row.outcome["learned_parameters"].values())


def _place(row: Row) -> tuple[bool, bool, int, str]:
    """The baseline first, then what learns nothing, then the rest, each in the order of METHODS."""
    name, names = row.method.removesuffix("_transfer"), method_names()
    known = names.index(name) if name in names else len(names)
    return row.method != baseline_of(row.record), _learned(row) > 0, known, row.method


def _plot(root: Path, group: str, record: Record) -> None:
    """The curves of a group's methods together; where there are many, of those that are asked about first."""
    places = {name: root / "cells" / cell_name(group, name) for name in method_names()}
    places = {name: place for name, place in places.items() if place.exists()}
    few = len(places) <= len(FEATURED)
    rows, observations = (
        [
            row
            for name, place in places.items()
            for row in Metrics.read(place / file)
            if few or (name in FEATURED and row["method"] == name)
        ]
        for file in ("metrics.jsonl", "observations.jsonl")
    )
    share = record["config"]["wrong_labels"]
    plot_curves(root / "plots", rows, observations, name_of(record), prefix=f"{group}_", wrong_labels=share)


main = command("compare", fill, _prepare)

if __name__ == "__main__":
    start(main)
