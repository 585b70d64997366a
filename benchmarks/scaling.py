"""How the rounds of L2T-DLN scale: student steps a second against devices and seeds.

  python -m benchmarks.scaling
  python -m benchmarks.scaling --workload=w1 --devices=1,2 --seeds=1,5 --unroll_length=25

On a CPU the devices are simulated: they share its cores, so what shows is the cost of dividing work, not a gain. Each
layout is a program as in training: batches divided over the devices ("batch"), seeds over the devices ("seeds"), seeds
side by side on one ("vmap"), and the same rounds on one device through pmap, whose ratio to one device without it is
what pmap costs. In each repeat all programs run in turn, medians count.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.command import fail, parse
from benchmarks.workloads import WORKLOADS, Teaching, teaching
from l2t_jax.runs.environment import environment
from l2t_jax.runs.parallel import AXIS, ONE, Layout, ParallelError, check, start
from l2t_jax.runs.records import write_json
from l2t_jax.runs.training import MOST_ROUNDS, compile_rounds, some_rounds

BATCH, VALIDATION = 24, 96  # which 2, 3, 4, 6 and 8 devices can share

FLAGS = flags.FlagValues()  # not absl's global ones, which the other scripts' flags of the same names would clash with


def define_flags() -> None:
    """What the command line takes."""
    known = "; ".join(f"{name} {workload.describe}" for name, workload in WORKLOADS.items())
    flags.DEFINE_multi_enum("workload", ["w3"], list(WORKLOADS), f"{known}. Repeatable.", flag_values=FLAGS)
    flags.DEFINE_list("devices", ["1", "2", "4"], "Numbers of devices, comma separated.", flag_values=FLAGS)
    flags.DEFINE_list("seeds", ["1", "2", "4"], "Numbers of seeds, comma separated.", flag_values=FLAGS)
    flags.DEFINE_integer("unroll_length", 15, "N, student steps.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_integer(
        "rounds", 3, "Rounds of a dispatch.", lower_bound=1, upper_bound=MOST_ROUNDS, flag_values=FLAGS
    )
    flags.DEFINE_integer("repeats", 5, "Timed calls; the median counts.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_string(
        "out", None, "File of the record (JSON). Default: benchmarks/results/scaling_BACKEND.json.", flag_values=FLAGS
    )


define_flags()


def main(argv: list[str]) -> None:
    """Measure, print a table, write the record; bad input is one line and exit code 2."""
    parse(FLAGS, __doc__, argv)
    devices, seeds = _numbers("devices"), _numbers("seeds")
    layouts = layouts_of(devices, seeds)
    if uneven := [d for d in devices if BATCH % d]:
        fail(f"--devices: batches of {BATCH} do not divide over {uneven[0]}: use 1, 2, 3, 4, 6, 8, 12 or 24.")
    try:
        start(max(devices))
        for layout in layouts:
            check(layout, batch=BATCH, validation_batch=VALIDATION)
    except ParallelError as error:
        fail(str(error))
    path = Path(FLAGS.out or Path(__file__).parent / "results" / f"scaling_{jax.default_backend()}.json")
    here = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "environment": environment()}
    console, rows = Console(), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for workload in FLAGS.workload:
            rows += measure(workload, layouts, FLAGS.unroll_length, FLAGS.rounds, FLAGS.repeats)
            write_json(path, {"rows": rows, **here})
    except OSError as error:
        fail(f"--out={path}: {error}")
    console.print(table_of(rows))
    console.print(f"Record: {path}", soft_wrap=True)


def _numbers(name: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in FLAGS[name].value or []})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        fail(f"--{name} must be whole numbers of at least 1, comma separated.")
    return numbers


def layouts_of(devices: list[int], seeds: list[int]) -> list[Layout]:
    """One seed on one device first, then each way to use more."""
    more = [d for d in devices if d > 1]
    batch = [Layout(1, d, "batch") for d in more]
    spread = [Layout(1, d, "seeds") for d in more]
    return [ONE, *(Layout(k) for k in seeds if k > 1), *batch, *spread]


def measure(name: str, layouts: list[Layout], length: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each layout and one for pmap on a single device, timed in turn so that drift hits all alike."""
    calls = {label_of(layout): (_call(name, layout, length, rounds), layout.runs) for layout in layouts}
    calls["pmap of one"] = _pmap_of_one(name, length, rounds), 1
    times: dict[str, list[float]] = {label: [] for label in calls}
    for repeat in range(repeats + 1):
        for label, (call, _) in calls.items():
            begin = time.perf_counter()
            call()
            if repeat > 0:  # the first one compiles
                times[label].append(time.perf_counter() - begin)
    first = float(np.median(times[label_of(ONE)]))
    steps = 2 * length * rounds  # both unrolls of a round are kept
    return [
        {
            "workload": name,
            "unroll_length": length,
            "rounds": rounds,
            "layout": label,
            "runs": runs,
            "seconds": (seconds := float(np.median(times[label]))),
            "seconds_all": times[label],
            "student_steps_a_second": runs * steps / seconds,
            "ratio_of_throughput": runs * first / seconds,
        }
        for label, (_, runs) in calls.items()
    ]


def label_of(layout: Layout) -> str:
    """A layout in words."""
    if layout.devices == 1:
        return "one" if layout.seeds == 1 else f"{layout.seeds} seeds, vmap"
    what = "batches over" if layout.shard == "batch" else f"{layout.runs} seeds on"
    return f"{what} {layout.devices} devices"


def _teaching(name: str, length: int, rounds: int, layout: Layout) -> Teaching:
    return teaching(
        name, length, rounds, axis_name=layout.axis_name, at_once=layout.seeds, batch=BATCH, validation=VALIDATION
    )


def _call(name: str, layout: Layout, length: int, rounds: int) -> Callable[[], None]:
    """A function that goes on by some rounds."""
    t = _teaching(name, length, rounds, layout)
    program = compile_rounds(t.method, t.task, layout)
    data, dispatches = program.data(t.data), [t.dispatch(seed) for seed in range(layout.runs)]
    states = program.place([t.state(seed) for seed in range(layout.runs)])

    def call() -> None:
        nonlocal states
        states, _, done = program(states, data, dispatches)
        if done != [rounds] * layout.runs:
            fail(f"{name} became non-finite, which ends a dispatch: lower --unroll_length or --rounds.")

    return call


def _pmap_of_one(name: str, length: int, rounds: int) -> Callable[[], None]:
    t = _teaching(name, length, rounds, ONE)
    execute = jax.pmap(some_rounds(t.method, t.task), axis_name=AXIS, donate_argnums=0, devices=jax.devices()[:1])
    lead = lambda tree: jax.tree.map(lambda x: np.asarray(x)[None], tree)  # noqa: E731
    state, data, dispatch = lead(t.state(0)), jax.device_put(lead(t.data)), lead(t.dispatch(0))

    def call() -> None:
        nonlocal state
        state, metrics, _ = execute(state, data, dispatch)
        jax.device_get(metrics)

    return call


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for the eye."""
    table = Table(
        title="Rounds of L2T-DLN: throughput",
        caption="x one: student steps a second, relative to one seed on one device",
    )
    for column in ("workload", "N", "layout"):
        table.add_column(column, justify="right" if column == "N" else "left", no_wrap=True)
    for column in ("seconds", "steps/s", "x one"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = f"{row['seconds']:.3f}", f"{row['student_steps_a_second']:.0f}", f"{row['ratio_of_throughput']:.2f}"
        table.add_row(row["workload"], str(row["unroll_length"]), row["layout"], *numbers)
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
