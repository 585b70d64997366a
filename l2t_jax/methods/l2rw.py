"""L2RW (learning to reweight): each example of a batch weighs as much as its gradient agrees with a clean batch's.

Legend: B batch, V validation batch, D devices that share a batch; theta student, l_i cross entropy of example i.
"""

from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.hypergradient import Hypergradient, hypergradient
from l2t_jax.methods.common import finite, pull_of_errors, stage_data, train_stage
from l2t_jax.types import Array, Batch, How, Key, Method, MethodState, PyTree, RoundBatches, Student, StudentState, Task
from l2t_jax.unroll import InnerLoss, each_example, errors_of, examples_of, init_state, keys_for, outer_objective

VIRTUAL = optax.sgd(1.0)  # its rate scales all weights alike, so it does not matter


def l2rw(
    student: Student,
    task: Task,
    student_optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    **how: Unpack[How],
) -> Method:
    """Build L2RW: weights of one step only, that nothing remembers.

    One round:
      theta^(eps) = theta - d/dtheta sum_i eps_i l_i                              virtual step, at eps = 0
      u_i = max(-d e_val(theta^(eps)) / d eps_i, 0) = max(<g_val, g_i>, 0)        g_i = d l_i / d theta
      w = u / sum_j u_j, or 0 where all u are 0
      theta <- the student optimizer's step on sum_i w_i l_i                      the step that is kept

    The virtual step starts from theta and is thrown away. Both steps use the batch's own statistics in BatchNorm (so
    g_i is the derivative of l_i through the statistics of the whole batch); the running statistics move once, by the
    kept step, whatever the weights are.

    Args:
      student, task: the records that are composed; validation examples should be clean.
      student_optimizer: of the kept step, any optax transformation; where all weights are 0 its momentum still moves.
      axis_name, **how: as in `hypergradient` (memory, at_once, check_gradient).
    Returns:
      a `Method` of one student step a round: train [1, 1, B, ...], validation [1, V, ...]; `merge_rounds` makes K
      of them one. It learns nothing: only the student is carried.
    Raises:
      ValueError: an unknown memory mode; a round is given more than one training batch.
    Source: Ren et al., ICML 2018, Algorithm 1, and the released code.
    """
    outer = outer_objective(student, task, axis_name=axis_name)
    look_ahead = hypergradient(
        weighted_sum(student, task, axis_name),
        outer,
        VIRTUAL,
        axis_name=axis_name,
        **how,
    )
    # For a record, whose batches have no keys: nothing is dropped out.
    alone = hypergradient(weighted_sum(student._replace(draws=False), task), outer, VIRTUAL, **how)
    train = train_stage(weighted_sum(student, task, axis_name), outer, student_optimizer, axis_name=axis_name)

    def init(key: Key, inputs: Array) -> MethodState:
        k_student, _, _ = jax.random.split(key, 3)  # as in l2t_dln: the same key gives the same student
        theta = init_state(student.init(k_student, inputs), student_optimizer)
        return MethodState(theta, {}, {}, {}, {})

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        batch, validation = stage_data(batches, 0)
        if jax.tree.leaves(batch.inputs)[0].shape[0] != 1:
            raise ValueError(
                f"L2RW takes one student step a round, not {jax.tree.leaves(batch.inputs)[0].shape[0]}: use "
                "merge_rounds."
            )
        examples = jax.tree.leaves(batch.inputs)[0].shape[1] * (1 if axis_name is None else lax.axis_size(axis_name))
        ahead = look_ahead(_no_weights(state.student, examples), _virtual(state.student), batch, validation)
        weights = weights_of(ahead.gradient)
        kept = train(weights, state.student, batch, validation)
        return state._replace(student=kept.state), _metrics(ahead, weights, kept)

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        theta, examples = state.student, examples_of(batch)
        one = jax.tree.map(lambda x: x[None], batch)
        weights = weights_of(alone(_no_weights(theta, examples), _virtual(theta), one, validation).gradient)
        # Times B: an example that weighs as in a mean pulls as in a mean.
        return pull_of_errors(student, task, theta.variables, batch, examples * weights)

    return Method(init=init, round=round, stages=1, steps_per_round=1, pull=pull)


def weighted_sum(student: Student, task: Task, axis_name: str | None = None) -> InnerLoss:
    """The objective sum_i w_i l_i of the whole batch, its loss parameters being the weights w [D * B] of all devices.

    A device sees its own B examples. The mean over devices that follows is of D times their sums, so it is the sum.
    """

    def inner(params: PyTree, batch_stats: PyTree, weights: Array, batch: Batch) -> tuple[Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, stats = student.apply(variables, batch.inputs, True, *keys_for(student, batch))
        losses = each_example(errors_of(task, outputs, batch), examples_of(batch))
        if axis_name is None:
            return jnp.sum(weights * losses), stats
        own = lax.dynamic_slice_in_dim(weights, losses.size * lax.axis_index(axis_name), losses.size)
        return lax.axis_size(axis_name) * jnp.sum(own * losses), stats

    return inner


def weights_of(gradient: Array) -> Array:
    """Weights [B] from the derivatives [B] of the validation error with respect to eps; they sum to 1 or are all 0."""
    chex.assert_rank(gradient, 1)
    useful = jax.nn.relu(-gradient)
    total = jnp.sum(useful)
    return useful / jnp.where(total > 0, total, 1)


def _no_weights(theta: StudentState, examples: int) -> Array:
    return jnp.zeros(examples, jnp.result_type(*jax.tree.leaves(theta.params)))


def _virtual(theta: StudentState) -> StudentState:
    return init_state(theta.variables, VIRTUAL)


def _metrics(ahead: Hypergradient, weights: Array, kept: Hypergradient) -> dict[str, Any]:
    return {
        "train_loss": jnp.mean(kept.losses),
        "validation_error": kept.error,
        **{f"validation_{name}": value for name, value in kept.metrics.items()},
        "hypergradient_norm": jnp.linalg.norm(ahead.gradient),
        "examples_used": jnp.mean(weights > 0, dtype=weights.dtype),
        "largest_weight": jnp.max(weights),
        "finite": finite(
            ("validation error of the virtual step", {"e_val": ahead.error}),
            ("derivatives by example", {"eps": ahead.gradient}),
            ("student", kept.state),
            ("validation error", {"e_val": kept.error}),
        ),
    }
