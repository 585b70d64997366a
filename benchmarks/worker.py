"""One program of the benchmark in a process of its own: other libraries, other patches, and a memory of its own.

  python -m benchmarks.worker --program="torch RMD" --workload=w3 --arrays=ARRAYS.npz --result=RESULT.npz
  python -m benchmarks.worker --list

It prints a line of JSON when the program is built and was called once (that result is saved), then one for each line it
reads, after one timed call each; it ends with its input. `Worker` is the other end. Like `benchmarks.peers` this needs
no JAX, so that it runs where only PyTorch is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest.mock import patch

import numpy as np

from benchmarks import peers

ROOT = Path(__file__).parents[1]
Arrays = dict[str, np.ndarray]


class Built(NamedTuple):
    """A program that is ready to be called."""

    call: Callable[[], Arrays]
    temporary_mib: float | None  # the compiler's figure, where there is a compiler


def main(argv: list[str] | None = None) -> None:
    """Build, call once, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="Say as JSON what each program lacks, null for nothing.")
    parser.add_argument("--program", choices=list(PROGRAMS), help="What to run.")
    parser.add_argument("--workload", choices=list(peers.FLATTENED), help="The student.")
    parser.add_argument("--arrays", help="The .npz with all it starts from, as `peers.build` wants it.")
    parser.add_argument("--result", help="The .npz for the result of the first call.")
    options = parser.parse_args(argv)
    if options.list:
        print(json.dumps({name: missing(name) for name in PROGRAMS}))
        return
    if lacking := missing(options.program):
        sys.exit(lacking)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    _spare_the_others()
    with np.load(options.arrays) as archive:
        arrays = dict(archive)
    libraries = _import(options.program)
    begin = time.perf_counter()
    built = PROGRAMS[options.program](options.workload, arrays)
    compiled = time.perf_counter()
    np.savez(options.result, allow_pickle=False, **built.call())
    ready = {
        "compile_seconds": compiled - begin,
        "first_seconds": time.perf_counter() - compiled,
        "temporary_mib": built.temporary_mib,
        "libraries": libraries,
    }
    serve(built.call, ready, sys.stdin, stdout)


def serve(call: Callable[[], Any], ready: dict[str, Any], lines: Iterable[str], out: IO[str]) -> None:
    """The protocol: `ready`, then a timed call for each line, "trim" or empty; a line of JSON each."""
    print(json.dumps(ready), file=out, flush=True)
    for line in lines:
        print(json.dumps(timed(call, trim=line.strip() == "trim")), file=out, flush=True)


def timed(call: Callable[[], Any], trim: bool) -> dict[str, float | None]:
    """Call once: its seconds, and the MiB it added to the resident set at most (None where the system does not tell).

    What free() kept for reuse hides what a call needs; `trim` gives it back to the system first. Not before every call,
    since getting it again costs time that a loop of calls does not spend.
    """
    gc.collect()
    if trim:
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS") if _reset_peak() else None
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    peak = _resident("VmHWM")
    del result
    return {"seconds": seconds, "resident_mib": None if before is None or peak is None else peak - before}


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not permitted
        return False
    return True


def _resident(field: str) -> float | None:
    """A figure of this process in MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None


def _spare_the_others() -> None:
    """Fail alone where memory does not suffice: ask for no more than is free, and be the first to be killed."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        Path("/proc/self/oom_score_adj").write_text("1000")
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def missing(program: str) -> str | None:
    """Say in one line what to install before a program can run; None if nothing is missing."""
    return None if program == "naive" else peers.missing(program)


def _import(program: str) -> str | None:
    """Import a peer's libraries, lest that is taken for their compilation; their names and versions."""
    if program == "naive":
        return None
    modules = ["torch", program] if program in peers.PACKAGES else ["torch"]
    for module in modules:
        importlib.import_module(module)
    return ", ".join(f"{peers.PACKAGES[m]} {importlib.metadata.version(peers.PACKAGES[m])}" for m in modules)


def _peer(program: str, workload: str, arrays: Arrays) -> Built:
    return Built(peers.build(program, workload, arrays), None)


def _naive(workload: str, arrays: Arrays) -> Built:
    """What one writes without this library: jax.grad through lax.scan, lax's convolution and max-pool."""
    import jax

    from benchmarks.workloads import problem
    from l2t_jax.hypergradient import hypergradient

    inner, outer, optimizer, phi, *data = problem(workload, len(arrays["batches/inputs"]))
    with plain_layers():
        compute = jax.jit(hypergradient(inner, outer, optimizer, memory="save")).lower(phi, *data).compile()
    analysis = compute.memory_analysis()

    def call() -> Arrays:
        return named(jax.block_until_ready(compute(phi, *data)).gradient)

    return Built(call, analysis.temp_size_in_bytes / 2**20 if analysis else None)


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """The students that are traced meanwhile use lax's convolution and max-pool, as flax's layers do."""
    from flax import linen as nn
    from jax import lax

    def conv(x: Any, w: Any, *, strides: int, padding: str | int, dilation: int = 1, groups: int = 1) -> Any:
        return lax.conv_general_dilated(
            x,
            w,
            (strides, strides),
            padding if isinstance(padding, str) else [(padding, padding)] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def max_pool(x: Any) -> Any:
        return nn.max_pool(x, (2, 2), (2, 2))

    # By name: in the package `l2t_jax.students` the function lenet hides the module.
    layers, lenet = (importlib.import_module(f"l2t_jax.students.{name}") for name in ("layers", "lenet"))
    with patch.object(layers, "conv2d", conv), patch.object(lenet, "max_pool", max_pool):
        yield


def named(tree: Any) -> Arrays:
    """The leaves of a pytree under the names that `save_arrays` gives them."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


PROGRAMS: dict[str, Callable[[str, Arrays], Built]] = {
    **{name: partial(_peer, name) for name in peers.PROGRAMS},
    "naive": _naive,
}


class WorkerError(RuntimeError):
    """A worker that ended before its time; one line says which, and its last words."""


class Worker:
    """A worker process, ready to be timed. Raises WorkerError when it ends."""

    def __init__(self, python: str, program: str, workload: str, arrays: Path, result: Path) -> None:
        """Start it and wait until it has called its program once; `ready` is what it said then."""
        self._program = program
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  not a pipe, which would fill and stop it
        command = [python, "-m", "benchmarks.worker", f"--program={program}", f"--workload={workload}"]
        self._process = subprocess.Popen(
            [*command, f"--arrays={arrays}", f"--result={result}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # an accelerator is the parent's
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def timed(self, trim: bool) -> dict[str, float | None]:
        """As the function `timed`, in the worker."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` will say why
            self._process.stdin.write("trim\n" if trim else "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let it end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        raise WorkerError(f"{self._program} ended with {code}: {words[-1] if words else 'no last words'}")


def lacking(python: str) -> dict[str, str | None]:
    """What each program lacks in the environment of an interpreter, as `missing` says it. Raises WorkerError."""
    command = [python, "-m", "benchmarks.worker", "--list"]
    try:
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        words = getattr(error, "stderr", "").strip().splitlines()
        raise WorkerError(f"{python} does not run benchmarks.worker: {words[-1] if words else error}") from error


if __name__ == "__main__":
    main()
