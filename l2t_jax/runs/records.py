"""The record of a run directory: what was asked, where it ran, and what was measured. Everything survives a kill."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from l2t_jax.runs.environment import environment
from l2t_jax.types import Metric, PyTree

_locks: dict[Path, IO[str]] = {}  # held for the life of the process, so that a crash in a notebook can be resumed there


class WorkdirError(ValueError):
    """A run directory that cannot be used for this run; one line says why and what to do."""


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as strict JSON, atomically: readers see the old file or the new one, never a part.

    Non-finite floats become null; NumPy and JAX arrays become numbers and lists. Raises TypeError for what JSON cannot
    hold.
    """
    text = json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n"
    with _replacing(path) as file:
        file.write(text.encode())


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a run (summary.json) or of a cell of a table (records/NAME.json), whenever it was written.

    A cell may name its environment, which then is in the table's environments.json. Records of before tasks had a
    headline of their own hold `test_accuracy` in place of `metric` and `score`, the knobs of students as fields of the
    config, and another name of `reset_hidden`.

    Raises:
      OSError: it is not there.
      ValueError: it is no JSON, or no record, or its environment is not to be found.
    """
    record: dict[str, Any] = json.loads(Path(path).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"{path} is a {type(record).__name__}, expected the record of a run.")
    if isinstance(key := record.get("environment"), str):
        record["environment"] = _environment_named(key, Path(path))
    record.setdefault("metric", Metric("accuracy", "%")._asdict())
    record.setdefault("baseline", "cross_entropy")
    config = record.get("config", {})
    if "width" in config:
        was = {"width": None, "shortcut": "a", "head_grid": 1}  # the defaults
        given = {name: config.pop(name, value) for name, value in was.items()}
        config["student_knobs"] = {name: value for name, value in given.items() if value != was[name]}
    if "reset_memory" in (settings := config.get("settings", {})):
        settings["reset_hidden"] = settings.pop("reset_memory")
    for method in record.get("methods", {}).values():
        if "test_accuracy" in method:
            method["score"] = method.pop("test_accuracy")
    return record


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write the record of a cell, TABLE/records/NAME.json; its environment is kept once, in TABLE/environments.json.

    Raises:
      WorkdirError: environments.json is damaged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _environments_file(path)
    text = json.dumps(record["environment"], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    with file.with_name(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may fill other cells of the same table
        there = _environments(file)
        if key not in there:
            write_json(file, there | {key: record["environment"]})
    write_json(path, record | {"environment": key})  # last: what it names is on the disk


def save_arrays(path: str | Path, tree: PyTree) -> None:
    """Write a pytree of arrays as .npz, atomically, under keys like `params/dense/kernel`.

    Typed PRNG keys are stored as their data; dtypes unknown to NumPy (bfloat16) as float32, which holds them exactly.
    Raises ValueError where two leaves would have the same key.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(where, simple=True, separator="/"): _storable(leaf) for where, leaf in leaves}
    if len(arrays) < len(leaves):
        raise ValueError("Two leaves of the tree have the same path once joined by '/': rename one of them.")
    # Not np.savez: it takes the names as keywords, and a leaf may be called `file`.
    with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote: {"params/dense/kernel": array, ...}."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


