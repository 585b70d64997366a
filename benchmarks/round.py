"""What a whole round of L2T-DLN costs, beside its parts: two hypergradients, the LSTM teacher, its gradient and Adam.

  python -m benchmarks.round
  python -m benchmarks.round --workload=w1 --workload=w3 --unroll_length=15 --second_stage=restart

Rounds run as in training, several in one dispatch, on random uint8 images that lie on the device; what a round gathers,
and for colour images crops and flips, is in its time. Each repeat times the rounds and each part in turn, medians
count, and ratios are to the 2N plain student steps that a round's two unrolls would be without a derivative.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.command import fail, parse
from benchmarks.workloads import WORKLOADS, problem, teaching
from l2t_jax.hypergradient import hypergradient
from l2t_jax.memory import MEMORY_MODES, device_bytes
from l2t_jax.methods.l2t_dln import STAGES
from l2t_jax.runs.environment import environment
from l2t_jax.runs.parallel import Dispatch
from l2t_jax.runs.records import write_json
from l2t_jax.runs.training import MOST_ROUNDS, some_rounds
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import MethodState, PyTree, Teacher
from l2t_jax.unroll import plain_gradient, student_step, unroll

ROUND, HYPERGRADIENT, PLAIN, TEACHER, DATA = "round", "hypergradient", "plain steps", "teacher", "data"

FLAGS = flags.FlagValues()  # not absl's global ones, which the other scripts' flags of the same names would clash with


def define_flags() -> None:
    """What the command line takes."""
    known = "; ".join(f"{name} {workload.describe}" for name, workload in WORKLOADS.items())
    flags.DEFINE_multi_enum("workload", ["w1"], list(WORKLOADS), f"{known}. Repeatable.", flag_values=FLAGS)
    flags.DEFINE_integer("unroll_length", 25, "N, student steps.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_enum("second_stage", "continue", list(STAGES), "As in training.", flag_values=FLAGS)
    flags.DEFINE_integer(
        "rounds", 3, "Rounds of a dispatch.", lower_bound=1, upper_bound=MOST_ROUNDS, flag_values=FLAGS
    )
    flags.DEFINE_integer("repeats", 3, "Timed calls; the median counts.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_integer(
        "seeds", 1, "Run so many seeds at once (vmap), to fill an accelerator.", lower_bound=1, flag_values=FLAGS
    )
    flags.DEFINE_enum("memory", "auto", list(MEMORY_MODES), "Memory mode.", flag_values=FLAGS)
    flags.DEFINE_string(
        "out", None, "File of the record (JSON). Default: benchmarks/results/round_BACKEND.json.", flag_values=FLAGS
    )


define_flags()


def main(argv: list[str]) -> None:
    """Measure, print a table, write the record; bad input is one line and exit code 2."""
    parse(FLAGS, __doc__, argv)
    path = Path(FLAGS.out or Path(__file__).parent / "results" / f"round_{jax.default_backend()}.json")
    console, rows = Console(), []
    here = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "environment": environment()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for workload in FLAGS.workload:
            rows += measure(
                workload,
                FLAGS.unroll_length,
                FLAGS.second_stage,
                FLAGS.rounds,
                FLAGS.repeats,
                seeds=FLAGS.seeds,
                memory=FLAGS.memory,
            )
            write_json(path, {"rows": rows, **here})
    except OSError as error:
        fail(f"--out={path}: {error}")
    console.print(table_of(rows))
    console.print(f"Record: {path}")


def measure(
    name: str, length: int, second_stage: str, rounds: int, repeats: int, *, seeds: int = 1, memory: str = "auto"
) -> list[dict[str, Any]]:
    """One row for the round and one for each of its parts, timed in turn so that drift hits all alike."""
    workload, part, teacher = WORKLOADS[name], problem(name, length, seeds), TEACHERS["lstm"](1e-3)
    step = student_step(plain_gradient(part.inner), part.optimizer)
    compute = hypergradient(part.inner, part.outer, part.optimizer, memory=memory, at_once=seeds)
    execute, state, arguments, gather = _rounds(name, teacher, length, second_stage, rounds, seeds, memory)
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        ROUND: (execute, (state, *arguments)),
        HYPERGRADIENT: (compute, (part.phi, part.state, part.batches, part.validation)),
        PLAIN: (lambda *a: unroll(step, *a), (part.state, part.phi, part.batches)),
        TEACHER: (_teach(teacher), (*jax.tree.map(jnp.copy, (state.teacher, state.carried)), part.phi, part.phi)),
        DATA: (gather, arguments),
    }
    compiled = {}
    for label, (function, given) in functions.items():
        begin = time.perf_counter()
        several = jax.vmap(function, _axes(label, given)) if seeds > 1 else function
        program = jax.jit(several, donate_argnums=0 if label == ROUND else ()).lower(*given).compile()
        compiled[label] = program, time.perf_counter() - begin, _temporary_mib(name, label, program)
    times: dict[str, list[float]] = {label: [] for label in functions}
    for repeat in range(repeats + 1):
        for label, (_, given) in functions.items():
            # The round takes the buffers of its state, so each call goes on from the one before.
            given = (state, *arguments) if label == ROUND else given
            begin = time.perf_counter()
            result = jax.block_until_ready(compiled[label][0](*given))
            if repeat > 0:  # the first call is slower
                times[label].append((time.perf_counter() - begin) / (rounds if label == ROUND else 1))
            if label == ROUND:
                state = result[0]
                if not np.all(np.asarray(result[2]) == rounds):
                    fail(f"{name} became non-finite, which ends a dispatch: lower --unroll_length or --rounds.")
    plain = 2 * float(np.median(times[PLAIN]))
    return [
        {
            "workload": name,
            "student": workload.describe,
            "unroll_length": length,
            "second_stage": second_stage,
            "memory": memory,
            "seeds": seeds,
            "rounds": rounds,
            "program": label,
            "seconds": float(np.median(times[label])),
            "seconds_all": times[label],
            "ratio_to_plain": float(np.median(times[label])) / plain,
            "compile_seconds": compiled[label][1],
            "temporary_mib": compiled[label][2],
        }
        for label in functions
    ]


def _rounds(
    workload: str, teacher: Teacher, length: int, second_stage: str, rounds: int, seeds: int, memory: str
) -> tuple[Callable[..., Any], MethodState, tuple[PyTree, Dispatch], Callable[..., Any]]:
    """Rounds of L2T-DLN in one dispatch, their first argument, the others, and what reads a round's data from these."""
    t = teaching(workload, length, rounds, teacher=teacher, second_stage=second_stage, memory=memory, at_once=seeds)

    def gather(data: PyTree, dispatch: Dispatch) -> list[PyTree]:
        key = jax.random.wrap_key_data(dispatch.key)
        each = [indices[0] for indices in (dispatch.train, dispatch.validation)]
        return [t.task.gather(data, indices, jax.random.split(key, indices.shape)) for indices in each]

    several = [jax.tree.map(lambda *x: np.stack(x), *map(of, range(seeds))) for of in (t.state, t.dispatch)]
    state, dispatch = jax.tree.map(lambda x: jnp.asarray(x if seeds > 1 else x[0]), several)
    execute = some_rounds(t.method, t.task)
    return execute, state, (jax.device_put(t.data), dispatch), gather


