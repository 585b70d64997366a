"""What a method is composed of for one run, and the pieces of L2T-DLN that settings describe."""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from l2t_jax.data.order import Plan
from l2t_jax.inputs import known
from l2t_jax.knobs import knobs_for
from l2t_jax.losses import LOSSES, build_loss, check_loss
from l2t_jax.optimizers import inverse_sqrt
from l2t_jax.presets import Preset
from l2t_jax.types import How, Loss, Student, Task, Teacher

SCHEDULES: dict[str, Callable[[float, int], optax.ScalarOrSchedule]] = {  # first rate, steps -> the rate of each step
    "constant": lambda rate, steps: rate,
    "cosine": optax.cosine_decay_schedule,
    "inverse_sqrt": inverse_sqrt,
}


MANY_CLASSES, RANK = 256, 8  # beyond so many the matrix of L2T-DLF is of so low a rank


class Parts(NamedTuple):
    """What a method is composed of for one run.

    The plan is that of l2t_dln; the others take its student steps on its training batches.
    """

    settings: Preset
    teacher: str | Teacher  # of `TEACHERS`
    student: Student
    task: Task
    loss: str | Loss  # what L2T-DLN teaches, of `LOSSES`
    baseline: str  # of `LOSSES`: the task's fixed loss
    optimizer: optax.GradientTransformation  # the student's
    plan: Plan  # rounds of a student's life, stages S and unroll length N, as L2T-DLN reads them
    axis_name: str | None = None
    how: How = How(check_gradient=True)  # before the first round gradients are checked
    knobs: Mapping[str, Any] = MappingProxyType({})  # of losses and methods where they differ, "NAME.KNOB": value

    @property
    def classes(self) -> int:
        """C.

        Raises:
          ValueError: the task has no rows that are classified.
        """
        views = [name for name, _ in self.task.views]
        if "rows" not in views:
            raise ValueError(f"it is of classes, and this task has none (a loss may read its {', '.join(views)}).")
        return self.task.outputs

    def knobs_of(self, name: str) -> dict[str, Any]:
        """What is asked for of a loss or a method: keywords of its builder."""
        return knobs_for(self.knobs, name)

    @property
    def steps_per_round(self) -> int:
        """Student steps of a round."""
        return self.plan.stages * self.plan.unroll_length

    @property
    def steps(self) -> int:
        """T, student steps of the run; 1 where it has none, since schedules are of at least one."""
        return max(1, self.plan.rounds * self.steps_per_round)

    @property
    def shared(self) -> dict[str, Any]:
        """Where and how a hypergradient is computed."""
        return {"axis_name": self.axis_name, **self.how}


def teacher_arguments(name: str, settings: Preset) -> dict[str, Any]:
    """What settings say of a teacher of the DLN: arguments of `teachers.build_teacher`."""
    arguments: dict[str, Any] = {"name": name, "dln_lr": settings.dln_lr}
    if name == "lstm":
        knobs = ("base", "update_sign", "preprocess", "odd", "silent", "window")
        arguments |= {knob: getattr(settings, knob) for knob in knobs}
        if settings.units != Preset.units:
            arguments["units"] = [int(units) for units in settings.units.split("-")]  # a list, as JSON has it
    return arguments


def dln_arguments(settings: Preset) -> dict[str, Any]:
    """What settings say of the DLN: arguments of `losses.dln.dln`."""
    knobs = ("squash", "reduction", "residual", "compress")
    return {"form": settings.dln_form} | {name: getattr(settings, name) for name in knobs}


def build_teacher_optimizer(settings: Preset, rounds: int) -> optax.GradientTransformation:
    """The LSTM teacher's own optimizer, for student lives of so many rounds: a step a round, through all lives."""
    return optax.adam(SCHEDULES[settings.teacher_schedule](settings.teacher_lr, max(1, rounds * settings.lives)))


def taught_loss(parts: Parts) -> Loss:
    """The loss that L2T-DLN teaches: the DLN that settings describe, or what the task has in its place."""
    if isinstance(parts.loss, Loss):
        if is_of_classes(parts.loss):
            check_loss(parts.loss, parts.classes, "loss")
        return parts.loss
    knobs = dln_arguments(parts.settings) if parts.loss == "dln" else {}
    return sound("l2t_dln", parts.loss, parts, **knobs)


def dlf_loss(parts: Parts) -> tuple[str, dict[str, Any]]:
    """The loss that L2T-DLF teaches, by name and knobs: of many classes the low-rank form, or where a rank is given."""
    rank = parts.knobs_of("l2t_dlf").get("rank", RANK if parts.classes > MANY_CLASSES else 0)
    return ("bilinear_low_rank", {"rank": rank}) if rank else ("bilinear", {})


def is_of_classes(loss: Loss) -> bool:
    """Whether a loss reads rows that are classified."""
    return loss.reads in ("rows", "head")


def sound(method: str, name: str, parts: Parts, **knobs: Any) -> Loss:
    """A loss by name, tried out before a student is trained with it.

    Raises:
      LossError: what `check_loss` says of it, under the method's name.
      ValueError: it is of classes, and the task has none.
    """
    build, knobs = LOSSES[known(f"loss {name!r}", name, LOSSES)], parts.knobs_of(name) | knobs
    if not is_of_classes(loss := build(**knobs)):  # it reads what is the task's own, when the first round is traced
        return loss
    return _tried_once(build, method, name, parts.classes, tuple(knobs.items()))


@cache  # the trial compiles derivatives, and a method in two protocols has the same loss twice
def _tried_once(build: Any, method: str, name: str, classes: int, knobs: tuple[tuple[str, Any], ...]) -> Loss:
    loss = build_loss(name, classes, **dict(knobs))
    check_loss(loss, classes, method)
    return loss
