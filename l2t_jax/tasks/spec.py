"""What a run must know of a task beside its mathematics: its data sets, and where it differs from the others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2t_jax.data import Dataset, require
from l2t_jax.presets import Preset
from l2t_jax.types import PyTree, Student, Task


class Panel(NamedTuple):
    """An image and what is seen in it."""

    image: np.ndarray  # uint8 [H, W, 3]
    classes: np.ndarray | None = None  # [H, W] of its pixels
    boxes: np.ndarray | None = None  # [k, 4] left, top, right, bottom in pixels
    labels: tuple[str, ...] = ()  # of the boxes


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task by name: `build` makes the record that methods are composed of, the rest is of runs and tables."""

    build: Callable[..., Task]  # (data set, **knobs) -> task; its knobs are flags
    datasets: dict[str, Callable[[Path, bool], Dataset]]  # name -> (folder of data sets, whether to download) -> data
    # (data set, **knobs) -> as the task reads it, once a part is held out of it; its knobs are flags too
    encode: Callable[..., Dataset] | None = None
    open: Callable[..., Dataset] | None = None  # a user's own data from a path, where the task reads any
    check: Callable[[Dataset], None] = lambda dataset: None  # raises a DataError that names what is wrong
    # the kind [n] of each training example, of which equal shares are held out; None: all are one kind
    strata: Callable[[Dataset], np.ndarray] | None = None
    classes: bool = True  # whether rows are classified: its tasks have the view "rows"
    loss: str = "dln"  # of `LOSSES`: what L2T-DLN teaches in this task
    baseline: str = "cross_entropy"  # of `LOSSES`: the fixed loss that tables compare with
    # of flags: the data set and the student of a run that names none
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    student_knobs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of that student on that data set
    # rows of the preset's sheet where the task differs from every preset, e.g. N
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    # What a student sees in examples that were read: (Dataset.info, task, student, variables, examples) -> a panel for
    # each; without variables the truth. None: there is nothing to look at.
    illustrate: Callable[[Any, Task, Student, dict[str, PyTree] | None, PyTree], list[Panel]] | None = None
    # Likewise in words: -> what they are, {name: a line for each}; with variables {"": what the student makes of each}.
    in_words: Callable[[Any, Task, Student, dict[str, PyTree] | None, PyTree], dict[str, list[str]]] | None = None

    @property
    def builders(self) -> tuple[Callable[..., Any], ...]:
        """Whose keywords are the task's knobs."""
        return (self.build,) if self.encode is None else (self.build, self.encode)


def has(info: type, *fields: str) -> Callable[[Dataset], None]:
    """Build the check that both parts of a data set have these fields, and that what is known of it is of this kind.

    Args:
      info: the class of `Dataset.info`.
      *fields: of each part.
    Returns:
      a `TaskSpec.check`, which raises a DataError that names what is missing.
    """

    def check(dataset: Dataset) -> None:
        for part, examples in (("train", dataset.train), ("test", dataset.test)):
            missing = set(fields) - set(examples)
            require(not missing, f"{dataset.name} {part}: there is no {' and no '.join(sorted(missing))}.")
        require(isinstance(dataset.info, info), f"{dataset.name}: info must be `{info.__name__}`.")

    return check


def settings_for(spec: TaskSpec, preset: Preset) -> Preset:
    """A column of the preset's sheet, with the rows that are the task's own."""
    return dataclasses.replace(preset, **spec.settings)
