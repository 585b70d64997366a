"""What the tasks of pixels and boxes cost at full size: a learned loss over every pixel, and whole rounds of L2T-DLN.

  python -m benchmarks.pixels --what=loss
  python -m benchmarks.pixels --what=rounds --students=pspnet50,yolov3 --rounds=2

loss: cross entropy and the DLN of logits [2, 473, 473, 21] and a second head, in pieces as the library computes it and
in one piece; `gradient` is that with respect to the outputs, as in a student step; `mixed` is the derivative of its
product with a direction with respect to the loss, as in a hypergradient (of cross entropy: with respect to the
outputs). Memory is that of XLA's temporaries, beyond arguments and results.
rounds: whole rounds (N = 2, batch 2, validation batch 8) of L2T-DLN and the fixed loss, on images drawn at random, with
the memory that the program's buffers take; the first round, which compiles, is told apart.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.command import fail, parse
from l2t_jax import unroll
from l2t_jax.data import Dataset
from l2t_jax.data.images import objects
from l2t_jax.losses import build_loss
from l2t_jax.presets import PRESETS
from l2t_jax.runs.config import Config, Options
from l2t_jax.runs.environment import environment
from l2t_jax.runs.parallel import ONE
from l2t_jax.runs.records import write_json
from l2t_jax.runs.setting import build_setting, first_state
from l2t_jax.runs.streaming import Stream
from l2t_jax.runs.training import STREAMED_ROUNDS, _dispatch, compile_rounds
from l2t_jax.tasks import TASKS, settings_for
from l2t_jax.tasks.detection import Boxes
from l2t_jax.tasks.segmentation import Pixels, pixels
from l2t_jax.types import Segmented

MIB = 2**20
LOSS = {"residual": True, "squash": "softmax", "form": "released", "compress": 10.0}  # the DLN of preset stable
FLAGS = flags.FlagValues()


def define_flags() -> None:
    """What the command line takes."""
    flags.DEFINE_list("what", ["loss"], "loss, rounds.", flag_values=FLAGS)
    flags.DEFINE_integer("side", 473, "Pixels of a side.", lower_bound=17, flag_values=FLAGS)
    flags.DEFINE_integer("classes", 21, "C.", lower_bound=2, flag_values=FLAGS)
    flags.DEFINE_bool("whole", True, "Measure the DLN in one piece too, which takes gigabytes.", flag_values=FLAGS)
    flags.DEFINE_list("students", ["pspnet_small", "yolov3_tiny"], "Of rounds.", flag_values=FLAGS)
    flags.DEFINE_list("methods", ["l2t_dln", "fixed"], "Of rounds; fixed is the task's own loss.", flag_values=FLAGS)
    flags.DEFINE_string("train", "all", "all | head, of the students; head with --weights.", flag_values=FLAGS)
    flags.DEFINE_string("weights", "", "FILE, of the students.", flag_values=FLAGS)
    flags.DEFINE_string("memory", "auto", "Mode of the hypergradient.", flag_values=FLAGS)
    flags.DEFINE_integer("rounds", 2, "Beside the first.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_integer("repeats", 3, "Timed calls of a loss; the median counts.", lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_string(
        "out", None, "File of the record. Default: benchmarks/results/pixels_BACKEND.json.", flag_values=FLAGS
    )


define_flags()


def main(argv: list[str]) -> None:
    """Measure, print and write the record, to which rows are added."""
    parse(FLAGS, __doc__, argv)
    if unknown := set(FLAGS.what) - {"loss", "rounds"}:
        fail(f"--what={unknown.pop()} is unknown; choose any of loss, rounds.")
    path = Path(FLAGS.out or Path(__file__).parent / "results" / f"pixels_{jax.default_backend()}.json")
    here = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "environment": environment()}
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        rows.extend({"what": what, **row} for row in found)
        for row in found:
            print(
                what,
                *(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()),
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rows": rows, **here})

    for what in FLAGS.what:
        if what == "loss":
            keep(measure_losses(FLAGS.side, FLAGS.classes, FLAGS.repeats, FLAGS.whole))
            continue
        for student in FLAGS.students:
            for method in FLAGS.methods:
                keep([measure_rounds(student, method, FLAGS.rounds)])
    print(f"Record: {path}")


def measure_losses(side: int, classes: int, repeats: int, whole: bool) -> list[dict[str, Any]]:
    """A row for each loss and derivative."""
    keys = jax.random.split(jax.random.key(0), 4)
    outputs = Segmented(*(jax.random.normal(key, (2, side, side, classes)) for key in keys[:2]))
    direction = Segmented(*(jax.random.normal(key, (2, side, side, classes)) for key in keys[2:]))
    targets = jax.random.randint(keys[3], (2, side, side), 0, classes)
    rows = []
    for name, knobs, pieces in (
        ("cross_entropy", {}, False),
        ("cross_entropy", {}, True),
        ("dln", LOSS, True),
        ("dln", LOSS, False),
    ):
        if name == "dln" and not pieces and not whole:
            continue
        loss = build_loss(name, classes, **knobs)
        phi = jax.tree.map(lambda x: x + 0.01, loss.init(jax.random.key(1)))
        before, unroll.MANY = unroll.MANY, unroll.MANY if pieces else 2**62

        def mean(outputs: Segmented, phi: Any, loss: Any = loss) -> jax.Array:
            read = pixels(outputs, targets)
            values = read.scale * unroll.in_pieces(loss, phi, read)
            return unroll.weighted_mean(unroll.Errors(values, read.weight))

        def slope(outputs: Segmented, phi: Any) -> jax.Array:
            found = jax.grad(mean)(outputs, phi)
            products = jax.tree.map(jnp.vdot, found, direction)
            return products.logits + products.auxiliary

        derivatives: dict[str, Callable[..., Any]] = {
            "gradient": jax.grad(mean),
            "mixed": jax.grad(slope, argnums=1 if jax.tree.leaves(phi) else 0),
        }
        for kind, function in derivatives.items():
            compiled = jax.jit(function).lower(outputs, phi).compile()
            temporaries = temporaries_of(compiled)
            try:
                seconds = timed(partial(compiled, outputs, phi), repeats)
            except jax.errors.JaxRuntimeError as error:  # more than there is
                print(f"{name} in one piece: {str(error).splitlines()[0]}")
                seconds = float("nan")
            rows.append(
                {"loss": name, "in_pieces": pieces, "of": kind, "seconds": seconds, "temporaries_mib": temporaries}
            )
        unroll.MANY = before
    return [row | {"side": side, "classes": classes, "images": 2} for row in rows]


def temporaries_of(compiled: Any) -> float:
    """MiB that a program needs beyond its arguments and results."""
    return float(compiled.memory_analysis().temp_size_in_bytes) / MIB


def timed(call: Callable[[], Any], repeats: int) -> float:
    """The median of so many calls, after one that warms up."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return float(np.median(found))


