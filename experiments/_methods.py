"""Methods by the names that --method knows: how each is composed for a run.

A new method is one file in l2t_jax/methods and one line in METHODS. A loss that needs no teacher is one by itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import optax

from experiments._config import Config, UsageError
from experiments.presets import Preset
from l2t_jax.losses import LOSSES, LossError, build_loss, check_loss, fixed_losses
from l2t_jax.methods.ala import ala
from l2t_jax.methods.common import on_validation, reborn, several
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dlf import l2t_dlf
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.mentornet import mentornet
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.methods.slf import slf
from l2t_jax.runs.parallel import Layout
from l2t_jax.runs.training import Schedule
from l2t_jax.teachers import build_teacher, from_optax
from l2t_jax.types import Loss, Method, Student, Task, Teacher

DLF_TEACHER_LR = 0.01  # the demo's
SCHEDULES: dict[str, Callable[[float, int], optax.ScalarOrSchedule]] = {  # first rate, steps -> the rate of each step
    "constant": lambda rate, steps: rate,
    "cosine": optax.cosine_decay_schedule,
}


class Entry(NamedTuple):
    """A row of the table: a method, whose trained teacher it takes over, if any, and how many students it trains."""

    name: str
    method: Method
    teacher_of: str | None = None
    lives: int = 1  # of so many rounds as the run has for every student; the last one is judged


class Parts(NamedTuple):
    """What a method is composed of for one run."""

    config: Config
    student: Student
    task: Task
    optimizer: optax.GradientTransformation  # the student's
    classes: int
    schedule: Schedule  # of l2t_dln; the others take its student steps on its training batches
    layout: Layout

    @property
    def steps_per_round(self) -> int:
        """Student steps of a round."""
        return self.schedule.stages * self.schedule.unroll_length

    @property
    def steps(self) -> int:
        """T, student steps of the run."""
        return self.schedule.rounds * self.steps_per_round

    @property
    def shared(self) -> dict[str, Any]:
        """Where and how a hypergradient is computed; before the first round its gradients are checked."""
        how = {"memory": self.config.memory, "axis_name": self.layout.axis_name, "at_once": self.layout.seeds}
        return how | {"check_gradient": True}


def teacher_arguments(config: Config) -> dict[str, Any]:
    """What the flags say of the teacher of the DLN: arguments of `teachers.build_teacher`."""
    settings = config.settings
    arguments: dict[str, Any] = {"name": config.teacher, "dln_lr": settings.dln_lr}
    if config.teacher == "lstm":
        knobs = ("base", "update_sign", "preprocess", "odd", "silent", "window")
        arguments |= {name: getattr(settings, name) for name in knobs}
    return arguments


def dln_arguments(config: Config) -> dict[str, Any]:
    """What the flags say of the DLN: arguments of `losses.dln.dln`."""
    settings = config.settings
    knobs = ("squash", "reduction", "residual", "compress")
    return {"form": settings.dln_form} | {name: getattr(settings, name) for name in knobs}


def build_dln(config: Config, classes: int) -> Loss:
    """The DLN that the flags describe."""
    return build_loss("dln", classes, **dln_arguments(config))


def build_teacher_optimizer(settings: Preset, rounds: int) -> optax.GradientTransformation:
    """The LSTM teacher's own optimizer, for student lives of so many rounds: a step a round, through all lives."""
    return optax.adam(SCHEDULES[settings.teacher_schedule](settings.teacher_lr, rounds * settings.lives))


def _l2t_dln(parts: Parts, learn: bool) -> Method:
    settings = parts.config.settings
    method = l2t_dln(
        parts.student,
        parts.task,
        _sound("l2t_dln", "dln", parts.classes, **dln_arguments(parts.config)),
        build_teacher(**teacher_arguments(parts.config)),
        parts.optimizer,
        build_teacher_optimizer(settings, parts.schedule.rounds),
        second_stage=settings.second_stage,
        reset_memory=settings.reset_memory,
        accept=settings.accept,
        learn=learn,
        **parts.shared,
    )
    return reborn(method, parts.schedule.rounds) if settings.lives > 1 and learn else method


def _taught_by(
    loss: str, teacher: Callable[[], Teacher], *, single_steps: bool = False
) -> Callable[[Parts, bool], Method]:
    """Another learned loss in L2T-DLN's round, with an optax transformation as the teacher."""

    def build(parts: Parts, learn: bool) -> Method:
        method = l2t_dln(
            parts.student,
            parts.task,
            _sound(loss, loss, parts.classes),
            teacher(),
            parts.optimizer,
            optax.identity(),  # an optax teacher has nothing to learn
            second_stage="restart",
            learn=False,
            **parts.shared,
        )
        return several(method, parts.steps_per_round) if single_steps else method

    return build


def _single_steps(build: Callable[[Parts], Method]) -> Callable[[Parts, bool], Method]:
    """A method that looks one student step ahead: as many of its rounds in one as a round has student steps."""
    return lambda parts, learn: several(build(parts), parts.steps_per_round)


