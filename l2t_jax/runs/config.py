"""What a run is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from l2t_jax.presets import Preset

Hook = Callable[[dict[str, Any]], object]  # what is told of a run: a row, or the summary


class UsageError(ValueError):
    """A flag's value that cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Wrong training labels, see `l2t_jax.data.noise`."""

    kind: str
    ratio: float
    meta: int | None  # clean examples kept apart; None: as many as `l2t_jax.runs.setting.META` says
    seed: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Every value that decides a result. Two runs with equal configs (and versions) give equal numbers."""

    dataset: str
    student: str
    methods: tuple[str, ...]
    preset: str
    teacher: str
    rounds: int | None  # None: as many as `settings.epochs` have
    memory: str
    seeds: tuple[int, ...]
    settings: Preset
    noise: Noise | None = None  # None: the labels are right
    held_out: float = 0.0  # part of the training examples that is tested on in place of the test set; 0: none
    task: str = "classification"  # of `l2t_jax.tasks.TASKS`
    student_knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # that differ from the builder's defaults
    task_knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the task, that differ from its defaults
    labels: str | None = None  # a file of labels in place of the set's own
    class_weight: str | None = None  # "balanced", or a number for each class; None: all examples count alike
    imbalance: float = 1.0  # training examples of the first class for each of the last; 1: as the set has them
    clean: str | None = None  # a file of the training examples that are known to be right, or how many
    train_on_clean: bool = False  # the clean examples of a meta set are trained on as well
    knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of losses and methods, "NAME.KNOB": value
    compute_dtype: str = "float32"  # in which the student computes; its state is float32
    skip_broken: bool = False  # images that cannot be read are left out
    micro_batches: int = 1  # parts of a batch that a device computes one after the other


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A record's config with what was not yet a choice when it was written, as it was then: the defaults."""
    fields = [field for field in dataclasses.fields(Config) if field.name not in config]
    made = {field.name: field.default_factory() for field in fields if callable(field.default_factory)}
    defaults = {field.name: field.default for field in fields} | made
    return defaults | config | {"settings": dataclasses.asdict(Preset()) | config["settings"]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Values that decide no result."""

    workdir: str
    data_dir: str | None = None
    download: bool = False
    resume: bool = False
    checkpoint_seconds: float = 20.0
    tensorboard: bool = False
    on_row: Hook | str | None = None  # see `l2t_jax.runs.hooks`; a string is MODULE:FUNCTION
    on_summary: Hook | str | None = None
    stream: bool = False  # examples stay on the host
    seeds_at_once: int | None = None
    devices: int = 1
    shard: str = "batch"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    teacher_from: str | None = None  # a run directory; the record holds the digests of its teachers
    command: str | None = None  # for the record; None: that of the process
