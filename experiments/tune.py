"""Choose settings without the test set: every combination of a grid, judged on training examples that are held out.

  python -m experiments.tune --method=cross_entropy --grid="student_lr=0.03,0.1,0.3;student_schedule=constant,cosine"
  python -m experiments.tune --labels=noisy --method=l2t_dln --grid="dln_lr=1e-3,1e-2;squash=softmax,log_softmax"
  python -m experiments.tune --labels=noisy --method=l2t_dln --teacher=adam --grid="dln_lr=1e-3,1e-2" --rounds=140

The grid is of rows of the preset's sheet (l2t_jax/presets.py) and of knobs of a method (NAME.KNOB), as in --set.
--held_out (here 0.2) of the training examples take the place of the test set, which is not read. A combination that is
done is kept: with a longer grid give the same --workdir (default runs/tune_LABELS). Writes records/, a JSON file a
combination, and table.md, the best first.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags, _labels, _noise, _settings
from experiments._command import command, start
from l2t_jax.presets import Preset
from l2t_jax.runs import tables
from l2t_jax.runs.cells import Cell, cell_name, group_of, loader, records_in, run_cells
from l2t_jax.runs.config import Config, Noise, Options, UsageError, complete
from l2t_jax.runs.tables import Column, Record, Row, Section, Table, written
from l2t_jax.runs.texts import headline, name_of

flags.DEFINE_string("grid", "", "NAME=VALUE,VALUE;NAME.KNOB=VALUE,...: as --set, all combinations.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise):
    flags.adopt_module_key_flags(module)

Grid = list[dict[str, Any]]  # settings of each combination


def _prepare() -> Noise | None:
    _flags.set_table_defaults(held_out=0.2, workdir=f"runs/tune_{_labels.kind()}")
    if not FLAGS.held_out:
        raise UsageError("--held_out=0 would choose settings on the test set: hold out a part of training.")
    return _labels.noise()


def fill(config: Config, options: Options) -> int:
    """Run every combination that is not done, then write the table of all records of the directory."""
    root = Path(options.workdir)
    _, code = run_cells(cells(config, parse_grid(FLAGS.grid)), options, loader(config, options))
    tables.write(root, table(list(records_in(root).values())), "records/")
    return code


def parse_grid(text: str) -> Grid:
    """Read `NAME=VALUE,VALUE;NAME=VALUE` as all combinations.

    Raises:
      UsageError: a name is unknown or given twice, or a value is not of its kind.
    """
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or name in axes:
            raise UsageError(f"--grid: {part!r} must be NAME=VALUE,VALUE, each name once, with ; between names.")
        found = [_settings.parse_settings("grid", f"{name}={value}") for value in values.split(",")]
        axes[name] = [settings[name] for settings in found]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cells(config: Config, grid: Grid) -> list[Cell]:
    """Each method in each combination."""
    found, where = [], group_of(config)
    for method, given in itertools.product(config.methods, grid):
        values = [f"{name}={written(value)}" for name, value in given.items()]
        name, label = cell_name(where, config.teacher, method, *values), ", ".join(values) or "as it is"
        cell = _settings.with_settings(dataclasses.replace(config, methods=(method,)), given)
        found.append(Cell(name, f"{where}, {label}", cell))
    return found


def table(records: list[Record]) -> Table:
    """A row for each record and method, the best held-out score first; columns for what differs among them."""
    names = dict.fromkeys(name for record in records for name in _values(record))  # in order, each once
    differing = [name for name in names if len({str(_values(record).get(name)) for record in records}) > 1]
    columns = [
        Column("data", lambda row: name_of(row.record)),
        Column("method", lambda row: row.name),
        *map(_column, differing),
        tables.scores(headline(records[0])),
    ]
    rows = [Row(method, record, method) for record in records for method in record["methods"]]
    section = Section(columns, sorted(rows, key=tables.rank))
    return Table("Settings, judged on held-out training examples", [section], rule=" --- ")


def _column(setting: str) -> Column:
    return Column(setting, lambda row: written(_values(row.record).get(setting, "")))


def _values(record: Record) -> dict[str, Any]:
    config = complete(record["config"])
    rest = {"teacher": config["teacher"], "rounds": config["rounds"], **config["student_knobs"], **config["knobs"]}
    return {**{field.name: config["settings"][field.name] for field in dataclasses.fields(Preset)}, **rest}


main = command("tune", fill, _prepare)

if __name__ == "__main__":
    start(main)
