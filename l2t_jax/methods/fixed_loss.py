"""A student trained with a loss that does not change: the baseline, on exactly a method's batches and steps.

Legend: S data stages of a round, N unroll length, B batch, V validation batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2t_jax.methods.common import finite, stage, train_stage
from l2t_jax.types import Array, Key, Loss, Method, MethodState, RoundBatches, Student, Task
from l2t_jax.unroll import init_state, inner_objective, outer_objective


def fixed_loss(
    student: Student,
    task: Task,
    loss: Loss,
    student_optimizer: optax.GradientTransformation,
    *,
    stages: int = 1,
    axis_name: str | None = None,
) -> Method:
    """Build plain training: S * N student steps a round.

    Args:
      student, task, loss: the records that are composed.
      student_optimizer: any optax transformation.
      stages: S of the method it is compared with, so that both see the same batches and take the same steps.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      a `Method`; the validation batch is only read for the record, never for training.
    """
    inner, outer = inner_objective(student, loss), outer_objective(student, task)
    train = train_stage(inner, outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, k_loss, _ = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        theta = init_state(student.init(k_student, inputs), student_optimizer)
        return MethodState(theta, loss.init(k_loss), {}, {}, {})

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches.train)  # [S, N, ...] -> [S * N, ...]
        done = train(state.loss, state.student, steps, stage(batches, -1)[1])
        return state._replace(student=done.state), {
            "train_loss": jnp.mean(done.losses),
            "validation_error": done.error,
            **{f"validation_{name}": value for name, value in done.metrics.items()},
            "finite": finite(("student", done.state.params), ("validation error", {"e_val": done.error})),
        }

    return Method(init=init, round=round, stages=stages, steps_per_round=stages)
