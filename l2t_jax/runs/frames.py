"""What a run left, read back: its rows, its summary, and the rows as a table of pandas."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from l2t_jax.runs.records import Metrics, WorkdirError, read_record


class ReadRun(NamedTuple):
    """A run directory as it was read, of a run that has ended or goes on still."""

    directory: Path
    config: dict[str, Any]  # all that decides a result
    rows: list[dict[str, Any]]  # of metrics.jsonl: one a round, method and seed
    summary: dict[str, Any]  # of summary.json; {} where the run has not ended

    def to_frame(self) -> Any:
        """The rows as a DataFrame: one a method, seed and round, columns named as in metrics.jsonl.

        `finite` is whether all was finite in that round; what a method does not measure is NaN. Rows are in the order
        of the methods, then of seeds and rounds.

        Raises:
          ImportError: pandas is absent.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas.") from error
        place = {method: number for number, method in enumerate(dict.fromkeys(row["method"] for row in self.rows))}
        rows = sorted(self.rows, key=lambda row: (place[row["method"]], row["seed"], row["round"]))
        return pd.DataFrame([{name: _cell(value) for name, value in row.items()} for row in rows])


def read_run(workdir: str | Path) -> ReadRun:
    """Read a run directory: `workdir` of `train`, --workdir of a command.

    Raises:
      WorkdirError: there is no run, or a file of it is damaged; one line says which.
    """
    path = Path(workdir)
    config = path / "config.json"
    if not config.exists():
        table = f"it is of a table, whose records are in {path / 'records'}" if (path / "records").exists() else ""
        raise WorkdirError(f"{path} holds no run{table and f' ({table})'}: give the --workdir of one.")
    try:
        asked = json.loads(config.read_bytes())["config"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkdirError(f"{config} is damaged: restore it.") from error
    summary = path / "summary.json"
    try:
        return ReadRun(
            path, asked, Metrics.read(path / "metrics.jsonl"), read_record(summary) if summary.exists() else {}
        )
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{summary} is damaged: restore it.") from error
    except ValueError as error:  # which names the file and the line
        raise WorkdirError(str(error)) from error


def _cell(value: Any) -> Any:
    if isinstance(value, dict):  # stage -> whether it was finite
        return all(value.values())
    return math.nan if value is None else value
