"""Early stopping: of a training run the student that was best on the clean examples, not the last one.

Legend: S data stages of a round, V validation batch, R rounds of a run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from l2t_jax.types import Array, Batch, Key, Method, MethodState, PyTree, RoundBatches, Student, StudentState, Task
from l2t_jax.unroll import mean_over, outer_objective


class Kept(NamedTuple):
    """What `early_stopped` carries beside what the method does."""

    carried: PyTree  # the method's own
    rounds: Array  # [] int32, done
    errors: Array  # [] sum of the validation errors of this pass
    least: Array  # [] the least mean of a pass
    best: StudentState  # the student then


def early_stopped(
    method: Method, student: Student, task: Task, *, rounds: int, rounds_per_pass: int, axis_name: str | None = None
) -> Method:
    """Measure a method's student on the clean examples, and end with the best student and not with the last.

    e_p = mean of e_val over the K rounds of pass p, each measured with the student as it is after its round; the
    student that is kept is that after the last round of the p with the least e_p. A last pass that is incomplete is not
    compared, unless it is the only one.

    Args:
      method: whose student is measured, e.g. of `fixed_loss`.
      student, task: the records that it is composed of.
      rounds: R, of the run. In the last of them the best student takes the place of the last one.
      rounds_per_pass: K, in which every example of the validation part is read once.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      a `Method` that carries a `Kept`.
    Raises:
      ValueError: a pass has no round.
    Source: ours, for what is usual where there are clean examples. Training goes on after the best student: all runs
    cost the same steps, and there is no patience to choose.
    """
    if rounds_per_pass < 1:
        raise ValueError(f"rounds_per_pass={rounds_per_pass!r}: give at least 1.")
    outer = outer_objective(student, task, axis_name=axis_name)
    period = max(1, min(rounds_per_pass, rounds))

    def init(key: Key, inputs: Array) -> MethodState:
        state = method.init(key, inputs)
        zero = jnp.zeros((), jnp.result_type(float))
        return state._replace(carried=Kept(state.carried, jnp.int32(0), zero, zero + jnp.inf, state.student))

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        kept: Kept = state.carried
        state, metrics = method.round(state._replace(carried=kept.carried), batches)
        theta = state.student
        errors = lax.map(lambda batch: outer(theta.params, theta.batch_stats, batch)[0], batches.validation)
        total, count = kept.errors + mean_over(axis_name, jnp.mean(errors)), kept.rounds + 1
        over = count % period == 0  # of a pass
        better = over & (total / period < kept.least)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), theta, kept.best)
        least = jnp.where(better, total / period, kept.least)
        ends = count >= rounds
        judged = jax.tree.map(lambda new, old: jnp.where(ends, new, old), best, theta)
        kept = Kept(state.carried, count, jnp.where(over, 0, total), least, best)
        return state._replace(student=judged, carried=kept), {**metrics, "least_validation_error": least}

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        assert method.pull is not None
        return method.pull(state._replace(carried=state.carried.carried), batch, validation)

    return method._replace(init=init, round=round, pull=pull if method.pull else None)
