"""Whether a hypergradient fits: the memory of large students against the unroll length, without running anything.

  python -m benchmarks.memory
  python -m benchmarks.memory --students=wide_resnet --lengths=1,25,100 --batch=32 --micro_batches=8

Every program is compiled, and the figure is what the compiler sets aside for it beside its arguments. `save` is what
plain autodiff needs. In parts: every batch, the validation batch too, in micro-batches of the same size.
Rows that the record holds already are kept, where they were made from the same commit.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.command import fail, lengths_in, parse, some_of
from benchmarks.workloads import TASK
from l2t_jax.hypergradient import hypergradient
from l2t_jax.losses import LOSSES
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import write_json
from l2t_jax.students import STUDENTS
from l2t_jax.students.micro_batches import in_micro_batches
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, outer_objective


class Large(NamedTuple):
    """A student, the images it sees and their classes."""

    student: str
    knobs: dict[str, Any]
    size: int
    classes: int
    describe: str


LARGE = {
    "wide_resnet": Large("wide_resnet", {}, 32, 10, "WRN-28-10"),
    "densenet": Large("densenet", {}, 32, 10, "DenseNet-BC-100-12"),
    "nasnet": Large("nasnet", {}, 32, 10, "NASNet-A 6 @ 768"),
    "resnet18": Large("resnet18", {}, 224, 1000, "ResNet-18"),
    "resnet50": Large("resnet50", {}, 224, 1000, "ResNet-50"),
    "nasnet_mobile": Large("nasnet_mobile", {}, 224, 1000, "NASNet-A 4 @ 1056"),
    "densenet190": Large("densenet", {"depth": 190, "growth": 40}, 32, 10, "DenseNet-BC-190-40"),
}
# What is compared: memory mode, and whether batches are computed in parts.
PROGRAMS = [("save", False), ("mixed", False), ("nested", False), ("mixed", True), ("nested", True)]
# LLVM's work changes no figure here, since memory is shared out before.
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}

FLAGS = flags.FlagValues()
flags.DEFINE_list("students", list(LARGE), f"Some of {', '.join(LARGE)}.", flag_values=FLAGS)
flags.DEFINE_list("lengths", ["1", "25"], "Unroll lengths N.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 25, "Examples of a batch.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("validation", 100, "Examples of the validation batch.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("micro_batches", 5, "Parts of a batch.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "File of the record. Default: benchmarks/results/memory_BACKEND.json.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Compile, print the table, write the record after each program."""
    parse(FLAGS, __doc__, argv)
    students, lengths = some_of("students", FLAGS.students, LARGE), lengths_in(FLAGS.lengths)
    size, rest = divmod(FLAGS.batch, FLAGS.micro_batches)
    if rest or FLAGS.validation % size:
        fail(f"--micro_batches={FLAGS.micro_batches} does not divide --batch={FLAGS.batch} and --validation alike.")
    out = Path(FLAGS.out or Path(__file__).parent / "results" / f"memory_{jax.default_backend()}.json")
    command = shlex.join(["python", "-m", "benchmarks.memory", *argv[1:]])
    here = environment()
    rows = _kept(out, here)
    wanted = list(_wanted(students, lengths, size))
    for place, asked in enumerate(wanted):
        if any(row.items() >= asked.items() for row in rows):
            continue
        told = f"{asked['student']}, N = {asked['length']}, {asked['mode']}, {asked['size']} examples at a time"
        print(f"{place + 1} of {len(wanted)}: {told}", file=sys.stderr, flush=True)
        rows.append(asked | measure(**asked))
        write_json(out, {"command": command, "environment": here, "rows": rows})
    found = [row for asked in wanted for row in rows if row.items() >= asked.items()]
    Console(width=120).print(table_of(found))
    print(f"File: {out}")


def _kept(out: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the record that is there, if it was made by this commit and these versions."""
    if not out.exists():
        return []
    record = json.loads(out.read_text())
    same = all(record["environment"][name] == here[name] for name in ("versions", "git"))
    rows: list[dict[str, Any]] = record["rows"] if same else []
    return rows


def _wanted(students: list[str], lengths: list[int], size: int) -> Iterator[dict[str, Any]]:
    for student in students:
        for mode, in_parts in PROGRAMS:
            for length in lengths:
                if length == 1 and mode == "nested":  # one step has no segments
                    continue
                examples = {
                    "batch": FLAGS.batch,
                    "validation": FLAGS.validation,
                    "size": size if in_parts else FLAGS.batch,
                }
                yield {"student": student, "length": length, "mode": mode, **examples}


def measure(student: str, length: int, mode: str, batch: int, validation: int, size: int) -> dict[str, Any]:
    """Compile a hypergradient for shapes alone.

    Args:
      student: of LARGE.
      length: N.
      mode: of `MEMORY_MODES`.
      batch, validation: examples of a batch, and of the validation batch.
      size: examples that are computed at a time; `batch` where nothing is divided.
    Returns:
      the figures of a row: parameters, MiB, seconds of tracing and compilation.
    """
    large = LARGE[student]
    network = STUDENTS[large.student](num_classes=large.classes, **large.knobs)
    network = network if size == batch else in_micro_batches(network, size)
    loss, optimizer = LOSSES["dln"](), optax.sgd(0.1)

    def start() -> tuple[Any, Any]:
        variables = network.init(jax.random.key(1), jnp.zeros((2, large.size, large.size, 3)))
        return loss.init(jax.random.key(0)), init_state(variables, optimizer)

    def examples(*lead: int) -> Batch:
        images = jax.ShapeDtypeStruct((*lead, large.size, large.size, 3), jnp.float32)
        return Batch(images, jax.ShapeDtypeStruct(lead, jnp.int32))

    phi, state = jax.eval_shape(start)
    inner, outer = inner_objective(network, TASK, loss), outer_objective(network, TASK)
    begin = time.perf_counter()
    program = jax.jit(hypergradient(inner, outer, optimizer, memory=mode))
    compiled = program.lower(phi, state, examples(length, batch), examples(validation)).compile(compiler_options=FAST)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return {
        "describe": large.describe,
        "image": large.size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "mib": analysis.temp_size_in_bytes / 2**20,
        "seconds": time.perf_counter() - begin,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A line for each student and length, a column for each program."""
    table = Table(title="MiB of a hypergradient")
    columns = list(dict.fromkeys((row["mode"], row["size"] < row["batch"]) for row in rows))
    heads = [f"{mode}, parts" if in_parts else mode for mode, in_parts in columns]
    for head in ("student", "parameters", "N", *heads):
        table.add_column(head, justify="left" if head == "student" else "right")
    for student, length in dict.fromkeys((row["student"], row["length"]) for row in rows):
        line = [row for row in rows if (row["student"], row["length"]) == (student, length)]
        of = {(row["mode"], row["size"] < row["batch"]): f"{row['mib']:.0f}" for row in line}
        first = line[0]
        cells = [of.get(column, "") for column in columns]
        table.add_row(f"{first['describe']}, {first['image']}", str(first["parameters"]), str(length), *cells)
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
