"""Early stopping: of a training run the student that was best on the clean examples, not the last one.

Legend: R rounds of a run, K rounds of a pass over the validation part.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2t_jax.types import Array, Batch, Key, Method, MethodState, PyTree, RoundBatches, StudentState


class Kept(NamedTuple):
    """What `early_stopped` carries beside what the method does."""

    carried: PyTree  # the method's own
    rounds: Array  # [] int32, done
    errors: Array  # [] sum of the validation errors of this pass
    least: Array  # [] the least mean of a pass
    best: StudentState  # the student then


def early_stopped(method: Method, *, rounds: int, rounds_per_pass: int) -> Method:
    """End with the student that was best on the clean examples, and not with the last.

    e_p = mean of the validation errors that the K rounds of pass p tell, each of the student after its round. The
    student that is kept is that after the last round of the p with the least e_p. A last pass that is incomplete is not
    compared, unless it is the only one.

    Args:
      method: whose student is measured, e.g. of `fixed_loss`; "validation_error" is among its metrics.
      rounds: R, of the run. In the last of them the best student takes the place of the last one.
      rounds_per_pass: K, in which every example of the validation part is read once.
    Returns:
      a `Method` that carries a `Kept`.
    Raises:
      ValueError: a pass has no round.
    Source: ours, for what is usual where there are clean examples. Training goes on after the best student: all runs
    cost the same steps, and there is no patience to choose.
    """
    if rounds_per_pass < 1:
        raise ValueError(f"rounds_per_pass={rounds_per_pass!r}: give at least 1.")
    period = max(1, min(rounds_per_pass, rounds))

    def init(key: Key, inputs: Array) -> MethodState:
        state = method.init(key, inputs)
        zero = jnp.zeros((), jnp.result_type(float))
        return state._replace(carried=Kept(state.carried, jnp.int32(0), zero, zero + jnp.inf, state.student))

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        kept: Kept = state.carried
        state, metrics = method.round(state._replace(carried=kept.carried), batches)
        theta = state.student
        total, count = kept.errors + metrics["validation_error"], kept.rounds + 1
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

    pulls = pull if method.pull else None
    return method._replace(init=init, round=round, pull=pulls, of_length="the last round")
