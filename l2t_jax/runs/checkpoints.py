"""Checkpoints that survive a kill, a full disk and a flipped bit. The only file that knows orbax.

  python -m l2t_jax.runs.checkpoints WORKDIR

lists every checkpoint below WORKDIR and verifies it, changing nothing, also while the run is under way.

Orbax stores the leaves under their paths. It keeps no checksums and casts dtypes silently, so a record beside them
holds dtype and shape of every leaf and a digest of all, and a step counts as good only if it agrees with both.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.types import PyTree


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written."""


class Restored(NamedTuple):
    """The newest good checkpoint; `step`, `state` and `info` are None where there was none."""

    step: int | None
    state: PyTree
    info: Any  # the dict given to `save`, after a JSON round trip
    skipped: list[str]  # one line per newer step that was no good: its directory and the reason


class Verified(NamedTuple):
    """What `verify` found of a step."""

    step: int
    info: Any  # the dict given to `save`; None where it is damaged
    damage: str | None  # in one line; None where it is good


class _UnfitError(Exception):
    """A step that is no good, and why."""


class _OtherStateError(_UnfitError):
    """A step that is no good for this `like`, and may be for another."""


class Checkpoints:
    """The checkpoints of one run: `directory`/<step>, of which the newest `keep` are kept."""

    def __init__(self, directory: str | Path, keep: int = 3, *, read_only: bool = False) -> None:
        """Open or create `directory`, and remove what a killed save left there, unless it is only to be read.

        Raises ValueError where `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least one checkpoint must be kept: give keep >= 1.")
        import orbax.checkpoint as ocp  # here, because it takes a second

        self.directory = Path(directory).absolute()
        self._ocp = ocp
        # One process of a run writes; orbax would have all of them meet at every save.
        alone = {"primary_host": jax.process_index(), "active_processes": {jax.process_index()}}
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            save_interval_steps=0 if read_only else 1,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            create=not several and not read_only,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**(alone if several else {})),
        )
        # For good, since orbax also logs from threads of its own. What matters reaches the caller as an exception.
        logging.getLogger("absl").addFilter(_not_orbax)
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """Write `state`, any pytree of arrays, and the JSON dict `info`; both are on the disk when this returns.

        Raises CheckpointError where it was not written, above all where this or a later step is there already.
        """
        leaves, info = _leaves(state), json.loads(json.dumps(info))
        arrays, descriptions = {path: _numpy(leaf) for path, leaf in leaves.items()}, _descriptions(leaves)
        record = _seal({"info": info, "leaves": descriptions, "sha256": _digest(arrays, descriptions)})
        # Orbax stores no array without elements; the record has all there is to know of one.
        arrays = {path: array for path, array in arrays.items() if array.size}
        items = {"record": self._ocp.args.JsonSave(record)}
        if arrays:  # nor a tree without arrays
            items["state"] = self._ocp.args.StandardSave(arrays)
        try:
            with _quiet():
                saved = self._manager.save(step, args=self._ocp.args.Composite(**items))
        except Exception as error:
            raise CheckpointError(f"Step {step} was not saved in {self.directory}: {_first_line(error)}.") from error
        if not saved:
            there = self._manager.latest_step()
            raise CheckpointError(
                f"Step {step} was not saved in {self.directory}: step {there} is there already; "
                "save a later step, or call restore first."
            )
        _sync(self.directory / str(step))

    def restore(self, like: PyTree) -> Restored:
        """Read the newest step that is whole and has the structure, dtypes and shapes of `like`, bit for bit.

        `like` is a state or its `jax.eval_shape`; where its leaves are NumPy arrays, so are the restored ones. Newer
        steps that are damaged or do not fit are named in `skipped` and renamed to <step>.damaged, so that they can be
        saved again. Where no step is good, `step`, `state` and `info` are None, and whole steps of another state stay
        in place, since `like` may be what is wrong. Errors of reading are never raised.
        """
        targets = {path: _target(leaf) for path, leaf in _leaves(like).items()}
        good, skipped, aside = Restored(None, None, None, []), [], []
        for step in self._steps():
            read = self._try(step, targets)
            if isinstance(read, Restored):
                good, aside = read, [newer for newer in self._steps() if newer > step]
                break
            skipped.append(f"{self.directory / str(step)}: {read}")
            if not isinstance(read, _OtherStateError):
                aside.append(step)
        for step in aside:
            self._move_aside(step)
        if good.step is None:
            return good._replace(skipped=skipped)
        leaves = [_like(good.state[path], leaf) for path, leaf in _leaves(like).items()]
        return good._replace(state=jax.tree.unflatten(jax.tree.structure(like), leaves), skipped=skipped)

    def clear(self) -> None:
        """Remove every step, so that a run begins anew."""
        for step in self._steps():
            shutil.rmtree(self.directory / str(step))
        with _quiet():
            self._manager.reload()

    def close(self) -> None:
        """Release what orbax holds; nothing can be saved or restored afterwards."""
        with _quiet():
            self._manager.close()

    def verify(self) -> list["Verified"]:
        """Read every step, newest first, and compare it with its digests; nothing is changed."""
        return [Verified(step, *self._verified(step)) for step in self._steps()]

    def _verified(self, step: int) -> tuple[Any, str | None]:
        with _quiet():
            try:
                args, record = self._ocp.args, self._record(step)
                arrays = {path: np.empty(0) for path in record["leaves"]}  # what orbax does not store has no elements
                if (self.directory / str(step) / "state").exists():
                    arrays |= self._manager.restore(step, args=args.Composite(state=args.StandardRestore())).state
                _compare_digests(arrays, record)
                return record["info"], None
            except _UnfitError as error:
                return None, str(error)
            except Exception as error:
                reason = f"it cannot be read ({_first_line(error)})"
            gc.collect()
            return None, reason

    def _steps(self) -> list[int]:
        with _quiet():
            return sorted(self._manager.all_steps(), reverse=True)

    def _try(self, step: int, targets: dict[str, "_Target"]) -> Restored | _UnfitError:
        with _quiet():
            try:
                return self._read(step, targets)
            except _UnfitError as error:
                return error
            except Exception as error:
                reason = _UnfitError(f"it cannot be read ({_first_line(error)})")
            gc.collect()  # here, since the coroutines of a failed read complain when they are collected
            return reason

    def _read(self, step: int, targets: dict[str, "_Target"]) -> Restored:
        args, record = self._ocp.args, self._record(step)
        _compare(record["leaves"], {path: target.description for path, target in targets.items()})
        arrays = {path: np.empty(target.shape, target.dtype) for path, target in targets.items()}
        filled = {path: array for path, array in arrays.items() if array.size}
        if filled:
            arrays |= self._manager.restore(step, args=args.Composite(state=args.StandardRestore(filled))).state
        _compare_digests(arrays, record)
        return Restored(step, arrays, record["info"], [])

    def _record(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        record = self._manager.restore(step, args=args.Composite(record=args.JsonRestore())).record
        if record != _seal(record):
            raise _UnfitError("its record does not have the digest it was saved with")
        return record

    def _move_aside(self, step: int) -> None:
        damaged = self.directory / f"{step}.damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        (self.directory / str(step)).rename(damaged)
        with _quiet():
            self._manager.reload()


def digest(tree: PyTree) -> str:
    """The sha256, in hex, of path, dtype, shape and bytes of every leaf, typed PRNG keys included."""
    leaves = _leaves(tree)
    return _digest({path: _numpy(leaf) for path, leaf in leaves.items()}, _descriptions(leaves))


class _Target(NamedTuple):
    """What is to be read for one leaf, and what its record must say."""

    description: str
    shape: tuple[int, ...]
    dtype: np.dtype


def _target(leaf: Any) -> _Target:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    data = data if hasattr(data, "dtype") else np.asarray(data)
    return _Target(_describe(leaf), data.shape, np.dtype(data.dtype))


def _digest(arrays: dict[str, np.ndarray], descriptions: dict[str, str]) -> str:
    result = hashlib.sha256()
    for path in sorted(descriptions):
        result.update(f"{path} {descriptions[path]}\n".encode())
        result.update(np.ascontiguousarray(arrays[path]).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def _seal(record: dict[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in record.items() if name != "seal"}
    return {**content, "seal": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{array.dtype}{list(array.shape)}"


def _descriptions(leaves: dict[str, Any]) -> dict[str, str]:
    return {path: _describe(leaf) for path, leaf in leaves.items()}


def _numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _like(data: np.ndarray, leaf: Any) -> Any:
    """`data` as the kind of array that `leaf` is: typed key, NumPy array, or JAX array spread over the same devices."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(data), impl=_key_impl(leaf))
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return data
    sharding = getattr(leaf, "sharding", None)
    many = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(data, sharding) if many else jnp.array(data)


