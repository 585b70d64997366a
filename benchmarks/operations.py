"""Where the time of a convolutional student step goes: each convolution against what the machine's matrix product does.

  python -m benchmarks.operations
  python -m benchmarks.operations --workload=wide --repeats=3

Each of the three convolutions of each layer (forward, input gradient, kernel gradient) is timed in the body of a scan,
as in an unroll, and counted in one plain student step and in one step of a hypergradient (memory mode "mixed", forward
and backward). The floor is the same number of floating-point operations at the rate of a large square matrix product,
the best this machine's library does. What a step takes beyond its convolutions is BatchNorm, rectifiers, the loss and
the update.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax import lax
from jax.interpreters.partial_eval import dce_jaxpr
from rich.console import Console
from rich.table import Table

from benchmarks.command import parse
from benchmarks.workloads import BATCH, WORKLOADS, Problem, problem
from l2t_jax.convolution import conv_input_p, conv_kernel_p, conv_p
from l2t_jax.hypergradient import hypergradient
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import write_json
from l2t_jax.second_order import mixed_gradient
from l2t_jax.types import PyTree, StudentState
from l2t_jax.unroll import plain_gradient, student_step, unroll

Found = dict[tuple[Any, ...], int]
INSIDE = 10  # calls within one dispatch, whose own cost is thereby divided
SQUARE = 1024  # side of the matrix product that sets the floor
PRIMITIVES = {conv_p: "forward", conv_input_p: "input gradient", conv_kernel_p: "kernel gradient"}
CONVOLUTIONAL = [name for name in WORKLOADS if len(WORKLOADS[name].shape) == 3 and name != "w3"]

FLAGS = flags.FlagValues()
flags.DEFINE_enum("workload", "w1", CONVOLUTIONAL, "Whose student.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 5, "Timed dispatches of each; the median counts.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "File of the record. Default: benchmarks/results/operations_WORKLOAD_BACKEND.json.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Measure, print the table, write the record."""
    parse(FLAGS, __doc__, argv)
    floor = square_rate(FLAGS.repeats)
    task = problem(FLAGS.workload, INSIDE)
    plain, both = convolutions(task)
    rows = []
    for key, count in both.items():
        row = measure(key, FLAGS.repeats)
        rows.append({**row, "in_step": plain.get(key, 0), "in_hypergradient": count})
    steps = {
        name: {"seconds": seconds, **sums(rows, f"in_{name}", floor)}
        for name, seconds in step_seconds(task, FLAGS.repeats).items()
    }
    console = Console()
    console.print(table_of(rows, floor))
    for name, what in (("step", "A student step"), ("hypergradient", "A step of a hypergradient")):
        mine = steps[name]
        console.print(
            f"{what} takes {1e3 * mine['seconds']:.1f} ms; its convolutions alone "
            f"{1e3 * mine['convolution_seconds']:.1f} ms, {1e3 * mine['convolution_floor_seconds']:.1f} ms at the "
            f"{floor / 1e9:.0f} Gflop/s of a {SQUARE} x {SQUARE} matrix product.",
            soft_wrap=True,
        )
    default = Path(__file__).parent / "results" / f"operations_{FLAGS.workload}_{jax.default_backend()}.json"
    path = Path(FLAGS.out or default)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    write_json(
        path, {"rows": rows, "square_gflops": floor / 1e9, **steps, "command": command, "environment": environment()}
    )
    console.print(f"Record: {path}", soft_wrap=True)


def step_seconds(task: Problem, repeats: int) -> dict[str, float]:
    """Seconds of a student step and of one step of a hypergradient, without the gradient of the validation error."""
    step = student_step(plain_gradient(task.inner), task.optimizer)
    compute = hypergradient(task.inner, task.outer, task.optimizer, memory="mixed")
    outer = jax.grad(lambda params, *a: task.outer(params, *a)[0])
    state = task.state
    plain = _median(jax.jit(lambda *a: unroll(step, *a)), (state, task.phi, task.batches), repeats)
    whole = _median(jax.jit(compute), (task.phi, state, task.batches, task.validation), repeats)
    validation = _median(jax.jit(outer), (state.params, state.batch_stats, task.validation), repeats)
    return {"step": plain / INSIDE, "hypergradient": (whole - validation) / INSIDE}