def measure_rounds(student: str, method: str, rounds: int) -> dict[str, Any]:
    """Seconds and memory of whole rounds."""
    task = "segmentation" if student.startswith("pspnet") else "detection"
    spec = TASKS[task]
    knobs = {"weights": FLAGS.weights, "train": FLAGS.train} if FLAGS.weights else {}
    config = Config(
        dataset="drawn",
        student=student,
        methods=(spec.baseline if method == "fixed" else method,),
        preset="stable",
        teacher="lstm",
        rounds=rounds + 1,
        memory=FLAGS.memory,
        seeds=(0,),
        settings=dataclasses.replace(settings_for(spec, PRESETS["stable"]), validation_ratio=0.5),
        task=task,
        student_knobs=knobs,
        task_knobs={"crop": FLAGS.side} if task == "segmentation" else {"size": 416},
    )
    setting, entries = build_setting(config, Options(workdir=""), drawn(task, FLAGS.side, FLAGS.classes))
    entry, parts = entries[0], setting.parts
    program = compile_rounds(entry.method, parts.task, ONE)
    stream = Stream(parts.task, parts.student, setting.dataset.train, program)
    plan = parts.plan.of(entry.method.stages)
    states = program.place([first_state(entry.method, 0, setting.inputs)])
    seconds = []
    for r in range(rounds + 1):
        begin = time.perf_counter()
        data, dispatches = stream.take([_dispatch(0, r, 1, plan, STREAMED_ROUNDS)])
        stream.begin([_dispatch(0, r + 1, 1, plan, STREAMED_ROUNDS)])
        states, metrics, _ = program(states, data, dispatches)
        seconds.append(time.perf_counter() - begin)
    stream.close()
    device = jax.devices()[0].memory_stats() or {}
    compiled = program.call.lower(states, data, dispatches[0]).compile()
    return {
        "student": student,
        "parameters": sum(x.size for x in jax.tree.leaves(states.student.params)),
        "method": entry.name,
        "train": FLAGS.train,
        "side": config.task_knobs.get("crop") or config.task_knobs["size"],
        "first_round_s": seconds[0],
        "seconds": float(np.median(seconds[1:])),
        "temporaries_mib": temporaries_of(compiled),
        "peak_mib": device.get("peak_bytes_in_use", float("nan")) / MIB,
        "error": float(metrics[0]["validation_error"][0]),
        "memory": FLAGS.memory,
    }


def drawn(task: str, side: int, classes: int) -> Dataset:
    """Images at random: 16 to train on and 16 to validate, 2 to test."""
    rng = np.random.default_rng(0)
    parts = []
    for n in (32, 2):
        images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(n)]
        part = {"image": objects(images)}
        if task == "segmentation":
            part["mask"] = objects(rng.integers(0, classes, (side, side), dtype=np.uint8) for _ in range(n))
        else:
            boxes = [
                np.float32(np.concatenate([rng.uniform(0.3, 0.7, (8, 2)), rng.uniform(0.05, 0.5, (8, 2))], 1))
                for _ in images
            ]
            part |= {
                "boxes": objects(boxes),
                "classes": objects(rng.integers(0, 80, 8).astype(np.int32) for _ in images),
                "crowd": objects(np.zeros(8, bool) for _ in images),
                "area": objects(np.ones(8, np.float32) for _ in images),
            }
        parts.append(part)
    names = tuple(str(c) for c in range(classes if task == "segmentation" else 80))
    info: Any = Pixels(names, side) if task == "segmentation" else Boxes(names, 416)
    return Dataset("drawn", parts[0], parts[1], info)


if __name__ == "__main__":
    main(sys.argv)
