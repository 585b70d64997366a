"""Choose settings without the test set: every combination of a grid, judged on training examples that are held out.

  python -m experiments.tune --method=cross_entropy --grid="student_lr=0.03,0.1,0.3;student_schedule=constant,cosine"
  python -m experiments.tune --labels=noisy --method=l2t_dln --grid="dln_lr=1e-3,1e-2;squash=softmax,log_softmax"
  python -m experiments.tune --labels=noisy --method=l2t_dln --teacher=adam --grid="dln_lr=1e-3,1e-2" --rounds=140

The grid is of rows of the preset's sheet (l2t_jax/presets.py). --held_out (here 0.2) of the training examples take
the place of the test set, which is not read. A combination that is done is kept: with a longer grid give the same
--workdir (default runs/tune_LABELS). Writes records/, a JSON file a combination, and table.md, the best first.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags, _labels, _noise
from experiments._command import command, start
from l2t_jax.presets import Preset
from l2t_jax.runs import cells
from l2t_jax.runs.cells import cell_name, group_of, records_in, run_cell
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.reporting import result
from l2t_jax.runs.tables import name_of, setup_of

flags.DEFINE_string("grid", "", "NAME=VALUE,VALUE;NAME=VALUE,...: rows of the preset's sheet, all combinations.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _noise):
    flags.adopt_module_key_flags(module)

Grid = list[dict[str, Any]]  # settings of each combination


def main(argv: list[str]) -> None:
    """Run the grid; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("tune", run_grid, _prepare)


def _prepare() -> Noise | None:
    _flags.set_defaults(held_out=0.2, workdir=f"runs/tune_{FLAGS.labels}")
    if not FLAGS.held_out:
        raise UsageError("--held_out=0 would choose settings on the test set: hold out a part of training.")
    return _labels.noise()


def run_grid(config: Config, options: Options) -> int:
    """Run every combination that is not done, then write the table of all records of the directory."""
    grid, code, root = parse_grid(FLAGS.grid), 0, Path(options.workdir)
    load = cells.loader(config, options)
    for method, given in itertools.product(config.methods, grid):
        settings = _flags.checked(dataclasses.replace(config.settings, **given))
        cell = dataclasses.replace(config, methods=(method,), settings=settings)
        label = ", ".join(f"{name}={_text(value)}" for name, value in given.items()) or "as it is"
        name = cell_name(group_of(cell), config.teacher, method, *(f"{n}={_text(v)}" for n, v in given.items()))
        code |= run_cell(name, f"{group_of(cell)}, {label}", cell, options, load)
    (root / "table.md").write_text(markdown(records_in(root)))
    print(f"Files: {root} (table.md, records/)")
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
        found = [_flags.parse_settings("grid", f"{name}={value}") for value in values.split(",")]
        axes[name] = [settings[name] for settings in found]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def markdown(records: list[dict[str, Any]]) -> str:
    """A row for each record and method, the best held-out accuracy first; columns for what differs among them."""
    configs = [cells.complete(record["config"]) for record in records]
    settings = [config["settings"] | {name: config[name] for name in ("teacher", "rounds")} for config in configs]
    names = [*(field.name for field in dataclasses.fields(Preset)), "teacher", "rounds"]
    differing = [name for name in names if len({str(s[name]) for s in settings}) > 1]
    rows = []
    for record, values in zip(records, settings, strict=True):
        for method, outcome in record["methods"].items():
            accuracy = outcome["score"]
            where = [name_of(setup_of(record)), method, *(_text(values[name]) for name in differing)]
            rows.append((accuracy["mean"] or 0.0, [*where, result(accuracy, len(outcome["failed"]), record["metric"])]))
    rows.sort(key=lambda row: -row[0])
    head = ["data", "method", *differing, "held-out accuracy, %"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(cells for _, cells in rows))]
    return "\n".join(["# Settings, judged on held-out training examples", "", *lines, ""])


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