def convolutions(task: Problem) -> tuple[Found, Found]:
    """How often each convolution (primitive, operand shapes, spec) a student step and one of a hypergradient have."""
    one = jax.tree.map(lambda x: x[0], task.batches)
    plain, mixed = (student_step(gradient(task.inner), task.optimizer) for gradient in (plain_gradient, mixed_gradient))

    def both(state: StudentState, phi: PyTree, batch: PyTree) -> PyTree:
        (after, loss), pull = jax.vjp(lambda state, phi: mixed(state, phi, batch), state, phi)
        return after, pull((after, loss))  # any cotangent of the right shapes

    counted: tuple[Found, Found] = ({}, {})
    for function, found in zip((plain, both), counted, strict=True):
        traced = jax.make_jaxpr(function)(task.state, task.phi, one).jaxpr
        used, _ = dce_jaxpr(traced, [True] * len(traced.outvars))  # as the compiler drops what nothing reads
        _collect(used, found)
    return counted


def sums(rows: list[dict[str, Any]], count: str, floor: float) -> dict[str, float]:
    """What the convolutions of a step take together, as measured and at the rate of the floor."""
    return {
        "convolution_seconds": sum(row["seconds"] * row[count] for row in rows),
        "convolution_floor_seconds": sum(row["flops"] * row[count] for row in rows) / floor,
    }


def _collect(jaxpr: Any, found: Found) -> None:
    for equation in jaxpr.eqns:
        if equation.primitive in PRIMITIVES:
            shapes = tuple(v.aval.shape for v in equation.invars)
            key = (equation.primitive, shapes, equation.params["spec"])
            found[key] = found.get(key, 0) + 1
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                _collect(getattr(inner, "jaxpr", inner), found)


def measure(key: tuple[Any, ...], repeats: int) -> dict[str, Any]:
    """One row: a convolution of a layer (primitive, operand shapes, spec), in the body of a scan."""
    primitive, shapes, spec = key
    random = np.random.default_rng(0)
    operands = tuple(jnp.asarray(random.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    result = jax.eval_shape(lambda *a: primitive.bind(*a, spec=spec), *operands).shape
    inputs, outputs = _channels(primitive, shapes, result)
    positions = BATCH * spec.output[0] * spec.output[1]
    return {
        "what": PRIMITIVES[primitive],
        "input": f"{spec.input[0]}x{spec.input[1]}x{inputs}",
        "kernel": f"{spec.kernel[0]}x{spec.kernel[1]}x{outputs}"
        + (f" / {spec.strides[0]}" if spec.strides[0] > 1 else ""),
        "flops": 2 * positions * spec.kernel[0] * spec.kernel[1] * inputs * outputs // spec.groups,
        "seconds": _median(_loop(lambda *a: primitive.bind(*a, spec=spec)), operands, repeats) / INSIDE,
        "spec": dataclasses.asdict(spec),
    }


def _channels(primitive: Any, shapes: tuple[Any, ...], result: tuple[int, ...]) -> tuple[int, int]:
    if primitive is conv_p:
        return shapes[0][3], result[3]
    if primitive is conv_input_p:
        return result[3], shapes[0][3]
    return shapes[0][3], shapes[1][3]


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Many calls in a scan, each depending on all of the one before, so that none is hoisted, merged or cut short."""

    def body(operands: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        result = lax.optimization_barrier(function(*operands))
        touch = 1e-30 * result.ravel()[0]
        return tuple(x.at[(0,) * x.ndim].add(touch) for x in operands), None

    return jax.jit(lambda *operands: lax.scan(body, operands, None, length=INSIDE)[0])


def square_rate(repeats: int) -> float:
    """Floating-point operations a second of a large square matrix product."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((SQUARE, SQUARE), dtype=np.float32))
    return 2 * SQUARE**3 * INSIDE / _median(_loop(lambda a, b: a @ b), (a, a.T), repeats)


def _median(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def table_of(rows: list[dict[str, Any]], floor: float) -> Table:
    """The rows for the eye, dearest first."""
    table = Table(
        title="Convolutions of a student step and of a step of a hypergradient", caption="ms each; % of the floor"
    )
    for column in ("convolution", "of"):
        table.add_column(column, no_wrap=True)
    for column in ("step", "hyper", "ms", "Gflop/s", "%"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: -row["seconds"] * row["in_hypergradient"]):
        rate = row["flops"] / row["seconds"]
        counts = [str(row["in_step"]), str(row["in_hypergradient"])]
        numbers = [f"{1e3 * row['seconds']:.2f}", f"{rate / 1e9:.0f}", f"{100 * rate / floor:.0f}"]
        table.add_row(row["what"], f"{row['input']} by {row['kernel']}", *counts, *numbers)
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
