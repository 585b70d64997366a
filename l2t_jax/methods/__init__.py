"""Methods by name: one paper's algorithm, one file each, and how each is composed for a run.

A new method is one file here and one line in METHODS. A loss that needs no teacher is one by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from l2t_jax.losses import LOSSES, build_loss, fixed_losses
from l2t_jax.losses.embeddings import READS, SIGNALS, pairs_of
from l2t_jax.memory import FORWARD
from l2t_jax.methods.ala import Moved, ala, elements, pairs_of_classes
from l2t_jax.methods.common import merge_rounds, on_validation, over_lives
from l2t_jax.methods.deep_interactions import deep_interactions
from l2t_jax.methods.early_stopped import early_stopped
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dlf import l2t_dlf
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.mentornet import mentornet
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.methods.parts import (
    Parts,
    build_teacher_optimizer,
    dlf_loss,
    is_of_classes,
    sound,
    taught_loss,
    teacher_arguments,
)
from l2t_jax.methods.slf import slf
from l2t_jax.teachers import build_teacher, from_optax
from l2t_jax.types import Array, Method, PyTree, Teacher, rows

DLF_TEACHER_LR = 0.01  # the demo's


def _l2t_dln(parts: Parts, learn: bool) -> Method:
    settings, teacher, loss = parts.settings, parts.teacher, taught_loss(parts)
    if loss.reverse_only and parts.how.get("memory") in FORWARD:
        raise ValueError(
            f"its loss is differentiated in reverse alone: give memory=save, remat or auto, not {parts.how['memory']}."
        )
    if not isinstance(teacher, Teacher):
        teacher = build_teacher(**teacher_arguments(teacher, settings))
    method = l2t_dln(
        parts.student,
        parts.task,
        loss,
        teacher,
        parts.optimizer,
        build_teacher_optimizer(settings, parts.plan.rounds),
        second_stage=settings.second_stage,
        reset_hidden=settings.reset_hidden,
        teach_every=settings.teach_every,
        accept=settings.accept,
        learn=learn,
        **parts.shared,
    )
    learns = learn and jax.tree.leaves(jax.eval_shape(teacher.init, jax.random.key(0)))
    if learns and settings.teacher_schedule != "constant":
        method = method._replace(of_length=f"teacher_schedule={settings.teacher_schedule}")
    return over_lives(method, parts.plan.rounds) if settings.lives > 1 and learn else method


def _taught_by(
    loss: str, teacher: Callable[[], Teacher], *, single_steps: bool = False
) -> Callable[[Parts, bool], Method]:
    """Another learned loss in L2T-DLN's round, with an optax transformation as the teacher."""

    def build(parts: Parts, learn: bool) -> Method:
        method = l2t_dln(
            parts.student,
            parts.task,
            sound(loss, loss, parts),
            teacher(),
            parts.optimizer,
            optax.identity(),  # an optax teacher has nothing to learn
            second_stage="restart",
            teach_every=1 if single_steps else parts.settings.teach_every,
            learn=False,
            **parts.shared,
        )
        return merge_rounds(method, parts.steps_per_round) if single_steps else method

    return build


def _single_steps(build: Callable[[Parts], Method]) -> Callable[[Parts, bool], Method]:
    """A method that looks one student step ahead: as many of its rounds in one as a round has student steps."""
    return lambda parts, learn: merge_rounds(build(parts), parts.steps_per_round)


def _fixed(name: str) -> Callable[[Parts, bool], Method]:
    def build(parts: Parts, learn: bool) -> Method:
        loss = sound(name, name, parts)
        return fixed_loss(
            parts.student,
            parts.task,
            loss,
            parts.optimizer,
            stages=parts.plan.stages,
            steps=parts.steps,
            axis_name=parts.axis_name,
        )

    return build