def _teach(teacher: Teacher) -> Callable[..., Any]:
    """The teacher's update, and its gradient by Eq. 8."""

    def teach(tau: PyTree, hidden: PyTree, d: PyTree, phi: PyTree) -> Any:
        update, to_tau, hidden = jax.vjp(lambda tau: teacher.update(tau, hidden, d, phi), tau, has_aux=True)
        return update, hidden, to_tau(d)

    return teach


def _axes(label: str, arguments: tuple[Any, ...]) -> tuple[int | None, ...]:
    """What is mapped over seeds: all but the images, which they share."""
    shared = {ROUND: 1, DATA: 0}.get(label)
    return tuple(None if i == shared else 0 for i in range(len(arguments)))


def _temporary_mib(name: str, label: str, program: Any) -> float | None:
    if not (analysis := program.memory_analysis()):
        return None
    if analysis.temp_size_in_bytes > device_bytes():
        needs = f"{name}: {label} needs {analysis.temp_size_in_bytes / 2**30:.0f} GiB"
        fail(f"{needs}, more than the device has: lower --seeds or --unroll_length, or take --memory=nested.")
    return analysis.temp_size_in_bytes / 2**20


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for the eye."""
    table = Table(title="Cost of a round of L2T-DLN")
    for column in ("workload", "N", "program", "seconds", "x 2N plain", "temp MiB", "compile s"):
        justify: Literal["left", "right"] = "left" if column in ("workload", "program") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            row["workload"],
            str(row["unroll_length"]),
            row["program"],
            f"{row['seconds']:.4f}",
            f"{row['ratio_to_plain']:.3f}",
            "" if row["temporary_mib"] is None else f"{row['temporary_mib']:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
