"""What a hypergradient costs: time and memory against the unroll length, in each memory mode and in other libraries.

  python -m benchmarks.hypergradient_cost
  python -m benchmarks.hypergradient_cost --workload=w3 --unroll_lengths=1,5,25 --mode=mixed --peers=
  python -m benchmarks.hypergradient_cost --peers="torch RMD,higher" --peer_python=.venv/torch/bin/python

Times are medians over repeats of a prepared program. In each repeat all programs run in turn, one at a time, those of
other libraries in processes of their own; so drift, large on shared machines, hits all alike, and ratios are what to
read. Memory is the compiler's figure for temporaries, and what a call added to the resident set (RSS) of its process at
most; the latter comes short by what free() kept for reuse, some tens of MiB.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console

from benchmarks import worker
from benchmarks.command import fail, parse
from benchmarks.cost_report import exponents, plot, table_of, table_of_exponents
from benchmarks.workloads import WORKLOADS, Problem, problem
from l2t_jax.hypergradient import hypergradient
from l2t_jax.memory import MEMORY_MODES, choose, device_bytes, kept_bytes
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import load_arrays, save_arrays, write_json
from l2t_jax.unroll import plain_gradient, student_step, unroll

MODES = [mode for mode in MEMORY_MODES if mode != "auto"]
PLAIN, FIRST, TORCH = "plain steps", "torch steps", "torch create_graph"
NAIVE_LONGEST = 5  # N; on CPUs convolutions in the body of a loop are too slow for more
ENOUGH = 3  # repeats after which --seconds may end a measurement
QUIET = 0.5  # the load of a machine whose times can be trusted
FULL = 0.8  # of the device's memory; a program that would take more is left out

FLAGS = flags.FlagValues()  # not absl's global ones, which the other scripts' flags of the same names would clash with


def define_flags() -> None:
    """What the command line takes."""
    known = "; ".join(f"{name} {workload.describe}" for name, workload in WORKLOADS.items())
    flags.DEFINE_multi_enum("workload", list(WORKLOADS), list(WORKLOADS), f"{known}. Repeatable.", flag_values=FLAGS)
    lengths = ["1", "5", "10", "15", "25", "50", "75"]
    flags.DEFINE_list("unroll_lengths", lengths, "N, student steps, comma separated.", flag_values=FLAGS)
    flags.DEFINE_multi_enum(
        "mode",
        MODES,
        list(MEMORY_MODES),
        "Memory modes; repeatable. Default: all but auto, which compiles to the one that the table marks with a star.",
        flag_values=FLAGS,
    )
    flags.DEFINE_list(
        "peers",
        None,
        f"Programs to compare with, comma separated: {', '.join(worker.PROGRAMS)}. naive is this library without its "
        f"convolution, pooling and memory modes, up to N = {NAIVE_LONGEST}; the others need `pip install "
        "l2t_jax[bench]`, in this environment or in --peer_python's. --peers= compares with none. Default: all that "
        "are installed; none on an accelerator, since they run on the CPU, or with --seeds above 1.",
        flag_values=FLAGS,
    )
    flags.DEFINE_string(
        "peer_python", sys.executable, "The Python that has the libraries to compare with.", flag_values=FLAGS
    )
    flags.DEFINE_integer(
        "repeats", 5, "Timed calls of each program; the median counts.", lower_bound=1, flag_values=FLAGS
    )
    flags.DEFINE_float(
        "seconds",
        60.0,
        f"Start no further repeat of a workload and N after so long, if there were {ENOUGH}; 0 is as soon as possible.",
        lower_bound=0.0,
        flag_values=FLAGS,
    )
    flags.DEFINE_integer(
        "seeds", 1, "Run so many seeds at once (vmap), to fill an accelerator.", lower_bound=1, flag_values=FLAGS
    )
    flags.DEFINE_string(
        "out",
        None,
        "File of the record (JSON), rewritten after each workload and N. Default: "
        "benchmarks/results/hypergradient_cost_BACKEND.json.",
        flag_values=FLAGS,
    )
    flags.DEFINE_bool("plot", False, "Draw seconds against N, beside the record (.png).", flag_values=FLAGS)
    flags.DEFINE_list(
        "replot", [], "Only draw what these records (JSON, comma separated) say, beside the first.", flag_values=FLAGS
    )


define_flags()


def main(argv: list[str]) -> None:
    """Measure, print tables, write the record; bad input is one line and exit code 2."""
    lengths, python = _parse(argv)
    if FLAGS.replot:
        return _replot([Path(record) for record in FLAGS.replot])
    chosen = _peers(python)
    default = Path(__file__).parent / "results" / f"hypergradient_cost_{jax.default_backend()}.json"
    path = Path(FLAGS.out or default)
    with _or_fail(f"--out={path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    console, begin = Console(), time.perf_counter()
    if not console.is_terminal:
        console.width = 120  # a file is wide enough for the table
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    if load > QUIET:
        _complain(f"others use this machine (load {load:.1f}): all times suffer, and those of PyTorch by far the most.")
    command = shlex.join(["python", *sys.orig_argv[1:]])
    here = {"command": command, "environment": environment(), "load_before": load}
    for workload in FLAGS.workload:
        for length in lengths:
            rows += measure(
                workload, length, FLAGS.mode, FLAGS.repeats, chosen, python, seconds=FLAGS.seconds, seeds=FLAGS.seeds
            )
            with _or_fail(f"--out={path}", OSError):
                write_json(path, {"rows": rows, "exponents": exponents(rows), **here})
            console.print(f"{workload}, N = {length}: done, {time.perf_counter() - begin:.0f} s", style="dim")
    console.print(table_of(rows))
    if fitted := exponents(rows):
        console.print(table_of_exponents(fitted))
    if FLAGS.plot:
        console.print(f"Plot: {plot(rows, path.with_suffix('.png'))}")
    console.print(f"Record: {path}")


def measure(
    name: str,
    length: int,
    modes: list[str],
    repeats: int,
    peers: list[str] | tuple[()] = (),
    python: str = sys.executable,
    *,
    seconds: float = math.inf,
    seeds: int = 1,
) -> list[dict[str, Any]]:
    """One row for N plain steps, for each mode and for each peer, timed in turn so that drift hits all alike."""
    where, task = f"{name}, N = {length}", problem(name, length, seeds)
    kept, auto = _predicted(task, seeds)
    with contextlib.ExitStack() as stack:
        programs = _ours(where, task, modes, seeds)
        for mode in modes:
            if mode in programs:
                programs[mode].known["predicted_mib"] = kept[auto if mode == "auto" else mode] / 2**20
        programs |= _theirs(stack, where, name, length, task, programs, peers, python)
        calls: dict[str, list[dict[str, float | None]]] = {label: [] for label in programs}
        begin = time.perf_counter()
        for repeat in range(repeats):
            if repeat >= ENOUGH and time.perf_counter() - begin > seconds:
                break
            for label in list(programs):
                try:
                    calls[label].append(programs[label].timed(repeat == 0))
                except worker.WorkerError as error:
                    _complain(f"{where}: {error}")
                    del programs[label]
    median = {label: float(np.median([call["seconds"] for call in calls[label]])) for label in programs}
    shared = {
        "workload": name,
        "student": WORKLOADS[name].describe,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.state.params)) // seeds,
        "unroll_length": length,
        "seeds": seeds,
        "auto_mode": auto,
    }
    return [
        {
            **shared,
            "program": label,
            "seconds": median[label],
            "seconds_all": [call["seconds"] for call in calls[label]],
            "ratio_to_plain": median[label] / median[PLAIN],
            "ratio_to_torch": median[label] / median[TORCH] if TORCH in median else None,
            "resident_mib": _largest(call["resident_mib"] for call in calls[label]),
            **program.known,
        }
        for label, program in programs.items()
    ]


class Program(NamedTuple):
    """One that is ready to be timed."""

    timed: Callable[[bool], dict[str, float | None]]  # as `worker.timed`
    known: dict[str, Any]  # the columns that are known before it is timed
    result: worker.Arrays  # the hypergradient; of plain steps the student's parameters


def _known(ready: dict[str, Any], agreement: float | None) -> dict[str, Any]:
    columns = ("compile_seconds", "first_seconds", "temporary_mib", "predicted_mib", "libraries")
    return {"agreement": agreement, **{column: ready.get(column) for column in columns}}


def _ours(where: str, task: Problem, modes: list[str], seeds: int) -> dict[str, Program]:
    """N plain steps and the hypergradient in each mode, compiled and called once."""
    step = student_step(plain_gradient(task.inner), task.optimizer)
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        PLAIN: (lambda *a: unroll(step, *a)[0].params, (task.state, task.phi, task.batches))
    }
    for mode in modes:
        compute = hypergradient(task.inner, task.outer, task.optimizer, memory=mode, at_once=seeds)
        functions[mode] = (lambda *a, f=compute: f(*a).gradient), (task.phi, task.state, task.batches, task.validation)
    programs: dict[str, Program] = {}
    for label, (function, arguments) in functions.items():
        begin = time.perf_counter()
        compiled = jax.jit(jax.vmap(function) if seeds > 1 else function).lower(*arguments).compile()
        ready: dict[str, Any] = {"compile_seconds": time.perf_counter() - begin}
        if analysis := compiled.memory_analysis():
            ready["temporary_mib"] = analysis.temp_size_in_bytes / 2**20
            if analysis.temp_size_in_bytes > FULL * device_bytes():
                _complain(f"{where}: {label} is left out, since it needs {ready['temporary_mib'] / 1024:.0f} GiB.")
                continue
        begin = time.perf_counter()
        result = worker.named(jax.block_until_ready(compiled(*arguments)))
        ready["first_seconds"] = time.perf_counter() - begin
        mine = next((programs[mode].result for mode in modes if mode in programs), result)
        agreement = None if label == PLAIN else difference(result, mine)
        programs[label] = Program(_timed(compiled, arguments), _known(ready, agreement), result)
    return programs


def _timed(compiled: Any, arguments: tuple[Any, ...]) -> Callable[[bool], dict[str, float | None]]:
    def timed(trim: bool) -> dict[str, float | None]:
        found = worker.timed(lambda: jax.block_until_ready(compiled(*arguments)), trim)
        # The resident set of an accelerator's host says nothing.
        return found if jax.default_backend() == "cpu" else {**found, "resident_mib": None}

    return timed


def _theirs(
    stack: contextlib.ExitStack,
    where: str,
    name: str,
    length: int,
    task: Problem,
    ours: dict[str, Program],
    peers: list[str] | tuple[()],
    python: str,
) -> dict[str, Program]:
    """The peers in their processes, which end with the stack."""
    peers = [peer for peer in peers if peer != "naive" or length <= NAIVE_LONGEST]
    if not peers:
        return {}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    arrays, result = folder / "arrays.npz", folder / "result.npz"
    start = {"params": task.state.params, "phi": task.phi, "batches": task.batches, "validation": task.validation}
    save_arrays(arrays, start)
    programs = {}
    for peer in peers:
        try:
            process = worker.Worker(sys.executable if peer == "naive" else python, peer, name, arrays, result)
        except worker.WorkerError as error:
            _complain(f"{where}: {error}")
            continue
        stack.callback(process.close)
        found = load_arrays(result)
        mine = [program.result for label, program in ours.items() if (label == PLAIN) == (peer == FIRST)]
        agreement = difference(found, mine[0]) if mine else None
        programs[peer] = Program(process.timed, _known(process.ready, agreement), found)
    return programs


def _predicted(task: Problem, seeds: int) -> tuple[dict[str, float], str]:
    """The bytes that `kept_bytes` predicts for each mode and all seeds, and the mode that "auto" takes."""

    def one(tree: Any) -> Any:  # under vmap "auto" sees one seed
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[seeds > 1 :], x.dtype), tree)

    kept = kept_bytes(task.inner, task.optimizer, None, one(task.state), one(task.phi), one(task.batches))
    return {mode: seeds * size for mode, size in kept.items()}, choose(kept, device_bytes() / seeds)


def difference(theirs: worker.Arrays, ours: worker.Arrays) -> float:
    """The norm of the difference, relative to that of ours."""
    squares = [
        (np.sum((theirs[name] - own) ** 2, dtype=float), np.sum(own**2, dtype=float)) for name, own in ours.items()
    ]
    apart, whole = np.sum(squares, axis=0)
    return float(np.sqrt(apart / whole))


def _largest(values: Iterator[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _replot(paths: list[Path]) -> None:
    listed = ",".join(map(str, paths))
    with _or_fail(f"--replot={listed}: not only records of this benchmark", OSError, ValueError, KeyError, TypeError):
        rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
        print(f"Plot: {plot(rows, paths[0].with_suffix('.png'))}")


def _parse(argv: list[str]) -> tuple[list[int], str]:
    """Parse the command line; the unroll lengths, and the absolute path of --peer_python."""
    parse(FLAGS, __doc__, argv)
    try:
        lengths = [int(length) for length in FLAGS.unroll_lengths]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        fail("--unroll_lengths must be whole numbers of at least 1, comma separated.")
    python = shutil.which(FLAGS.peer_python)
    if python is None:
        fail(f"--peer_python={FLAGS.peer_python} is no program.")
    return lengths, os.path.abspath(python)


def _peers(python: str) -> list[str]:
    """The peers to compare with."""
    asked = FLAGS.peers
    if unknown := set(asked or ()) - set(worker.PROGRAMS):
        fail(f"--peers: {', '.join(sorted(unknown))} is unknown; known are {', '.join(worker.PROGRAMS)}.")
    if asked and FLAGS.seeds > 1:
        fail("--peers run one seed: leave --seeds at 1, or --peers out.")
    if asked == [] or FLAGS.seeds > 1 or (asked is None and jax.default_backend() != "cpu"):
        return []
    try:
        lacks = worker.lacking(python)
    except worker.WorkerError as error:
        fail(f"--peer_python: {error}")
    if asked is None:
        return [peer for peer in worker.PROGRAMS if lacks[peer] is None]
    for peer in asked:
        if line := lacks[peer]:
            fail(line)
    return asked


@contextlib.contextmanager
def _or_fail(what: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        fail(f"{what}: {error}")


def _complain(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
