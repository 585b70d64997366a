"""What a teacher is worth over several rounds, as a function of its parameters: a horizon beyond that of Eq. 8.

Legend: R rounds, N unroll length, B batch, V validation batch, J examples that judge.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack

import jax
import optax
from jax import lax

from l2t_jax.hypergradient import hypergradient
from l2t_jax.types import Array, Batch, How, Loss, PyTree, Student, StudentState, Task, Teacher
from l2t_jax.unroll import inner_objective, outer_objective, plain_gradient, student_step, unroll, unrolled_error


class Taught(NamedTuple):
    """A student in the middle of its life."""

    student: StudentState  # theta
    loss: PyTree  # phi
    hidden: PyTree  # h, of the teacher


class Window(NamedTuple):
    """What R rounds read."""

    train: Batch  # leaves [R, N, B, ...]
    validation: Batch  # leaves [R, V, ...]: what the teacher sees
    judge: Batch  # leaves [R, J, ...]: what it is judged by


def horizon(
    student: Student,
    task: Task,
    loss: Loss,
    teacher: Teacher,
    student_optimizer: optax.GradientTransformation,
    **how: Unpack[How],
) -> Callable[[PyTree, Taught, Window], tuple[Array, Taught]]:
    """Build R rounds of `l2t_dln` (second_stage="restart") under a teacher that does not learn, to be differentiated.

    For r = 0 .. R - 1:
      d = d e_val(theta_r after N steps under phi_r; V_r) / d phi_r, a constant
      [g, h_{r+1}] = T_tau(d, h_r);  phi_{r+1} = phi_r + gamma g
      theta_{r+1} = theta_r after the same N steps under phi_{r+1};  e_r = e_val(theta_{r+1}; J_r)
    A derivative of the errors with respect to tau flows through phi, h and theta. With R = 1 and J_0 = V_0 it is that
    of Eq. 8. Steps are computed again on the way back, a round at a time.

    Args:
      student, task, loss, teacher, student_optimizer: as in `l2t_dln`.
      **how: memory, at_once, check_gradient, of the hypergradient d.
    Returns:
      errors_of(tau, taught, window) -> errors [R], the student after R rounds.
    Source: ours, after the truncated differentiation by which optimizers are learned (Andrychowicz et al. 2016), whose
    inputs d are constants too.
    """
    inner, outer = inner_objective(student, task, loss), outer_objective(student, task)
    differentiate = hypergradient(inner, outer, student_optimizer, **how)
    run = partial(unroll, student_step(plain_gradient(inner), student_optimizer))
    replay = jax.checkpoint(unrolled_error(run, outer))

    def errors_of(tau: PyTree, taught: Taught, window: Window) -> tuple[Array, Taught]:
        def one(taught: Taught, read: Window) -> tuple[Taught, Array]:
            theta, phi, h = taught
            constant = lax.stop_gradient((phi, theta))
            d = differentiate(*constant, read.train, read.validation).gradient
            update, h = teacher.update(tau, h, lax.stop_gradient(d), phi)
            phi = optax.apply_updates(phi, update)
            error, (theta, _, _) = replay(phi, theta, read.train, read.judge)
            return Taught(theta, phi, h), error

        taught, errors = lax.scan(one, taught, window)
        return errors, taught

    return errors_of
