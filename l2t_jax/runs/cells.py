"""Tables of runs: every cell is a run of its own with a record of its own, and a cell that is done is kept."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from l2t_jax.data import Dataset
from l2t_jax.presets import Preset
from l2t_jax.runs import trained_teachers
from l2t_jax.runs.config import Config, Options
from l2t_jax.runs.records import WorkdirError, read_record, write_record
from l2t_jax.runs.reporting import shown
from l2t_jax.runs.running import run_entries
from l2t_jax.runs.setting import build_setting, prepare


def loader(config: Config, options: Options) -> Callable[[str], Dataset]:
    """From a data set's name to its data, as the config asks for them; the last one is kept in memory."""
    return lru_cache(maxsize=1)(lambda name: prepare(dataclasses.replace(config, dataset=name), options))


def run_cell(name: str, label: str, config: Config, options: Options, load: Callable[[str], Dataset]) -> int:
    """Run a cell unless its record is there.

    Args:
      name: of its record and its directory, of `cell_name`.
      label: of its line on the screen.
      config: of this cell.
      options: of the table, whose directory is their workdir.
      load: of `loader`.
    Returns:
      the exit code of the run, 0 where the record was there.
    Raises:
      WorkdirError: the record that is there is of another run.
    """
    root = Path(options.workdir)
    record, cell = root / "records" / f"{name}.json", root / "cells" / name
    if record.exists():
        _same(record, config, options.teacher_from)
        return 0
    setting, entries = build_setting(
        config, dataclasses.replace(options, workdir=str(cell), resume=True), load(config.dataset)
    )
    code = run_entries(setting, entries, alone=False)
    summary = read_record(cell / "summary.json")
    metric = summary["metric"]
    write_record(record, summary)
    shutil.rmtree(cell / "checkpoints", ignore_errors=True)  # its record is written, so it will not be resumed
    for row, method in summary["methods"].items():
        failed = f", {len(method['failed'])} seeds stopped early" if method["failed"] else ""
        print(
            f"{label}: {row} {shown(method['score'], metric)} {metric['unit']}, {method['wall_time_s']:.0f} s{failed}"
        )
    return code


def group_of(config: Config) -> str:
    """A short name of what the cells of one part of the table share."""
    noise = "" if config.noise is None else f"_{config.noise.kind}{100 * config.noise.ratio:g}"
    return cell_name(config.dataset, config.student + noise)


def cell_name(*parts: object) -> str:
    """A name for files and directories: the parts that are not empty, joined by underscores, without white space."""
    return "_".join("_".join(filter(None, map(str, parts))).split())


def records_in(root: Path) -> list[dict[str, Any]]:
    """All records of a table."""
    return [read_record(path) for path in sorted((root / "records").glob("*.json"))]


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


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A record's config with what was not yet a choice when it was written, as it was then: the defaults."""
    fields = [field for field in dataclasses.fields(Config) if field.name not in config]
    made = {field.name: field.default_factory() for field in fields if callable(field.default_factory)}
    defaults = {field.name: field.default for field in fields} | made
    return defaults | config | {"settings": dataclasses.asdict(Preset()) | config["settings"]}
