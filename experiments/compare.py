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

from absl import flags

from experiments import _flags, _groups, _noise, _table_flag
from experiments._command import command, start
from experiments._noise import LABELS
from experiments._table_flag import table
from l2t_jax.data.noise import wrong_share
from l2t_jax.methods import method_names
from l2t_jax.runs import tables
from l2t_jax.runs.cells import cell_name, group_of, loader, records_in, run_cell
from l2t_jax.runs.config import Config, Noise, Options
from l2t_jax.runs.records import Metrics
from l2t_jax.runs.reporting import plot_curves

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


def main(argv: list[str]) -> None:
    """Fill the table; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("compare", fill, _prepare)


def _prepare() -> Noise | None:
    """Defaults of this module where shared flags were not given, and the noise of the table."""
    _groups.refuse_single()
    chosen = table(LABELS, "clean")
    _flags.set_defaults(preset="residual", method=",".join(method_names()), seeds="5", workdir=f"runs/compare_{chosen}")
    return _noise.of_labels(chosen)


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then render the table from all records of the directory."""
    groups = _groups.groups(config)
    load = loader(config, options)
    root, code = Path(options.workdir), 0
    for group in groups:
        for method in config.methods:
            cell = dataclasses.replace(group, methods=(method,))
            code |= run_cell(cell_name(group_of(cell), method), group_of(cell), cell, options, load)
        _plot(root, group, wrong_share(load(group.dataset)))
    tables.render(root, records_in(root), f"{'clean' if config.noise is None else 'noisy'} labels")
    print(f"Files: {root} (table.md, table.png, records/, plots/)")
    return code


def _plot(root: Path, config: Config, share: float) -> None:
    """The curves of a group's methods together; where there are many, of those that are asked about first."""
    group = group_of(config)
    cells = {name: root / "cells" / cell_name(group, name) for name in method_names()}
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
    what = tables.title_of(config.dataset, config.student, config.noise)
    plot_curves(root / "plots", rows, observations, what, prefix=f"{group}_", wrong_labels=share)


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
