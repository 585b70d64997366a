"""Methods by name: one paper's algorithm, one file each, and how each is composed for a run.

A new method is one file here and one line in METHODS. A loss that needs no teacher is one by itself.
"""

from collections.abc import Callable

import optax

from l2t_jax.losses import build_loss, fixed_losses
from l2t_jax.methods.ala import ala
from l2t_jax.methods.common import on_validation, reborn, several
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dlf import l2t_dlf
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.mentornet import mentornet
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.methods.parts import Parts, build_teacher_optimizer, dln_arguments, sound, teacher_arguments
from l2t_jax.methods.slf import slf
from l2t_jax.teachers import build_teacher, from_optax
from l2t_jax.types import Method, Teacher

DLF_TEACHER_LR = 0.01  # the demo's


def _l2t_dln(parts: Parts, learn: bool) -> Method:
    settings = parts.settings
    method = l2t_dln(
        parts.student,
        parts.task,
        sound("l2t_dln", "dln", parts.classes, **dln_arguments(parts.settings)),
        build_teacher(**teacher_arguments(parts.teacher, parts.settings)),
        parts.optimizer,
        build_teacher_optimizer(settings, parts.rounds),
        second_stage=settings.second_stage,
        reset_memory=settings.reset_memory,
        accept=settings.accept,
        learn=learn,
        **parts.shared,
    )
    return reborn(method, parts.rounds) if settings.lives > 1 and learn else method


def _taught_by(
    loss: str, teacher: Callable[[], Teacher], *, single_steps: bool = False
) -> Callable[[Parts, bool], Method]:
    """Another learned loss in L2T-DLN's round, with an optax transformation as the teacher."""

    def build(parts: Parts, learn: bool) -> Method:
        method = l2t_dln(
            parts.student,
            parts.task,
            sound(loss, loss, parts.classes),
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
        loss = sound(name, name, parts.classes)
        return fixed_loss(
            parts.student,
            parts.task,
            loss,
            parts.optimizer,
            stages=parts.stages,
            steps=parts.steps,
            axis_name=parts.axis_name,
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
        axis_name=parts.axis_name,
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
    stages, axis_name = parts.stages, parts.axis_name
    return fixed_loss(parts.student, parts.task, loss, parts.optimizer, stages=stages, axis_name=axis_name)


def _meta_only(parts: Parts) -> Method:
    """Cross entropy on the validation batches alone."""
    loss, axis_name = build_loss("cross_entropy", parts.classes), parts.axis_name
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


def build_method(name: str, parts: Parts, *, learn: bool = True) -> Method:
    """A method by the name that METHODS or a loss has.

    Args:
      name: one of `method_names`.
      parts: what it is composed of.
      learn: False freezes its teacher, where it has one.
    Raises:
      ValueError: something of the parts does not do for it.
    """
    return (METHODS[name] if name in METHODS else _fixed(name))(parts, learn)