def _fixed(name: str) -> Callable[[Parts, bool], Method]:
    def build(parts: Parts, learn: bool) -> Method:
        loss = _sound(name, name, parts.classes)
        return fixed_loss(
            parts.student,
            parts.task,
            loss,
            parts.optimizer,
            stages=parts.schedule.stages,
            steps=parts.steps,
            axis_name=parts.layout.axis_name,
        )

    return build


def _l2t_dlf(parts: Parts, learn: bool) -> Method:
    return l2t_dlf(
        parts.student,
        parts.task,
        parts.optimizer,
        optax.sgd(DLF_TEACHER_LR),
        num_classes=parts.classes,
        steps=parts.steps,
        learn=learn,
        **parts.shared,
    )


def _ala(parts: Parts, learn: bool) -> Method:
    return ala(
        parts.student,
        parts.task,
        parts.optimizer,
        num_classes=parts.classes,
        window=parts.steps_per_round,
        steps=parts.steps,
        learn=learn,
        axis_name=parts.layout.axis_name,
    )


def _slf(parts: Parts) -> Method:
    return slf(parts.student, parts.task, parts.optimizer, num_classes=parts.classes, steps=parts.steps, **parts.shared)


def _mentornet(curriculum: str) -> Callable[[Parts], Method]:
    return lambda parts: mentornet(
        parts.student, parts.task, parts.optimizer, steps=parts.steps, curriculum=curriculum, **parts.shared
    )


def _untaught(parts: Parts, learn: bool) -> Method:
    """The loss of L2T-DLF and ALA as it is before any teaching."""
    loss = build_loss("bilinear", parts.classes)._replace(learned="no")
    stages, axis_name = parts.schedule.stages, parts.layout.axis_name
    return fixed_loss(parts.student, parts.task, loss, parts.optimizer, stages=stages, axis_name=axis_name)


def _meta_only(parts: Parts) -> Method:
    """Cross entropy on the validation batches alone."""
    loss, axis_name = build_loss("cross_entropy", parts.classes), parts.layout.axis_name
    return on_validation(fixed_loss(parts.student, parts.task, loss, parts.optimizer, axis_name=axis_name))


TAUGHT = ("l2t_dln", "l2t_dlf", "ala")  # whose trained teacher can teach a fresh student: a second row
METHODS: dict[str, Callable[[Parts, bool], Method]] = {  # name -> (parts, whether the teacher learns) -> method
    "l2t_dln": _l2t_dln,
    "l2t_dlf": _l2t_dlf,
    "ala": _ala,
    "slf": _single_steps(_slf),
    "meta_weight_net": _single_steps(lambda p: meta_weight_net(p.student, p.task, p.optimizer, **p.shared)),
    "l2rw": _single_steps(lambda p: l2rw(p.student, p.task, p.optimizer, **p.shared)),
    "mentornet": _single_steps(_mentornet("predefined")),
    "mentornet_data_driven": _single_steps(_mentornet("data_driven")),
    "ml3": _taught_by("ml3", lambda: from_optax(optax.adam(1e-3))),
    "adalfl": _taught_by("ml3", lambda: from_optax(optax.adam(1e-3)), single_steps=True),
    "taylor_glo": _taught_by("taylor_glo", lambda: from_optax(optax.adam(1e-3))),
    "bilinear": _untaught,
    "meta_only": _single_steps(_meta_only),
}


def method_names() -> list[str]:
    """All that --method knows: METHODS, and the losses that need no teacher."""
    return [*METHODS, *fixed_losses()]


def build_entries(parts: Parts, elsewhere: bool = False) -> list[Entry]:
    """The rows of the table, in the order of --method.

    A method with a teacher gives two, one for each protocol; only the transfer, where its teacher is from elsewhere.
    """
    entries = []
    for name in parts.config.methods:
        try:
            build = METHODS[name] if name in METHODS else _fixed(name)
            if name not in TAUGHT or not elsewhere:
                lives = parts.config.settings.lives if name == "l2t_dln" else 1
                entries.append(Entry(name, build(parts, True), lives=lives))
            if name in TAUGHT:
                entries.append(Entry(f"{name}_transfer", build(parts, False), name))
        except ValueError as error:
            raise UsageError(f"--method={name}: {error}") from error
    return entries


def _sound(method: str, name: str, classes: int, **knobs: Any) -> Loss:
    """A loss by name, tried out before a student is trained with it."""
    try:
        return _tried_once(LOSSES.get(name), method, name, classes, tuple(knobs.items()))
    except LossError as error:
        raise UsageError(f"--method: {error}") from error


@cache  # the trial compiles derivatives, and a method in two protocols has the same loss twice
def _tried_once(build: Any, method: str, name: str, classes: int, knobs: tuple[tuple[str, Any], ...]) -> Loss:
    loss = build_loss(name, classes, **dict(knobs))
    check_loss(loss, classes, method)
    return loss
