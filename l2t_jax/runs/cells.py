"""Tables of runs: every cell is a run of its own with a record of its own, and a cell that is done is kept."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from l2t_jax.data import Dataset
from l2t_jax.runs import trained_teachers
from l2t_jax.runs.config import Config, Options, complete
from l2t_jax.runs.records import WorkdirError, read_record, write_record
from l2t_jax.runs.running import run_entries
from l2t_jax.runs.setting import build_setting, prepare
from l2t_jax.runs.texts import shown


class Cell(NamedTuple):
    """A run of a table."""

    name: str  # of its record and its directory, of `cell_name`
    label: str  # of its lines on the screen
    config: Config
    teacher_from: str | None = None  # whose frozen teachers teach


def loader(config: Config, options: Options) -> Callable[[str], Dataset]:
    """From a data set's name to its data, as the config asks for them; the last one is kept in memory."""
    return lru_cache(maxsize=1)(lambda name: prepare(dataclasses.replace(config, dataset=name), options))


def run_cells(
    cells: Iterable[Cell], options: Options, load: Callable[[str], Dataset]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Run every cell that is not done.

    Args:
      cells: in the order in which they run.
      options: of the table, whose directory is their workdir.
      load: of `loader`.
    Returns:
      the record of each cell by its name, and the exit code: 0, or 1 where a seed stopped early now.
    Raises:
      WorkdirError: a record that is there is of another run.
    """
    records, code = {}, 0
    for cell in cells:
        code |= run_cell(cell, options, load)
        records[cell.name] = read_record(record_path(Path(options.workdir), cell.name))
    return records, code


def run_cell(cell: Cell, options: Options, load: Callable[[str], Dataset]) -> int:
    """Run a cell unless its record is there; see `run_cells`. Returns the run's exit code, 0 where nothing ran."""
    root = Path(options.workdir)
    record, place = record_path(root, cell.name), root / "cells" / cell.name
    if record.exists():
        _same(record, cell.config, cell.teacher_from)
        return 0
    options = dataclasses.replace(options, workdir=str(place), resume=True, teacher_from=cell.teacher_from)
    setting, entries = build_setting(cell.config, options, load(cell.config.dataset))
    code = run_entries(setting, entries, alone=False)
    summary = read_record(place / "summary.json")
    metric = summary["metric"]
    write_record(record, summary)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)  # its record is written, so it will not be resumed
    unit = f" {metric['unit']}" if metric["unit"] else ""
    for row, method in summary["methods"].items():
        failed = f", {len(method['failed'])} seeds stopped early" if method["failed"] else ""
        print(f"{cell.label}: {row} {shown(method['score'], metric)}{unit}, {method['wall_time_s']:.0f} s{failed}")
    return code


def record_path(root: Path, name: str) -> Path:
    """Where the record of a cell is in the directory of its table."""
    return root / "records" / f"{name}.json"


def group_of(config: Config) -> str:
    """A short name of what the cells of one part of the table share."""
    noise = "" if config.noise is None else f"_{config.noise.kind}{100 * config.noise.ratio:g}"
    given = "" if config.labels is None else Path(config.labels.replace(":", "_")).stem
    tail = "" if config.imbalance == 1 else f"imbalance{config.imbalance:g}"
    clean = "and_clean" if config.train_on_clean else ""
    return cell_name(Path(config.dataset).stem, config.student + noise, given, tail, clean)


def cell_name(*parts: object) -> str:
    """A name for files and directories: the parts that are not empty, joined by underscores, without white space."""
    return "_".join("_".join(filter(None, map(str, parts))).split())


def records_in(root: Path) -> dict[str, dict[str, Any]]:
    """All records of a table's directory by the names of their cells."""
    return {path.stem: read_record(path) for path in sorted((root / "records").glob("*.json"))}


def _same(record: Path, config: Config, source: str | None) -> None:
    there = complete(read_record(record)["config"])
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    if different := [name for name, value in asked.items() if name != "rounds" and there.get(name) != value]:
        raise WorkdirError(
            f"{record} is of another run ({', '.join(different)} differ): choose another --workdir, or remove it to "
            "run the cell anew."
        )
    taught = there["taught_by"] if source else {}
    if source and any(trained_teachers.digest(source, *_method_and_seed(pair)) != sha for pair, sha in taught.items()):
        raise WorkdirError(f"{record} is of other teachers than {source} has: choose another --workdir, or remove it.")
    if config.rounds not in (None, there["rounds"]):
        raise WorkdirError(
            f"{record} is of {there['rounds']} rounds, not {config.rounds}: choose another --workdir, or remove it."
        )


def _method_and_seed(pair: str) -> tuple[str, int]:
    """Of a key of a record's "taught_by"."""
    method, _, seed = pair.partition(", seed ")
    return method, int(seed)
