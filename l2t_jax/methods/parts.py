"""What a method is composed of for one run, and the pieces of L2T-DLN that settings describe."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import optax

from l2t_jax.losses import LOSSES, build_loss, check_loss
from l2t_jax.presets import Preset
from l2t_jax.types import Loss, Student, Task

SCHEDULES: dict[str, Callable[[float, int], optax.ScalarOrSchedule]] = {  # first rate, steps -> the rate of each step
    "constant": lambda rate, steps: rate,
    "cosine": optax.cosine_decay_schedule,
}


class Parts(NamedTuple):
    """What a method is composed of for one run.

    Rounds, stages and unroll length are those of l2t_dln; the others take its student steps on its training batches.
    """

    settings: Preset
    teacher: str  # of `TEACHERS`
    student: Student
    task: Task
    optimizer: optax.GradientTransformation  # the student's
    classes: int  # C
    rounds: int  # of a student's life
    stages: int  # S
    unroll_length: int  # N
    memory: str = "auto"
    axis_name: str | None = None
    at_once: int = 1  # runs that a device computes side by side
    check_gradient: bool = True

    @property
    def steps_per_round(self) -> int:
        """Student steps of a round."""
        return self.stages * self.unroll_length

    @property
    def steps(self) -> int:
        """T, student steps of the run."""
        return self.rounds * self.steps_per_round

    @property
    def shared(self) -> dict[str, Any]:
        """Where and how a hypergradient is computed; before the first round its gradients are checked."""
        return {name: getattr(self, name) for name in ("memory", "axis_name", "at_once", "check_gradient")}


def teacher_arguments(name: str, settings: Preset) -> dict[str, Any]:
    """What settings say of a teacher of the DLN: arguments of `teachers.build_teacher`."""
    arguments: dict[str, Any] = {"name": name, "dln_lr": settings.dln_lr}
    if name == "lstm":
        knobs = ("base", "update_sign", "preprocess", "odd", "silent", "window")
        arguments |= {knob: getattr(settings, knob) for knob in knobs}
    return arguments


def dln_arguments(settings: Preset) -> dict[str, Any]:
    """What settings say of the DLN: arguments of `losses.dln.dln`."""
    knobs = ("squash", "reduction", "residual", "compress")
    return {"form": settings.dln_form} | {name: getattr(settings, name) for name in knobs}


def build_dln(settings: Preset, classes: int) -> Loss:
    """The DLN that settings describe."""
    return build_loss("dln", classes, **dln_arguments(settings))


def build_teacher_optimizer(settings: Preset, rounds: int) -> optax.GradientTransformation:
    """The LSTM teacher's own optimizer, for student lives of so many rounds: a step a round, through all lives."""
    return optax.adam(SCHEDULES[settings.teacher_schedule](settings.teacher_lr, rounds * settings.lives))


def sound(method: str, name: str, classes: int, **knobs: Any) -> Loss:
    """A loss by name, tried out before a student is trained with it.

    Raises:
      LossError: what `check_loss` says of it, under the method's name.
    """
    return _tried_once(LOSSES.get(name), method, name, classes, tuple(knobs.items()))


@cache  # the trial compiles derivatives, and a method in two protocols has the same loss twice
def _tried_once(build: Any, method: str, name: str, classes: int, knobs: tuple[tuple[str, Any], ...]) -> Loss:
    loss = build_loss(name, classes, **dict(knobs))
    check_loss(loss, classes, method)
    return loss