def _early_stopped(parts: Parts) -> Method:
    """The task's fixed loss, stopped where the validation error was least."""
    plan = parts.plan
    plain = _fixed(parts.baseline)(parts, False)
    return early_stopped(plain, rounds=plan.rounds, rounds_per_pass=plan.rounds_per_pass)


def _l2t_dlf(parts: Parts, learn: bool) -> Method:
    return l2t_dlf(
        parts.student,
        parts.task,
        parts.optimizer,
        optax.sgd(DLF_TEACHER_LR),
        num_classes=parts.classes,
        steps=parts.steps,
        learn=learn,
        **(dlf_loss(parts)[1] | parts.knobs_of("l2t_dlf")),
        **parts.shared,
    )


def _moved(parts: Parts) -> Moved:
    """What ALA moves: of embeddings the parameters of the loss that is taught, of classes their pairs."""
    views = dict(parts.task.views)
    if READS not in views:
        return pairs_of_classes(parts.classes)
    if parts.loss not in SIGNALS:
        raise ValueError(f"it teaches {', '.join(SIGNALS)} of embeddings, and no other loss.")
    signals = SIGNALS[str(parts.loss)]

    def signals_of(outputs: PyTree, targets: PyTree) -> Array:
        read = views[READS](outputs, targets)
        return signals.of(pairs_of(read.outputs, read.targets))

    return elements(taught_loss(parts), signals_of, signals.low, signals.high)


def _ala(parts: Parts, learn: bool) -> Method:
    return ala(
        parts.student,
        parts.task,
        parts.optimizer,
        moved=_moved(parts),
        window=parts.steps_per_round,
        steps=parts.steps,
        learn=learn,
        axis_name=parts.axis_name,
        **parts.knobs_of("ala"),
    )


def _slf(parts: Parts) -> Method:
    return slf(
        parts.student,
        parts.task,
        parts.optimizer,
        num_classes=parts.classes,
        steps=parts.steps,
        **parts.knobs_of("slf"),
        **parts.shared,
    )


def _meta_weight_net(parts: Parts) -> Method:
    knobs = parts.knobs_of("meta_weight_net")
    return meta_weight_net(parts.student, parts.task, parts.optimizer, **knobs, **parts.shared)


def _deep_interactions(parts: Parts, learn: bool) -> Method:
    return deep_interactions(
        parts.student,
        parts.task,
        parts.optimizer,
        num_classes=parts.classes,
        **parts.knobs_of("deep_interactions"),
        **parts.shared,
    )


def _mentornet(curriculum: str, name: str) -> Callable[[Parts], Method]:
    def build(parts: Parts) -> Method:
        knobs = {"steps": parts.steps, "curriculum": curriculum, **parts.knobs_of(name)}
        return mentornet(parts.student, parts.task, parts.optimizer, **knobs, **parts.shared)

    return build


def _untaught(parts: Parts, learn: bool) -> Method:
    """The loss of L2T-DLF and ALA as it is before any teaching."""
    name, knobs = dlf_loss(parts)
    loss = build_loss(name, parts.classes, **knobs)._replace(learned="no")
    stages, axis_name = parts.plan.stages, parts.axis_name
    return fixed_loss(parts.student, parts.task, loss, parts.optimizer, stages=stages, axis_name=axis_name)


def _meta_only(parts: Parts) -> Method:
    """The task's fixed loss on the validation batches alone."""
    loss, axis_name = sound("meta_only", parts.baseline, parts), parts.axis_name
    return on_validation(fixed_loss(parts.student, parts.task, loss, parts.optimizer, axis_name=axis_name))


