"""Trained teachers where they were not trained: other data, students, noise and numbers of classes.

  python -m experiments.transfer --sources=shipped:digits_flips --datasets=mnist --data_dir=DIR
  python -m experiments.transfer --sources=runs/one,runs/other --labels=noisy --noise=uniform --noise_ratio=0.6

Every source is a shipped teacher or the directory of a run of l2t_dln (whose teachers of the same seeds are taken).
Frozen, it teaches a fresh student and a fresh DLN on every data set and student, beside cross entropy, a teacher that
is trained there, and Adam in the teacher's place; same student, batches, number of student steps and seeds. A cell that
is done is kept. Writes records/ (a JSON file a cell) and table.md to --workdir (default runs/transfer_LABELS). The test
set is read once for each seed, after its last step.
"""

import dataclasses
from pathlib import Path

from absl import flags

from experiments import _flags, _groups, _labels, _noise
from experiments._command import command, refuse, start
from l2t_jax.runs import tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.tables import Column, Record, Row, Section, Table, baseline_of, words
from l2t_jax.runs.texts import name_of
from l2t_jax.tasks import TASKS

flags.DEFINE_string("sources", "", "Trained teachers, comma separated: shipped:NAME, or directories of runs.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _groups, _noise):
    flags.adopt_module_key_flags(module)
ONLINE, FROZEN, HERE = "l2t_dln", "l2t_dln_transfer", "trained here, frozen"
Cells = dict[str, tuple[Cell, str]]  # row -> its cell, and the method's name in the record


def _prepare() -> Noise | None:
    _groups.refuse_single()
    for name in ("method", "teacher"):
        refuse(name, "what the table goes over: leave it out.")
    _flags.set_table_defaults(seeds="5", workdir=f"runs/transfer_{_labels.kind()}")
    return _labels.noise()


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table of all groups that were asked for."""
    named = sources(FLAGS.sources)
    groups = [cells(group, named) for group in _groups.groups(config)]
    asked = [cell for group in groups for cell, _ in group.values()]
    records, code = run_cells(asked, options, loader(config, options))
    tables.write(Path(options.workdir), table(groups, records), "records/")
    return code


def sources(text: str) -> dict[str, str]:
    """Read the names of trained teachers, each by a short one.

    Raises:
      UsageError: there is none, or two have one short name.
    """
    given = [source.strip() for source in text.split(",") if source.strip()]
    named = {Path(source).name.replace(":", "_"): source for source in given}
    if not given or len(named) < len(given):
        raise UsageError("--sources must name at least one trained teacher, each by another last name.")
    return named


def bases(baseline: str) -> dict[str, tuple[str, str, str]]:
    """What every source is compared with: row -> (method, teacher, the method's name in a record)."""
    return {
        words(baseline): (baseline, "lstm", baseline),
        "Adam as the teacher": (ONLINE, "adam", FROZEN),
        "trained here, online": (ONLINE, "lstm", ONLINE),
        HERE: (ONLINE, "lstm", FROZEN),
    }


def cells(group: Config, named: dict[str, str]) -> Cells:
    """What every source is compared with, then the sources."""
    where, found = group_of(group), {}
    for row, (method, teacher, name) in bases(TASKS[group.task].baseline).items():
        config = dataclasses.replace(group, methods=(method,), teacher=teacher)
        found[row] = Cell(cell_name(where, teacher, method), where, config), name
    config = dataclasses.replace(group, methods=(ONLINE,))
    for short, source in named.items():
        found[f"{source}, frozen"] = Cell(cell_name(where, "from", short), f"{where}, {source}", config, source), FROZEN
    return found


def table(groups: list[Cells], records: dict[str, Record]) -> Table:
    """A section for each data set and student, a row for each teacher."""
    some = next(iter(records.values()))
    return Table(
        title="Transfer of trained teachers",
        intro=f"{tables.measured(some)}, read once after the last step; preset {some['preset']}. Differences and p: "
        "paired two-sided t test over the same seeds.",
        sections=[section(group, records) for group in groups],
    )


def section(group: Cells, records: dict[str, Record]) -> Section:
    """The rows, each compared with the baseline and with the teacher that is trained here."""
    rows = {name: Row(name, records[cell.name], method) for name, (cell, method) in group.items()}
    record = rows[HERE].record
    baseline = words(baseline_of(record))
    columns = [
        Column("teacher", lambda row: row.name),
        tables.scores(record["metric"]["name"]),
        *tables.differences(f"less {baseline}", 0),
        *tables.differences("less trained here", 1),
        tables.STEPS,
    ]
    compared = rows[baseline].score, rows[HERE].score
    return Section(columns, [row._replace(compared=compared) for row in rows.values()], name_of(record))


main = command("transfer", fill, _prepare)

if __name__ == "__main__":
    start(main)
