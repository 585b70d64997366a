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
from typing import Any

from absl import flags

from experiments import _flags, _groups, _labels, _noise
from experiments._command import command, start
from l2t_jax.runs import cells
from l2t_jax.runs.cells import cell_name, group_of, run_cell
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.records import read_record
from l2t_jax.runs.reporting import result, tested_on
from l2t_jax.runs.tables import name_of, paired, probability, setup_of

flags.DEFINE_string("sources", "", "Trained teachers, comma separated: shipped:NAME, or directories of runs.")
FLAGS = flags.FLAGS
for module in (_labels, _flags, _groups, _noise):
    flags.adopt_module_key_flags(module)
HERE = "trained here, frozen"
BASES = {  # row: (method, teacher, its name in a record)
    "cross entropy": ("cross_entropy", "lstm", "cross_entropy"),
    "Adam as the teacher": ("l2t_dln", "adam", "l2t_dln_transfer"),
    "trained here, online": ("l2t_dln", "lstm", "l2t_dln"),
    HERE: ("l2t_dln", "lstm", "l2t_dln_transfer"),
}

Rows = dict[str, tuple[dict[str, Any], str]]  # name of a row -> its record, and the method's name in it


def main(argv: list[str]) -> None:
    """Fill the table; bad input is one line and exit code 2, a seed that stopped early exit code 1."""
    command("transfer", transfer, _prepare)


def _prepare() -> Noise | None:
    _groups.refuse_single()
    for name in ("method", "teacher"):
        if FLAGS[name].present:
            raise UsageError(f"--{name} is what the table goes over: leave it out.")
    _flags.set_defaults(seeds="5", workdir=f"runs/transfer_{FLAGS.labels}")
    return _labels.noise()


def transfer(config: Config, options: Options) -> int:
    """Run every cell that is not done, then write the table of all groups that were asked for."""
    sources = [source.strip() for source in FLAGS.sources.split(",") if source.strip()]
    names = [Path(source).name.replace(":", "_") for source in sources]
    if not sources or len(set(names)) < len(names):
        raise UsageError("--sources must name at least one trained teacher, each by another last name.")
    groups, root, code = _groups.groups(config), Path(options.workdir), 0
    load = cells.loader(config, options)
    found: dict[str, Rows] = {}
    for group in groups:
        rows: Rows = {}
        for row, (method, teacher, name) in BASES.items():
            cell = dataclasses.replace(group, methods=(method,), teacher=teacher)
            path = cell_name(group_of(cell), teacher, method)
            code |= run_cell(path, group_of(cell), cell, options, load)
            rows[row] = _record(root, path), name
        for source, short in zip(sources, names, strict=True):
            cell = dataclasses.replace(group, methods=("l2t_dln",))
            path = cell_name(group_of(group), "from", short)
            there = dataclasses.replace(options, teacher_from=source)
            code |= run_cell(path, f"{group_of(group)}, {source}", cell, there, load)
            rows[f"{source}, frozen"] = _record(root, path), "l2t_dln_transfer"
        found[name_of(setup_of(rows[HERE][0]))] = rows
    (root / "table.md").write_text(markdown(found))
    print(f"Files: {root} (table.md, records/)")
    return code


def _record(root: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = read_record(root / "records" / f"{name}.json")
    return record


def markdown(found: dict[str, Rows]) -> str:
    """The tables as text: a section for each data set and student, a row for each teacher."""
    some = next(iter(found.values()))[HERE][0]
    lines = [
        "# Transfer of trained teachers",
        "",
        f"{tested_on(some['config']).capitalize()} accuracy in %, mean ± sample standard deviation over "
        f"{len(some['seeds'])} seeds, read once after the last step; preset {some['preset']}. Differences and p: "
        "paired two-sided t test over the same seeds.",
        "",
    ]
    head = ["teacher", "accuracy", "less cross entropy", "p", "less trained here", "p", "student steps"]
    for group, rows in found.items():
        lines += [f"## {group}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        base, here = (_accuracy(*rows[name]) for name in ("cross entropy", HERE))
        for name, (record, method) in rows.items():
            accuracy, outcome = _accuracy(record, method), record["methods"][method]
            cells = [name, result(accuracy, len(outcome["failed"]), record["metric"])]
            for other in (base, here):
                cells += [_difference(accuracy, other), probability(paired(accuracy["per_seed"], other["per_seed"]))]
            lines.append(f"| {' | '.join([*cells, str(outcome['student_steps'])])} |")
        lines.append("")
    return "\n".join(lines)


def _accuracy(record: dict[str, Any], method: str) -> dict[str, Any]:
    accuracy: dict[str, Any] = record["methods"][method]["score"]
    return accuracy


def _difference(ours: dict[str, Any], other: dict[str, Any]) -> str:
    if None in (ours["mean"], other["mean"]) or ours is other:
        return ""
    return f"{100 * (ours['mean'] - other['mean']):+.2f}"


def cli() -> None:
    """Entry point."""
    start(main)


if __name__ == "__main__":
    cli()
