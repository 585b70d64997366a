"""What a hypergradient costs: time and memory against the unroll length, for each memory mode.

  python -m benchmarks.hypergradient_cost
  python -m benchmarks.hypergradient_cost --workload=w3 --unroll_lengths=1,5,25 --mode=mixed

Times are medians over repeats of the compiled program, quoted as ratios to N plain student steps that are measured in
turn with them in the same process, since absolute times drift on shared machines. Memory is the compiler's own figure.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.memory import MEMORY_MODES
from l2t_jax.records import environment, write_json
from l2t_jax.students import STUDENTS
from l2t_jax.types import Batch, Student, Task
from l2t_jax.unroll import init_state, inner_objective, outer_objective, plain_gradient, student_step, unroll

BATCH, VALIDATION = 25, 100
TASK = Task(optax.softmax_cross_entropy_with_integer_labels, lambda outputs, targets: {}, lambda data, *_: data)


class Workload(NamedTuple):
    """A student and the images it sees; random pixels, since no figure depends on what they show."""

    student: Callable[..., Student]
    shape: tuple[int, int, int]
    describe: str


WORKLOADS = {
    "w1": Workload(lambda: STUDENTS["resnet8"](num_classes=10, shortcut="b"), (32, 32, 3), "ResNet-8 16-32-64"),
    "w2": Workload(lambda: STUDENTS["lenet"](num_classes=10), (28, 28, 1), "LeNet-5"),
    "w3": Workload(lambda: STUDENTS["mlp"](num_classes=10), (28, 28, 1), "MLP 784-500-10"),
}

flags.DEFINE_multi_enum("workload", list(WORKLOADS), list(WORKLOADS), "w1 ResNet-8, w2 LeNet-5, w3 MLP; repeatable.")
flags.DEFINE_list("unroll_lengths", ["1", "5", "25"], "N, student steps, comma separated.")
flags.DEFINE_multi_enum("mode", list(MEMORY_MODES), list(MEMORY_MODES), "Memory modes; repeatable.")
flags.DEFINE_integer("repeats", 5, "Timed calls of each program; the median counts.", lower_bound=1)
flags.DEFINE_string(
    "out", None, "File of the record (JSON). Default: benchmarks/results/hypergradient_cost_BACKEND.json."
)
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Measure, print a table, write the record."""
    try:
        lengths = [int(length) for length in FLAGS.unroll_lengths]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        print("error: --unroll_lengths must be whole numbers of at least 1, comma separated.", file=sys.stderr)
        sys.exit(2)
    console, rows = Console(), []
    for workload in FLAGS.workload:
        for length in lengths:
            rows += measure(workload, length, FLAGS.mode, FLAGS.repeats)
            console.print(f"{workload}, N = {length}: done", style="dim")
    console.print(table_of(rows))
    default = Path(__file__).parent / "results" / f"hypergradient_cost_{jax.default_backend()}.json"
    path = Path(FLAGS.out or default)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.orig_argv[1:]])
    write_json(path, {"rows": rows, "command": command, "environment": environment()})
    console.print(f"Record: {path}")


def measure(name: str, length: int, modes: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row for N plain steps and one for each mode, timed in turn so that drift hits all alike."""
    workload = WORKLOADS[name]
    student, loss, optimizer = workload.student(), LOSSES["dln"](), optax.sgd(0.1)
    inner, outer = inner_objective(student, loss), outer_objective(student, TASK)
    batches, validation = _images(workload, length, BATCH), _images(workload, VALIDATION)
    state = init_state(student.init(jax.random.key(0), batches.inputs[0]), optimizer)
    phi = loss.init(jax.random.key(1))
    step = student_step(plain_gradient(inner), optimizer)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "plain steps": (lambda *a: unroll(step, *a), (state, phi, batches))
    }
    for mode in modes:
        programs[mode] = hypergradient(inner, outer, optimizer, memory=mode), (phi, state, batches, validation)
    compiled = {label: _compile(*program) for label, program in programs.items()}
    times: dict[str, list[float]] = {label: [] for label in programs}
    for _ in range(repeats):
        for label, (_, arguments) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled[label][0](*arguments))
            times[label].append(time.perf_counter() - begin)
    plain = float(np.median(times["plain steps"]))
    return [
        {
            "workload": name,
            "student": workload.describe,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "unroll_length": length,
            "program": label,
            "seconds": float(np.median(times[label])),
            "seconds_all": times[label],
            "ratio_to_plain": float(np.median(times[label])) / plain,
            "temporary_mib": compiled[label][1],
            "compile_seconds": compiled[label][2],
        }
        for label in programs
    ]


def _images(workload: Workload, *lead: int) -> Batch:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((*lead, *workload.shape), dtype=np.float32)
    return Batch(jnp.asarray(inputs), jnp.asarray(random.integers(0, 10, lead), jnp.int32))


def _compile(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float, float]:
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    jax.block_until_ready(compiled(*arguments))
    analysis = compiled.memory_analysis()
    return compiled, analysis.temp_size_in_bytes / 2**20 if analysis else float("nan"), seconds


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for the eye."""
    table = Table(title="Cost of a hypergradient")
    for column in ("workload", "N", "program", "seconds", "x N plain steps", "memory, MiB", "compile, s"):
        table.add_column(column, justify="left" if column in ("workload", "program") else "right")
    for row in rows:
        table.add_row(
            row["workload"],
            str(row["unroll_length"]),
            row["program"],
            f"{row['seconds']:.3f}",
            f"{row['ratio_to_plain']:.2f}",
            f"{row['temporary_mib']:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    app.run(main)
