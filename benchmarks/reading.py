"""How fast images are read: decoded, cropped and mirrored, in threads of this library and in processes of grain.

  python -m benchmarks.reading
  python -m benchmarks.reading --workers=1,2,4,8 --images=1000

JPEG files of 500x375 are made, and every program makes the same crops of 224x224 of all of them. Programs run in turn,
and are timed from their first batch on, since processes take seconds to start.
A step is one of ResNet-50 on a batch of 25 on this device: reading hides behind it where 25 images are read in less
time. grain is compared where it is installed (pip install grain).
"""

import importlib.util
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.command import fail, parse
from benchmarks.workloads import TASK
from l2t_jax.data import Dataset
from l2t_jax.data.images import objects
from l2t_jax.losses import LOSSES
from l2t_jax.runs.environment import environment
from l2t_jax.runs.records import write_json
from l2t_jax.students import STUDENTS
from l2t_jax.tasks.classification import Classes, classification
from l2t_jax.tasks.reading import Reader
from l2t_jax.types import Batch
from l2t_jax.unroll import init_state, inner_objective, plain_gradient, student_step

SIZE, CROP, BATCH = (375, 500), 224, 25

FLAGS = flags.FlagValues()
flags.DEFINE_list("workers", ["1", "2"], "Threads, and processes, that read.", flag_values=FLAGS)
flags.DEFINE_integer("images", 400, "Files.", lower_bound=2 * BATCH, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "Passes over them; the median counts.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("step", True, "Time a student step too.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "Record. Default: benchmarks/results/reading_BACKEND.json.", flag_values=FLAGS)

Pass = Callable[[], Iterator[int]]  # gives the images of each batch as it is there


def main(argv: list[str]) -> None:
    """Measure, print the table, write the record."""
    parse(FLAGS, __doc__, argv)
    if not FLAGS.workers or not all(count.isdecimal() and int(count) for count in FLAGS.workers):
        fail(f"--workers={','.join(FLAGS.workers)}: give numbers of at least 1, e.g. --workers=1,2.")
    with tempfile.TemporaryDirectory() as folder:
        dataset = made(Path(folder), FLAGS.images)
        programs = {f"threads, {n}": threads(dataset, int(n)) for n in FLAGS.workers}
        if importlib.util.find_spec("grain"):
            programs |= {f"grain, {n} processes": processes(dataset, int(n)) for n in FLAGS.workers}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(FLAGS.repeats):
            for name, run in programs.items():
                batches = run()
                first, begin = next(batches), time.perf_counter()
                assert first + sum(batches) == FLAGS.images
                seconds[name].append((time.perf_counter() - begin) / (FLAGS.images - first))
    rows = [
        {"program": name, "images_per_second": 1 / float(np.median(of)), "seconds_per_image": of}
        for name, of in seconds.items()
    ]
    step = step_seconds() if FLAGS.step else None
    out = Path(FLAGS.out or Path(__file__).parent / "results" / f"reading_{jax.default_backend()}.json")
    command = shlex.join(["python", "-m", "benchmarks.reading", *argv[1:]])
    record = {"command": command, "environment": environment(), "rows": rows, "step_seconds": step, "batch": BATCH}
    write_json(out, record)
    Console().print(table_of(record))
    print(f"File: {out}")


def made(folder: Path, count: int) -> Dataset:
    """Smooth pictures with some grain, as JPEGs of some 60 kB."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-12, 13, (*SIZE, 1))
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)
    files = objects(sorted(folder.glob("*.jpg")))
    part = {"inputs": files, "labels": np.zeros(count, np.int32)}
    return Dataset("made", part, part, Classes(2, (0.0,) * 3, (1.0,) * 3, crop=CROP))


def threads(dataset: Dataset, workers: int) -> Pass:
    """One pass as a run reads: batch after batch, the next one begun before the one before is taken."""
    task = classification(dataset)
    indices = [np.arange(i, min(i + BATCH, dataset.examples)) for i in range(0, dataset.examples, BATCH)]

    def run() -> Iterator[int]:
        reader = Reader(task, dataset.train, workers)
        ahead = [reader.begin(which, [(int(i),) for i in which]) for which in indices[:2]]
        for place in range(len(indices)):
            batch = ahead.pop(0)()
            if place + 2 < len(indices):
                which = indices[place + 2]
                ahead.append(reader.begin(which, [(int(i),) for i in which]))
            yield len(batch["inputs"])
        reader.close()

    return run


def processes(dataset: Dataset, workers: int) -> Pass:
    """The same crops in the worker processes of grain."""
    import grain

    flags.FLAGS.mark_as_parsed()  # grain reads its own of absl's global flags
    read = classification(dataset).read
    assert read is not None
    one = lambda i: read(dataset.train, np.array([i]), [(int(i),)])  # noqa: E731

    def run() -> Iterator[int]:
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        batches = grain.MapDataset.range(dataset.examples).map(one).batch(BATCH).to_iter_dataset().mp_prefetch(options)
        for batch in batches:
            yield len(batch["inputs"])

    return run


def step_seconds() -> float:
    """A plain step of ResNet-50."""
    student, loss, optimizer = STUDENTS["resnet50"](num_classes=1000), LOSSES["dln"](), optax.sgd(0.1)
    batch = Batch(jnp.zeros((BATCH, CROP, CROP, 3)), jnp.zeros(BATCH, jnp.int32))
    state = init_state(student.init(jax.random.key(0), batch.inputs[:2]), optimizer)
    step = jax.jit(student_step(plain_gradient(inner_objective(student, TASK, loss)), optimizer))
    phi, times = loss.init(jax.random.key(1)), []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(step(state, phi, batch))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def table_of(record: dict[str, Any]) -> Table:
    """The rows for the eye."""
    step = record["step_seconds"]
    told = "" if step is None else f"; a step of ResNet-50 on {record['batch']} images takes {step:.2f} s"
    table = Table(title=f"Images of 500x375 read and cropped to 224x224{told}")
    for column in ("program", "images a second", "ms for a batch"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for row in record["rows"]:
        speed = row["images_per_second"]
        table.add_row(row["program"], f"{speed:.0f}", f"{1000 * record['batch'] / speed:.0f}")
    return table


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    main(sys.argv)
