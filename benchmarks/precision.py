"""What a student in bfloat16 changes: the hypergradient's error against float32, its seconds and its memory.

  python -m benchmarks.precision
  python -m benchmarks.precision --workloads=w3 --lengths=1,5,25,100

Both start from the same float32 parameters and see the same batches. The error is |g16 - g32| / |g32| over all of the
loss's parameters, the cosine that of the two gradients; seconds and bytes are bfloat16's over float32's, the bytes
those that the compiler sets aside.
"""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.command import lengths_in, parse, some_of
from benchmarks.workloads import WORKLOADS, problem
from l2t_jax.hypergradient import hypergradient
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import write_json

FLAGS = flags.FlagValues()
flags.DEFINE_list("workloads", ["w3", "w2", "w1"], f"Some of {', '.join(WORKLOADS)}.", flag_values=FLAGS)
flags.DEFINE_list("lengths", ["1", "5", "25"], "Unroll lengths N.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 5, "Timed calls of each; the median counts.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "File of the record. Default: benchmarks/results/precision_BACKEND.json.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Measure, print the table, write the record."""
    parse(FLAGS, __doc__, argv)
    names, lengths, rows = some_of("workloads", FLAGS.workloads, WORKLOADS), lengths_in(FLAGS.lengths), []
    for name in names:
        for length in lengths:
            print(f"{name}, N = {length}", file=sys.stderr, flush=True)
            rows.append(compare(name, length, FLAGS.repeats))
    out = Path(FLAGS.out or Path(__file__).parent / "results" / f"precision_{jax.default_backend()}.json")
    command = shlex.join(["python", "-m", "benchmarks.precision", *argv[1:]])
    write_json(out, {"command": command, "environment": environment(), "rows": rows})
    Console().print(table_of(rows))
    print(f"File: {out}")


def compare(name: str, length: int, repeats: int) -> dict[str, Any]:
    """The hypergradient of a workload in both, beside each other."""
    gradients, seconds, memory = [], [], []
    for dtype in ("float32", "bfloat16"):
        p = problem(name, length, compute_dtype=dtype)
        program = jax.jit(hypergradient(p.inner, p.outer, p.optimizer, memory="mixed"))
        arguments = (p.phi, p.state, p.batches, p.validation)
        compiled = program.lower(*arguments).compile()
        found = compiled(*arguments)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.gradient)]))
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - begin)
        seconds.append(float(np.median(times)))
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory.append(int(analysis.temp_size_in_bytes))
    full, half = gradients
    norms = np.linalg.norm(full), np.linalg.norm(half)
    return {
        "workload": name,
        "describe": WORKLOADS[name].describe,
        "length": length,
        "error": float(np.linalg.norm(half - full) / norms[0]),
        "cosine": float(full @ half / (norms[0] * norms[1])),
        "seconds": seconds,
        "bytes": memory,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows for the eye."""
    table = Table(title="A student in bfloat16 beside float32")
    for column in ("student", "N", "error", "cosine", "seconds", "bytes"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for row in rows:
        times, sizes = (row[name][1] / row[name][0] for name in ("seconds", "bytes"))
        numbers = [f"{100 * row['error']:.1f} %", f"{row['cosine']:.4f}", f"{times:.2f}", f"{sizes:.2f}"]
        table.add_row(row["describe"], str(row["length"]), *numbers)
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