TAUGHT = ("l2t_dln", "l2t_dlf", "ala")  # whose trained teacher can teach a fresh student: a second row
METHODS: dict[str, Callable[[Parts, bool], Method]] = {  # name -> (parts, whether the teacher learns) -> method
    "l2t_dln": _l2t_dln,
    "l2t_dlf": _l2t_dlf,
    "ala": _ala,
    "slf": _single_steps(_slf),
    "meta_weight_net": _single_steps(_meta_weight_net),
    "deep_interactions": _single_steps(lambda p: _deep_interactions(p, False)),
    "l2rw": _single_steps(lambda p: l2rw(p.student, p.task, p.optimizer, **p.shared)),
    "mentornet": _single_steps(_mentornet("predefined", "mentornet")),
    "mentornet_data_driven": _single_steps(_mentornet("data_driven", "mentornet_data_driven")),
    "ml3": _taught_by("ml3", lambda: from_optax(optax.adam(1e-3))),
    "adalfl": _taught_by("ml3", lambda: from_optax(optax.adam(1e-3)), single_steps=True),
    "taylor_glo": _taught_by("taylor_glo", lambda: from_optax(optax.adam(1e-3))),
    "bilinear": _untaught,
    "meta_only": _single_steps(_meta_only),
    "early_stopped": lambda parts, learn: _early_stopped(parts),
}

# Whose signature says what can be set of a method by name; of L2T-DLN these are the rows of the preset's sheet.
KNOBS: dict[str, Callable[..., Any]] = {
    "l2t_dlf": l2t_dlf,
    "ala": ala,
    "slf": slf,
    "meta_weight_net": meta_weight_net,
    "deep_interactions": deep_interactions,
    "mentornet": mentornet,
    "mentornet_data_driven": mentornet,
    **{name: LOSSES[name] for name in (*fixed_losses(), *SIGNALS)},
}


def knobs_read(name: str, parts: Parts) -> set[str]:
    """Whose knobs a method reads: its own, and those of a loss that it takes over.

    Args:
      name: one of `method_names`.
      parts: what it is composed of.
    """
    of = {name, {"bilinear": "l2t_dlf", "adalfl": "ml3"}.get(name, name)}
    if name in ("early_stopped", "meta_only"):
        of.add(parts.baseline)
    if name in ("l2t_dln", "ala") and isinstance(parts.loss, str):
        of.add(parts.loss)
    return of


# Which give each example a weight of their own, or a plain mean: weights of examples would be lost without a word.
UNWEIGHTED = ("l2t_dlf", "l2rw", "mentornet", "mentornet_data_driven")
# Views of a task of which they are: whose policy, loss or weights are of classes, or of embeddings. The others take a
# task's own errors and its own loss.
_CLASSES = ("l2t_dlf", "slf", "meta_weight_net", "deep_interactions", "ml3", "adalfl", "taylor_glo", "bilinear")
VIEWS: dict[str, tuple[str, ...]] = {**dict.fromkeys(_CLASSES, ("rows",)), "ala": ("rows", READS)}
# Whose policy is told of the outputs themselves, a row for each example: pixels have more.
OF_EXAMPLES = ("ala",)


def method_names(*, view: str | None = None) -> list[str]:
    """Names of methods: METHODS, and the losses that need no teacher.

    Args:
      view: those that run where a task's losses read this view, "rows" where they are classified; by default all.
    """
    methods = [name for name in METHODS if view is None or view in VIEWS.get(name, (view,))]
    reads = {name: "rows" if is_of_classes(loss := LOSSES[name]()) else loss.reads for name in fixed_losses()}
    return [*methods, *(name for name, of in reads.items() if view in (None, of))]


def build_method(name: str, parts: Parts, *, learn: bool = True) -> Method:
    """A method by the name that METHODS or a loss has.

    Args:
      name: one of `method_names`.
      parts: what it is composed of.
      learn: False freezes its teacher, where it has one.
    Raises:
      ValueError: something of the parts does not do for it.
    """
    views = dict(parts.task.views)
    if name in VIEWS and not set(VIEWS[name]) & views.keys():
        _ = parts.classes  # raises, since there are none
    if name in OF_EXAMPLES and views.get("rows", rows) is not rows:
        raise ValueError("it is of examples that are classified, and this task's rows are parts of them: leave it out.")
    return (METHODS[name] if name in METHODS else _fixed(name))(parts, learn)