class Metrics:
    """An append-only file of one JSON object per line. Only lines that end in a newline count."""

    def __init__(self, path: str | Path) -> None:
        """Name the file; it is made by the first `append`."""
        self.path = Path(path)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add `rows`; they are on the disk when this returns. A torn last line is dropped first."""
        text = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab+") as file:
            _drop_torn_line(file)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the rows for which `keep(row)` is true, atomically, and drop a torn last line."""
        if self.path.exists():
            rows = [row for row in self.read(self.path) if keep(row)]
            with _replacing(self.path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def sort(self, key: Callable[[dict[str, Any]], Any]) -> None:
        """Put the rows in the order of `key(row)`, atomically; rows that are in order already stay untouched."""
        rows = self.read(self.path)
        if (ordered := sorted(rows, key=key)) != rows:
            with _replacing(self.path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in ordered).encode())

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All rows of a file, none if it is absent. Raises ValueError, with the line, where one is not JSON."""
        if not Path(path).exists():
            return []
        rows = []
        for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: repair or delete that line.") from error
        return rows


class RunDirectory:
    """Where a run keeps its record: config.json, metrics.jsonl, observations.jsonl and folders beside them."""

    def __init__(self, path: str | Path) -> None:
        """Name the directory; `open_run` checks and locks it."""
        self.path = Path(path)
        self.news: tuple[str, ...] = ()  # how `open_run` let it grow, for the user
        self.config_path = self.path / "config.json"
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self.observations = Metrics(self.path / "observations.jsonl")  # of examples with wrong labels
        self.plots_dir = self.path / "plots"
        self.snapshots_dir = self.path / "snapshots"

    def checkpoints_dir(self, name: str, seed: int) -> Path:
        """Where the checkpoints of one seed of the run or method `name` are."""
        return self.path / "checkpoints" / name / f"seed_{seed}"

    def close(self) -> None:
        """Give the directory free for other processes; the end of this one does it too."""
        if lock := _locks.pop(self.path.resolve(), None):
            lock.close()


class Growth(NamedTuple):
    """How a run that goes on may become another one, see `l2t_jax.runs.growth`."""

    config: dict[str, Any]  # the one that is there, with what may change as it is asked for
    was: dict[str, Any]  # of what changes, for the record: the fields as they were
    refusal: str | None  # why it may not, in words that follow the name of the directory
    news: tuple[str, ...]  # what is new, for the user


def unchanged(there: dict[str, Any], asked: dict[str, Any]) -> Growth:
    """Nothing may change."""
    return Growth(there, {}, None, ())


def open_run(
    path: str | Path,
    config: dict[str, Any],
    resume: bool,
    command: str | None = None,
    grow: Callable[[dict[str, Any], dict[str, Any]], Growth] = unchanged,
) -> RunDirectory:
    """Make or reopen the directory of a run, lock it for this process, and record `config` and the environment there.

    A fresh run writes {"config", "environment", "command"}; each resumption adds to the list "resumed". Where the run
    grows, "config" becomes the one that is asked for, and "was" in that list keeps what changed. `resume` on a
    directory without a run starts one.

    Args:
      path: the directory.
      config: whatever decides a result.
      resume: whether a run that is there goes on.
      command: for the record; None: that of the process.
      grow: (the config there, the config asked for) -> what may change; by default nothing.
    Raises:
      WorkdirError: the directory cannot be written, is in use by another process, or holds a run that is not this one
        and cannot become it, or is this one and `resume` is false.
    """
    if "\0" in str(path):
        raise WorkdirError(f"{str(path)!r} is no name of a directory: choose another --workdir.")
    run = RunDirectory(path)
    held = run.path.resolve() in _locks
    _lock(run.path)
    try:
        admitted = _admit(run, json.loads(json.dumps(_plain(config))), resume, grow)
        here = {"environment": environment(), "command": command or shlex.join(["python", *sys.orig_argv[1:]])}
        if admitted is None:
            write_json(run.config_path, {"config": config, **here})
        else:
            record, growth = admitted
            here |= {"was": growth.was} if growth.was else {}
            # In one write: whatever a run left before it or leaves after it, the same command goes on from there.
            write_json(run.config_path, {**record, "config": config, "resumed": [*record.get("resumed", []), here]})
            run.news = growth.news
    except BaseException:
        if not held:
            run.close()
        raise
    return run


def _plain(obj: Any) -> Any:
    """`obj` in terms of what strict JSON has."""
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(obj).tolist())
    raise TypeError(
        f"A {type(obj).__name__} cannot be written as JSON: give numbers, strings, lists and dicts of them."
    )


def _environments_file(record: Path) -> Path:
    return record.absolute().parents[1] / "environments.json"


def _environments(file: Path) -> dict[str, Any]:
    """The environments of a table by their keys, none where there is no file."""
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_bytes())
        if not isinstance(known, dict):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise WorkdirError(f"{file} is damaged: restore it.") from error
    return known


def _environment_named(key: str, record: Path) -> Any:
    file = _environments_file(record)
    known = _environments(file)
    if key not in known:
        raise WorkdirError(f"{record} was run in environment {key}, which is not in {file}: restore that file.")
    return known[key]


def _storable(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path`, on the disk, once it was written without an error."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _drop_torn_line(file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _lock(path: Path) -> None:
    """Make the directory and lock it. Writing into the lock shows at once whether the directory can be written."""
    if path.resolve() in _locks:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        owner = _owner(file)
        file.close()
        if isinstance(error, BlockingIOError):
            raise WorkdirError(
                f"{path} is in use by process {owner}: wait for it, or choose another --workdir."
            ) from None
        raise _unwritable(path, error) from error
    _locks[path.resolve()] = file


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"


def _unwritable(path: Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"{path} cannot be used as a run directory ({error.strerror}): choose another --workdir.")


def _admit(
    run: RunDirectory, config: Any, resume: bool, grow: Callable[[dict[str, Any], dict[str, Any]], Growth]
) -> tuple[dict[str, Any], Growth] | None:
    """The record of the run to go on with and how it grows, None where a fresh one may start; WorkdirError else."""
    if not run.config_path.exists():
        if run.metrics.path.exists() or (run.path / "checkpoints").exists():
            raise WorkdirError(f"{run.path} holds a run without its config.json: choose another --workdir.")
        return None
    record = _read_record(run.config_path)
    growth = grow(record["config"], config)
    if different := list(_differences(growth.config, config)):
        raise WorkdirError(f"{run.path} holds another run ({'; '.join(different)}): choose another --workdir.")
    if growth.refusal is not None:
        raise WorkdirError(f"{run.path} {growth.refusal}")
    if not resume:
        asked = f" (asked: {', '.join(growth.news)})" if growth.news else ""
        raise WorkdirError(
            f"{run.path} holds this run already{asked}: pass --resume to go on with it, or choose another --workdir."
        )
    return record, growth


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record["config"], dict):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkdirError(f"{path} is damaged: restore it, or choose another --workdir.") from error
    return record


def _differences(there: Any, asked: Any, field: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in sorted(there.keys() | asked.keys()):
            inner = f"{field}.{name}" if field else name
            if name not in there or name not in asked:
                yield f"{inner}: there {_brief(there, name)}, asked {_brief(asked, name)}"
            else:
                yield from _differences(there[name], asked[name], inner)
    elif json.dumps(there) != json.dumps(asked):
        yield f"{field}: there {json.dumps(there)[:80]}, asked {json.dumps(asked)[:80]}"


def _brief(config: dict[str, Any], name: str) -> str:
    return json.dumps(config[name])[:80] if name in config else "absent"
