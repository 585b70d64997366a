"""Who is told of a run while it goes on: functions of the user's, and TensorBoard, which is one of them.

`on_row` is given each row of metrics.jsonl once that is on the disk, `on_summary` what summary.json holds at the end.
Which rows each was given stands in given.json, so a run that is resumed gives each the rows that it lacks.
"""

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from l2t_jax.data.files import in_a_line
from l2t_jax.runs.config import Hook, Options, UsageError
from l2t_jax.runs.records import Metrics, RunDirectory, WorkdirError, write_json


class Told(NamedTuple):
    """Who is told of a run."""

    on_row: dict[str, Hook]  # by name
    on_summary: Hook | None


def told_by(options: Options) -> Told:
    """Who is told, found before the run begins.

    Raises:
      UsageError: what is named is no function, or is not to be found.
      ImportError: tensorboardX is absent.
    """
    on_row = {"tensorboard": tensorboard(Path(options.workdir) / "tensorboard")} if options.tensorboard else {}
    if options.on_row is not None:
        on_row["on_row"] = _function("on_row", options.on_row)
    return Told(on_row, None if options.on_summary is None else _function("on_summary", options.on_summary))


class Hooks:
    """Tells who is to be told of a run. A function that raises is told no more, and the run goes on."""

    def __init__(self, told: Told, directory: RunDirectory, tell: Callable[[str], None]) -> None:
        """Take who is told, the run's directory, and what shows a line to the user.

        Raises:
          WorkdirError: given.json is damaged.
        """
        self._on_row = dict(told.on_row)
        self._on_summary = told.on_summary
        self._directory = directory
        self._tell = tell
        self._path = directory.path / "given.json"
        # hook -> "METHOD, seed SEED" -> the round of the next row
        self._given: dict[str, dict[str, int]] = _read(self._path) if self._on_row else {}
        self._failed: list[str] = []

    def catch_up(self, method: str, seed: int) -> None:
        """Give the rows in metrics.jsonl that a hook lacks: it was not there when they were written, or it raised."""
        if self._on_row:
            rows = [row for row in Metrics.read(self._directory.metrics.path) if row["seed"] == seed]
            # What JSON cannot hold was NaN.
            self.rows(
                [
                    {name: float("nan") if value is None else value for name, value in row.items()}
                    for row in rows
                    if row["method"] == method
                ]
            )

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Give rows of one method and seed, in their order, but for those that a hook was given before."""
        before = copy.deepcopy(self._given)
        try:
            for name, hook in list(self._on_row.items()):
                given = self._given.setdefault(name, {})
                for row in rows:
                    key = f"{row['method']}, seed {row['seed']}"
                    if row["round"] < given.get(key, 0):
                        continue
                    if not self._call(name, hook, row, f" at {key}, round {row['round']}"):
                        del self._on_row[name]
                        break
                    given[key] = row["round"] + 1
        finally:
            if self._given != before:
                write_json(self._path, self._given)

    def end(self) -> None:
        """Say once more which hook was told no more, and give the summary."""
        for line in self._failed:
            self._tell(line)
        if self._on_summary is not None:
            summary = json.loads((self._directory.path / "summary.json").read_text())
            self._call("on_summary", self._on_summary, summary, "")

    def _call(self, name: str, hook: Hook, given: dict[str, Any], where: str) -> bool:
        """Whether a hook took what it was given: a copy, so that it may do with it what it likes."""
        try:
            hook(dict(given))
        except Exception as error:  # somebody's own code may fail in any way, and must not take the run with it
            lost = "summary.json holds all" if name == "on_summary" else "resuming gives it the rows that it lacks"
            self._failed.append(f"{name} raised {in_a_line(error)}{where}; the run goes on without it, {lost}")
            self._tell(self._failed[-1])
            return False
        return True


def tensorboard(folder: Path) -> Hook:
    """Make the hook that writes rows to TensorBoard, each method and seed in a folder of its own.

    Raises:
      ImportError: tensorboardX is absent.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ImportError("TensorBoard logs need tensorboardX: pip install l2t_jax[tensorboard].")
    boards: dict[tuple[str, int], Any] = {}

    def on_row(row: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        run = row["method"], row["seed"]
        if run not in boards:
            where = folder / row["method"] / f"seed_{row['seed']}"
            # A killed process may have written more rows than given.json has: these are hidden.
            boards[run] = SummaryWriter(str(where), purge_step=row["round"], flush_secs=1)
        for name in set(row) - {"method", "seed", "round", "epoch", "finite"}:
            boards[run].add_scalar(name, row[name], row["round"])

    return on_row


def _function(name: str, given: str | Hook) -> Hook:
    """A hook, or the one that MODULE:FUNCTION names."""
    if not isinstance(given, str):
        return given
    cure = "give MODULE:FUNCTION, e.g. mine:log for the function log in mine.py, where Python finds it"
    module, _, function = given.partition(":")
    if not module or not function:
        raise UsageError(f"--{name}={given!r} names no function: {cure}.")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # somebody's own code may fail in any way
        raise UsageError(f"--{name}={given}: {module} cannot be imported ({in_a_line(error)}): {cure}.") from error
    if not callable(found):
        raise UsageError(f"--{name}={given}: {module} has no function {function}: {cure}.")
    hook: Hook = found
    return hook


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        given = json.loads(path.read_bytes()) if path.exists() else {}
        if not all(isinstance(rounds, dict) for rounds in given.values()):
            raise TypeError
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WorkdirError(f"{path} is damaged: delete it, and on_row is given all rows again.") from error
    return dict(given)
