"""L2T-DLN, Algorithm 1: a student, the dynamic loss network (DLN) it is trained with, and the teacher of the DLN.

Legend: S data stages of a round, N unroll length, B batch, V validation batch; theta student, phi DLN, tau teacher.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from l2t_jax.data.order import require_counts
from l2t_jax.hypergradient import Hypergradient, hypergradient
from l2t_jax.inputs import known
from l2t_jax.methods.common import few_entries, finite, pull_of, stage_data, train_stage
from l2t_jax.optimizers import check_optimizer, update_with
from l2t_jax.types import (
    Array,
    Batch,
    How,
    Key,
    Loss,
    Method,
    MethodState,
    PyTree,
    RoundBatches,
    Student,
    Task,
    Teacher,
    unscheduled,
)
from l2t_jax.unroll import init_state, inner_objective, outer_objective

STAGES = {"continue": 2, "restart": 1}  # -> S, and the multiples of N student steps that a round keeps
RESET = ("never", "epoch")
ACCEPT = ("always", "not_worse")


def l2t_dln(
    student: Student,
    task: Task,
    loss: Loss,
    teacher: Teacher,
    student_optimizer: optax.GradientTransformation,
    teacher_optimizer: optax.GradientTransformation,
    *,
    second_stage: str = "continue",
    reset_hidden: str = "never",
    teach_every: int = 1,
    accept: str = "always",
    learn: bool = True,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build L2T-DLN.

    One round (the letters are those of Algorithm 1, with its indices corrected):
      A) theta -> theta_A: N student steps under phi.                                    (2)
      B) d = d e_val(theta_A) / d phi, through the N steps.                              (4-6)
      C) [g, h] = T_tau(d, h);  phi' = phi + gamma g.                                    (3)
      D) N student steps under phi'.
      E) d' = d e_val(end of D) / d phi';  tau gradient = gamma (dg / d tau)^T d'.       (8)
      F) tau <- Adam(tau gradient).
    With teach_every = k the student goes k - 1 times as many steps under phi before A, of which nothing learns.

    Args:
      student, task, loss, teacher: the records that are composed.
      student_optimizer: the paper's is plain `optax.sgd(0.1)`.
      teacher_optimizer: of tau; the paper's is `optax.adam(1e-3)`.
      second_stage: "continue" (paper): D goes on from theta_A with N new batches and a new validation batch, 2N
        steps a round are kept. "restart" (released code): D starts again from theta with the same batches and
        replaces A, N steps a round are kept.
      reset_hidden: "never" (released code; the paper is silent) carries h through all epochs, "epoch" clears it.
      teach_every: k; the paper's is 1. A round has k S N steps: a step costs a k-th of the hypergradients. Ours.
      accept: "always" (paper) takes every update of the DLN. "not_worse" takes phi' and the student it taught only
        where their validation error is not above that of phi and its student, which after a "restart" were trained
        and judged on the same batches; else it keeps those. The teacher learns from both. Not in the paper.
      learn: False freezes tau: the transfer protocol, in which E and F are left out.
      axis_name: mapped axis over which batches are split, if any.
      **how: memory, at_once, check_gradient, as in `hypergradient`.
    Returns:
      a `Method`. Its state is theta (with BatchNorm and optimizer state), phi, tau, h, and Adam's state.
    Raises:
      ValueError: an unknown `second_stage`, `reset_hidden`, `accept` or `memory`; "not_worse" with "continue", whose
        stages are not of the same batches; a loss that no teacher can rewrite: without parameters, with a schedule, or
        with parameters that are learned otherwise; an optimizer that is none; `teach_every` below 1; a round whose
        data have another number of stages.
    Source: L2T-DLN (NeurIPS 2023), Algorithm 1; Eq. 8's constants are theta at the start of D, the old phi, the
    teacher's input d and its previous h, so tau is trained by one-step truncated differentiation.
    """
    for name, value, names in (
        ("second_stage", second_stage, STAGES),
        ("reset_hidden", reset_hidden, RESET),
        ("accept", accept, ACCEPT),
    ):
        known(f"{name} {value!r}", value, names)
    if accept == "not_worse" and second_stage == "continue":
        raise ValueError('accept "not_worse" compares two stages on the same batches: use second_stage "restart".')
    require_counts(teach_every=(teach_every, 1))
    _check_loss(loss)
    check_optimizer(teacher_optimizer, "the teacher's optimizer")
    stages = STAGES[second_stage] * teach_every
    untaught = stages - STAGES[second_stage]
    inner = inner_objective(student, task, loss, axis_name=axis_name)
    outer = outer_objective(student, task, axis_name=axis_name)
    differentiate = hypergradient(
        inner,
        outer,
        student_optimizer,
        axis_name=axis_name,
        **how,
    )
    only_train = train_stage(inner, outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, k_teacher = jax.random.split(key, 3)
        phi, tau = loss.init(k_loss), teacher.init(k_teacher)
        theta = init_state(student.init(k_student, inputs), student_optimizer)
        return MethodState(theta, phi, tau, teacher.hidden(phi), teacher_optimizer.init(tau))

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        h = state.carried
        if reset_hidden == "epoch":
            h = jax.tree.map(lambda x: jnp.where(batches.first_of_epoch, jnp.zeros_like(x), x), h)

        begin = state.student
        if untaught:
            begin = only_train(state.loss, begin, *_in_a_row(batches, untaught, stages)).state
        first = differentiate(state.loss, begin, *stage_data(batches, untaught, stages))  # A, B

        def teach(tau: PyTree) -> tuple[PyTree, PyTree]:
            update, hidden = teacher.update(tau, h, first.gradient, state.loss)
            return optax.apply_updates(state.loss, update), hidden

        phi, to_tau, h = jax.vjp(teach, state.teacher, has_aux=True)  # C

        theta = first.state if second_stage == "continue" else begin
        tau, adam = state.teacher, state.optimizer_state
        if learn and jax.tree.leaves(tau):
            second = differentiate(phi, theta, *stage_data(batches, -1, stages))  # D
            (tau_gradient,) = to_tau(second.gradient)  # E
            update, adam = update_with(teacher_optimizer, tau_gradient, adam, tau, "the teacher's optimizer")
            tau = optax.apply_updates(tau, update)  # F
        else:
            second = only_train(phi, theta, *stage_data(batches, -1, stages))
            tau_gradient = {}  # nothing learns from stage D, so nothing is differentiated
        if accept == "not_worse":
            taken = second.error <= first.error
            keep = lambda old, new: jax.tree.map(lambda a, b: jnp.where(taken, b, a), old, new)  # noqa: E731
            phi, second = keep(state.loss, phi), keep(first._replace(gradient=second.gradient), second)
        metrics = _metrics(first, second, state.loss, phi, tau_gradient)
        return MethodState(second.state, phi, tau, h, adam), metrics

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        return pull_of(student, task, loss, state.student.variables, state.loss, batch)

    return Method(init=init, round=round, stages=stages, steps_per_round=stages, pull=pull)


def _in_a_row(batches: RoundBatches, count: int, stages: int) -> tuple[Batch, Batch]:
    """The training batches of the first stages as those of one (leaves [count N, B, ...]), and a validation batch."""
    _, validation = stage_data(batches, count - 1, stages)
    return jax.tree.map(lambda x: x[:count].reshape(-1, *x.shape[2:]), batches.train), validation


def _check_loss(loss: Loss) -> None:
    """Check that a teacher can rewrite a loss."""
    if loss.at is not unscheduled:
        raise ValueError("this loss has a schedule, which a teacher's updates would be at odds with: use fixed_loss.")
    if loss.learned != "teacher":
        raise ValueError(
            f'this loss says that its parameters are learned by "{loss.learned}", not by a teacher: use fixed_loss, or '
            'let a teacher have them by loss._replace(learned="teacher").'
        )
    if not jax.tree.leaves(jax.eval_shape(loss.init, jax.random.key(0))):
        raise ValueError("this loss has no parameters for a teacher to rewrite: use fixed_loss, or give it an init.")


def _metrics(
    first: Hypergradient, second: Hypergradient, phi: PyTree, new_phi: PyTree, tau_gradient: PyTree
) -> dict[str, Any]:
    update = jax.tree.map(jnp.subtract, new_phi, phi)
    return {
        "train_loss": jnp.mean(second.losses),
        "validation_error_stage_one": first.error,
        "validation_error": second.error,
        **{f"validation_{name}": value for name, value in second.metrics.items()},
        "hypergradient_norm": optax.tree.norm(first.gradient),
        "hypergradient_norm_stage_two": optax.tree.norm(second.gradient),
        "dln_update_norm": optax.tree.norm(update),
        "dln_norm": optax.tree.norm(new_phi),
        "teacher_gradient_norm": optax.tree.norm(tau_gradient),
        **few_entries(new_phi),
        "finite": finite(
            ("validation error of stage one", {"e_val": first.error}),
            ("hypergradient of stage one", first.gradient),
            ("DLN update", update),
            ("validation error of stage two", {"e_val": second.error}),
            ("hypergradient of stage two", second.gradient),
            ("teacher gradient", tau_gradient),
        ),
    }
