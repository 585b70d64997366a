"""A student trained with a loss that no teacher changes: the baseline, on exactly a method's batches and steps.

Legend: S data stages of a round, N unroll length, B batch, V validation batch, T student steps of a run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.methods.common import finite, pull_of, stage_data
from l2t_jax.types import (
    Array,
    Batch,
    Key,
    Loss,
    Method,
    MethodState,
    PyTree,
    RoundBatches,
    Student,
    StudentState,
    Task,
    unscheduled,
)
from l2t_jax.unroll import init_state, inner_objective, mean_over, outer_objective, plain_gradient, student_step


def fixed_loss(
    student: Student,
    task: Task,
    loss: Loss,
    student_optimizer: optax.GradientTransformation,
    *,
    stages: int = 1,
    steps: int | None = None,
    axis_name: str | None = None,
) -> Method:
    """Build plain training: S * N student steps a round.

    Args:
      student, task, loss: the records that are composed. A loss with `learned="student"` is trained beside the student,
        on the same batches and by the same optimizer; one with a schedule is taken as it is at each step.
      student_optimizer: any optax transformation.
      stages: S of the method it is compared with, so that both see the same batches and take the same steps.
      steps: T, which a loss with a schedule needs.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      a `Method`; the validation batch is only read for the record, never for training.
    Raises:
      ValueError: the loss has a schedule, and T is not given.
    """
    if loss.at is not unscheduled and steps is None:
        raise ValueError("this loss has a schedule: give steps, the student steps of the whole run.")
    inner = inner_objective(student, task, loss, axis_name=axis_name)
    outer = outer_objective(student, task, axis_name=axis_name)
    beside = loss.learned == "student"

    def at(phi: PyTree, count: Array) -> PyTree:
        constant = loss.learned == "no"  # then what init gives is no state of the run
        params = loss.init(jax.random.key(0)) if constant else phi
        return params if loss.at is unscheduled else loss.at(params, count / (steps or 1))

    def joined(theta: PyTree, phi: PyTree) -> PyTree:  # what the student's optimizer updates
        return {"student": theta, "loss": phi} if beside else theta

    def apart(params: PyTree, phi: PyTree) -> tuple[PyTree, PyTree]:
        return (params["student"], params["loss"]) if beside else (params, phi)

    def objective(params: PyTree, stats: PyTree, rest: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
        phi, count = rest
        theta, phi = apart(params, phi)
        return inner(theta, stats, at(phi, count), batch)

    def turned(params: PyTree, stats: PyTree, rest: PyTree, batch: PyTree) -> tuple[PyTree, Array, PyTree]:
        # Turned round after it was taken: inside the loss, second derivatives would not be those of what happens.
        found, value, stats = plain_gradient(objective)(params, stats, rest, batch)
        return found | {"loss": loss.descent(found["loss"])}, value, stats

    gradient = turned if beside else plain_gradient(objective)
    step = student_step(gradient, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, _ = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        variables, phi = student.init(k_student, inputs), {} if loss.learned == "no" else loss.init(k_loss)
        both = init_state({**variables, "params": joined(variables["params"], phi)}, student_optimizer)
        return MethodState(both._replace(params=variables["params"]), phi, {}, {"steps": jnp.int32(0)}, {})

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        train = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches.train)  # [S, N, ...] -> [S * N, ...]

        def take(carry: tuple[StudentState, Array], batch: PyTree) -> tuple[tuple[StudentState, Array], Array]:
            both, count = carry
            both, value = step(both, (state.loss, count), batch)
            return (both, count + 1), value

        start = state.student._replace(params=joined(state.student.params, state.loss))
        (both, count), losses = lax.scan(take, (start, state.carried["steps"]), train)
        params, phi = apart(both.params, state.loss)
        theta = both._replace(params=params)
        error, metrics = outer(theta.params, theta.batch_stats, stage_data(batches, -1, stages)[1])
        error, losses, metrics = mean_over(axis_name, (error, losses, metrics))
        return state._replace(student=theta, loss=phi, carried={"steps": count}), {
            "train_loss": jnp.mean(losses),
            "validation_error": error,
            **{f"validation_{name}": value for name, value in metrics.items()},
            "finite": finite(("student", both.params), ("validation error", {"e_val": error})),
        }

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        return pull_of(student, task, loss, state.student.variables, at(state.loss, state.carried["steps"]), batch)

    of_length = "" if loss.at is unscheduled else "the schedule"
    return Method(init=init, round=round, stages=stages, steps_per_round=stages, pull=pull, of_length=of_length)
