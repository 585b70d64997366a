"""What the entries of an experiment share: data, student, task, schedule, layout."""

import dataclasses
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2t_jax import data
from l2t_jax.data import Dataset
from l2t_jax.data.noise import with_noise
from l2t_jax.methods import TAUGHT, build_method
from l2t_jax.methods.l2t_dln import STAGES
from l2t_jax.methods.parts import SCHEDULES, Parts
from l2t_jax.optimizers import clip_by_global_norm
from l2t_jax.presets import Preset
from l2t_jax.runs import parallel
from l2t_jax.runs.config import Config, Options, UsageError
from l2t_jax.runs.parallel import Layout
from l2t_jax.runs.training import Schedule
from l2t_jax.students import STUDENTS
from l2t_jax.tasks.image_classification import image_classification
from l2t_jax.types import Array, Method, Student, Task

META, FEW = 1000, 10_000  # clean examples of a meta set; a tenth as many where there are fewer examples than FEW


class Entry(NamedTuple):
    """A row of the table: a method, whose trained teacher it takes over, if any, and how many students it trains."""

    name: str
    method: Method
    teacher_of: str | None = None
    lives: int = 1  # of so many rounds as the run has for every student; the last one is judged


class Setting(NamedTuple):
    """What all entries of one experiment share."""

    config: Config
    options: Options
    dataset: Dataset
    student: Student
    task: Task
    schedule: Schedule
    layout: Layout
    optimizer: optax.GradientTransformation  # the student's

    def rounds_of(self, entry: Entry) -> int:
        """Rounds of a run of this entry, over all its students' lives."""
        return self.schedule.rounds * entry.lives


def build_setting(config: Config, options: Options, dataset: Dataset) -> tuple[Setting, list[Entry]]:
    """All that the flags describe, checked as far as it can be before anything is computed.

    Raises:
      UsageError, ParallelError: something does not fit; one line says what.
    """
    layout = parallel.layout_of(len(config.seeds), options.devices, options.shard, options.seeds_at_once)
    sizes = {name: getattr(config.settings, name) for name in ("batch_size", "validation_batch_size")}
    parallel.check(layout, **sizes)
    task, student = image_classification(dataset), build_student(config, dataset, layout.axis_name)
    schedule = build_schedule(config, dataset)
    optimizer = build_optimizer(config.settings, schedule.rounds * schedule.stages * schedule.unroll_length)
    parts = Parts(
        settings=config.settings,
        teacher=config.teacher,
        student=student,
        task=task,
        optimizer=optimizer,
        classes=dataset.num_classes,
        rounds=schedule.rounds,
        stages=schedule.stages,
        unroll_length=schedule.unroll_length,
        memory=config.memory,
        axis_name=layout.axis_name,
        at_once=layout.seeds,
    )
    setting = Setting(config, options, dataset, student, task, schedule, layout, optimizer)
    return setting, build_entries(config.methods, parts, options.teacher_from is not None)


def build_entries(methods: Sequence[str], parts: Parts, elsewhere: bool = False) -> list[Entry]:
    """The rows of the table, in the order of the methods' names.

    A method with a teacher gives two, one for each protocol; only the transfer, where its teacher is from elsewhere.

    Raises:
      UsageError: the parts do not do for a method.
    """
    entries = []
    for name in methods:
        try:
            if name not in TAUGHT or not elsewhere:
                lives = parts.settings.lives if name == "l2t_dln" else 1
                entries.append(Entry(name, build_method(name, parts), lives=lives))
            if name in TAUGHT:
                entries.append(Entry(f"{name}_transfer", build_method(name, parts, learn=False), name))
        except ValueError as error:
            raise UsageError(f"--method={name}: {error}") from error
    return entries


def build_student(config: Config, dataset: Dataset, axis_name: str | None = None) -> Student:
    """The student that the flags describe, once it is sure to fit the data set's images."""
    build = STUDENTS[config.student]
    parameters = inspect.signature(build).parameters
    given: dict[str, Any] = {"width": config.width, "shortcut": config.shortcut, "head_grid": config.head_grid}
    default = {"width": None, "shortcut": "a", "head_grid": 1}
    asked = {name: value for name, value in given.items() if value != default[name]}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in asked.items():
        if name not in parameters and not takes_all:
            has = ", ".join(f"--{other}" for other in given if other in parameters) or "none of these knobs"
            raise UsageError(
                f"--{name}={value} is no knob of --student={config.student}, which has {has}: leave it out."
            )
    knobs = asked | ({"axis_name": axis_name} if "axis_name" in parameters else {})
    try:
        student = build(num_classes=dataset.num_classes, **knobs)
        jax.eval_shape(student.init, jax.random.key(0), example_inputs(dataset))
    except ValueError as error:
        raise UsageError(f"--student={config.student} does not fit --dataset={config.dataset}: {error}") from error
    return student


def build_optimizer(settings: Preset, steps: int) -> optax.GradientTransformation:
    """The student's optimizer, for a run of so many student steps."""
    sgd = optax.sgd(SCHEDULES[settings.student_schedule](settings.student_lr, steps))
    return optax.chain(clip_by_global_norm(settings.student_clip), sgd) if settings.student_clip else sgd


def build_schedule(config: Config, dataset: Dataset) -> Schedule:
    """How long the run is and what a round reads; a meta set takes the place of the division into two parts."""
    settings, examples = config.settings, len(dataset.train_labels)
    try:
        schedule = Schedule(
            rounds=config.rounds or 1,
            unroll_length=settings.unroll_length,
            batch_size=settings.batch_size,
            validation_batch_size=settings.validation_batch_size,
            validation_ratio=dataset.meta / examples if dataset.meta else settings.validation_ratio,
            examples=examples,
            stages=STAGES[settings.second_stage],
            fixed_split=dataset.meta > 0,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(schedule, rounds=config.rounds or settings.epochs * schedule.rounds_per_epoch)


def prepare(config: Config, options: Options) -> Dataset:
    """Load a config's data set, hold a part out, make labels wrong.

    Raises:
      DataError: it is not there, or cannot be divided or corrupted as asked.
    """
    dataset = data.hold_out(data.load(config.dataset, options.data_dir, options.download), config.held_out)
    noise = config.noise
    if noise is None:
        return dataset
    default = META if len(dataset.train_labels) >= FEW else META // 10
    return with_noise(dataset, noise.kind, noise.ratio, default if noise.meta is None else noise.meta, noise.seed)


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run starts fast; JAX_COMPILATION_CACHE_DIR moves them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def example_inputs(dataset: Dataset) -> Array:
    """Inputs [2, H, W, c] of the right shape, for a student's initialisation."""
    return jnp.zeros((2, *dataset.train_images.shape[1:]))