def _key_impl(leaf: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)  # a mere shape has to be traced first
    return found[0]


def _compare(stored: dict[str, str], wanted: dict[str, str]) -> None:
    for path in sorted(stored.keys() | wanted.keys()):
        there, asked = stored.get(path, "absent"), wanted.get(path, "absent")
        if there != asked:
            raise _OtherStateError(f"it is of another state: leaf {path} is {there} there, {asked} was expected")


def _compare_digests(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    if _digest(arrays, record["leaves"]) != record["sha256"]:
        raise _UnfitError("its data do not have the digest they were saved with")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}".rstrip(": .")


def _sync(directory: Path) -> None:
    """Have the disk, not only the kernel, hold everything in `directory` and its name."""
    for name in [*directory.rglob("*"), directory, directory.parent]:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the abandoned coroutines and futures of orbax from reporting errors that were caught here."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(nothing)


def main(argv: list[str]) -> int:
    """List and verify the checkpoints below a directory; exit code 1 where one is damaged, 2 where there are none."""
    if len(argv) != 2 or argv[1].startswith("-"):
        print(
            "usage: python -m l2t_jax.runs.checkpoints WORKDIR\nLists every checkpoint below WORKDIR and verifies it."
        )
        return 0 if argv[1:] in (["--help"], ["-h"]) else 2
    root = Path(argv[1])
    directories = sorted({path.parent for path in root.rglob("*") if path.is_dir() and path.name.isdecimal()})
    aside = sorted(path for path in root.rglob("*.damaged") if path.is_dir())
    if not directories and not aside:
        print(f"error: there is no checkpoint below {root}: give the --workdir of a run.", file=sys.stderr)
        return 2
    code = 0
    for directory in directories:
        checkpoints = Checkpoints(directory, read_only=True)
        print(directory)
        for step, info, damage in checkpoints.verify():
            size = sum(path.stat().st_size for path in (directory / str(step)).rglob("*") if path.is_file())
            facts = "".join(f", {name} {value}" for name, value in (info or {}).items())
            print(f"  {step}: {'good' if damage is None else f'DAMAGED: {damage}'}, {size / 2**20:.2f} MiB{facts}")
            code |= damage is not None
        checkpoints.close()
    for path in aside:
        print(f"{path}: put aside as damaged by a resumption; it may be deleted")
    return int(code)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what reads the list may stop early, as `head` does
    sys.exit(main(sys.argv))
