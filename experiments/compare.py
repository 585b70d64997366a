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

from experiments import _flags, _noise, _table_flag, _tables
from experiments._cells import group_of, loader, records_in, run_cell, set_defaults
from experiments._command import command, start
from experiments._config import Config, Noise, Options, UsageError
from experiments._methods import method_names
from experiments._noise import LABELS
from experiments._report import plot_curves
from experiments._setting import enable_compilation_cache
from experiments._table_flag import table
from l2t_jax.data import DATASETS
from l2t_jax.noise import wrong_share
from l2t_jax.records import Metrics
from l2t_jax.students import STUDENTS

flags.DEFINE_string("datasets", "digits", "One or more, comma separated; takes the place of --dataset.")
flags.DEFINE_string("students", "mlp,lenet", "One or more, comma separated; takes the place of --student.")
FLAGS = flags.FLAGS
for module in (_flags, _noise, _table_flag):
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


def main(argv: list[str]) -> None:
    """Fill the table; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("compare", fill, _prepare)


def _prepare() -> Noise | None:
    """Defaults of this module where shared flags were not given, and the noise of the table."""
    for name, instead in (("dataset", "datasets"), ("student", "students")):
        if FLAGS[name].present:
            raise UsageError(f"--{name} is one of several here: give --{instead}.")
    chosen = table(LABELS, "clean")
    set_defaults(method=",".join(method_names()), seeds="5", workdir=f"runs/compare_{chosen}")
    return _noise.of_labels(chosen)


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then render the table from all records of the directory."""
    names = {flag: _names(flag, known) for flag, known in (("datasets", DATASETS), ("students", STUDENTS))}
    load = loader(config, options)
    enable_compilation_cache()
    root, code = Path(options.workdir), 0
    groups = [dataclasses.replace(config, dataset=d, student=s) for d in names["datasets"] for s in names["students"]]
    for group in groups:
        for method in config.methods:
            cell = dataclasses.replace(group, methods=(method,))
            code |= run_cell(f"{group_of(cell)}_{method}", group_of(cell), cell, options, load)
        _plot(root, group, wrong_share(load(group.dataset)))
    _tables.render(root, records_in(root), f"{'clean' if config.noise is None else 'noisy'} labels")
    print(f"Files: {root} (table.md, table.png, records/, plots/)")
    return code


def _names(flag: str, known: Any) -> list[str]:
    text = str(FLAGS[flag].value)
    names = [_flags.known(flag, name.strip(), known) for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--{flag}={text!r} must name each once, at least one.")
    return names


def _plot(root: Path, config: Config, share: float) -> None:
    """The curves of a group's methods together; where there are many, of those that are asked about first."""
    group = group_of(config)
    cells = {name: root / "cells" / f"{group}_{name}" for name in method_names()}
    cells = {name: cell for name, cell in cells.items() if cell.exists()}
    few = len(cells) <= len(FEATURED)
    rows, observations = (
        [
            row
            for name, cell in cells.items()
            for row in Metrics.read(cell / file)
            if few or (name in FEATURED and row["method"] == name)
        ]
        for file in ("metrics.jsonl", "observations.jsonl")
    )
    what = _tables.title_of(config.dataset, config.student, config.noise)
    plot_curves(root / "plots", rows, observations, what, prefix=f"{group}_", wrong_labels=share)


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
