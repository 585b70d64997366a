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
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from absl import flags

from experiments import _flags, _noise, _tables
from experiments._command import command, start
from experiments._config import Config, Noise, Options, UsageError
from experiments._methods import method_names
from experiments._report import percent, plot_curves
from experiments._run import run_entries
from experiments._setting import build_setting, enable_compilation_cache
from l2t_jax import data
from l2t_jax.data import DATASETS, Dataset
from l2t_jax.noise import wrong_share
from l2t_jax.records import Metrics, WorkdirError, write_json
from l2t_jax.students import STUDENTS

TABLES = ("clean", "noisy")

flags.DEFINE_string("table", "clean", f"{' | '.join(TABLES)}. Right labels, or wrong ones as --noise says.")
flags.DEFINE_string("datasets", "digits", "One or more, comma separated; takes the place of --dataset.")
flags.DEFINE_string("students", "mlp,lenet", "One or more, comma separated; takes the place of --student.")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(_flags)
flags.adopt_module_key_flags(_noise)
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
    if FLAGS.teacher_from is not None:
        raise UsageError("--teacher_from is for single runs: give it to experiments.classification or noisy_labels.")
    if FLAGS.coordinator is not None:
        raise UsageError("a table is filled by one process: leave --coordinator out, or run its cells one by one.")
    for name, default in (
        ("method", ",".join(method_names())),
        ("seeds", "5"),
        ("workdir", f"runs/compare_{FLAGS.table}"),
    ):
        if not FLAGS[name].present:
            setattr(FLAGS, name, default)
    return _noise.from_flags() if _flags.known("table", FLAGS.table, TABLES) == "noisy" else None


def fill(config: Config, options: Options) -> int:
    """Run every cell that is not done, then render the table from all records of the directory."""
    names = {flag: _names(flag, known) for flag, known in (("datasets", DATASETS), ("students", STUDENTS))}
    load = lru_cache(maxsize=1)(
        lambda name: _noise.with_config(data.load(name, options.data_dir, options.download), config)
    )
    enable_compilation_cache()
    root, code = Path(options.workdir), 0
    groups = [dataclasses.replace(config, dataset=d, student=s) for d in names["datasets"] for s in names["students"]]
    for group in groups:
        for method in config.methods:
            code |= _cell(dataclasses.replace(group, methods=(method,)), options, load)
        _plot(root, group, wrong_share(load(group.dataset)))
    records = [json.loads(path.read_text()) for path in sorted((root / "records").glob("*.json"))]
    _tables.render(root, records, f"{FLAGS.table} labels")
    print(f"Files: {root} (table.md, table.png, records/, plots/)")
    return code


def _cell(config: Config, options: Options, load: Callable[[str], Dataset]) -> int:
    """Run a cell unless its record is there; returns the exit code."""
    root, name = Path(options.workdir), f"{_group(config)}_{config.methods[0]}"
    record, cell = root / "records" / f"{name}.json", root / "cells" / name
    if record.exists():
        _same(record, config)
        return 0
    setting, entries = build_setting(
        config, dataclasses.replace(options, workdir=str(cell), resume=True), load(config.dataset)
    )
    code = run_entries(setting, entries, alone=False)
    summary = json.loads((cell / "summary.json").read_text())
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, summary)
    shutil.rmtree(cell / "checkpoints", ignore_errors=True)  # its record is written, so it will not be resumed
    for row, method in summary["methods"].items():
        failed = f", {len(method['failed'])} seeds stopped early" if method["failed"] else ""
        print(f"{_group(config)}: {row} {percent(method['test_accuracy'])} %, {method['wall_time_s']:.0f} s{failed}")
    return code


def _same(record: Path, config: Config) -> None:
    there = json.loads(record.read_text())["config"]
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    if different := [name for name, value in asked.items() if name != "rounds" and there.get(name) != value]:
        raise WorkdirError(
            f"{record} is of another run ({', '.join(different)} differ): choose another --workdir, or remove it to "
            "run the cell anew."
        )
    if config.rounds not in (None, there["rounds"]):
        raise WorkdirError(
            f"{record} is of {there['rounds']} rounds, not {config.rounds}: choose another --workdir, or remove it."
        )


def _group(config: Config) -> str:
    noise = "" if config.noise is None else f"_{config.noise.kind}{100 * config.noise.ratio:g}"
    return f"{config.dataset}_{config.student}{noise}"


def _names(flag: str, known: Any) -> list[str]:
    text = str(FLAGS[flag].value)
    names = [_flags.known(flag, name.strip(), known) for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--{flag}={text!r} must name each once, at least one.")
    return names


def _plot(root: Path, config: Config, share: float) -> None:
    """The curves of a group's methods together; where there are many, of those that are asked about first."""
    group = _group(config)
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
