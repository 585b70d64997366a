"""What every method shares: one stage's data out of a round's, a stage without a derivative, finite flags.

Legend: S data stages of a round, N unroll length, B batch, V validation batch, K rounds taken as one.
"""

from collections import OrderedDict  # keeps its order through jit, which sorts a dict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.hypergradient import Hypergradient
from l2t_jax.types import Array, Batch, Head, Loss, Method, MethodState, PyTree, RoundBatches, Student, StudentState
from l2t_jax.unroll import (
    InnerLoss,
    OuterError,
    mean_over,
    outputs_for,
    plain_gradient,
    student_step,
    unroll,
    unrolled_error,
)


def stage(batches: RoundBatches, s: int) -> tuple[Batch, Batch]:
    """The training batches (leaves [N, B, ...]) and the validation batch (leaves [V, ...]) of stage s."""
    return jax.tree.map(lambda x: x[s], (batches.train, batches.validation))


def train_stage(
    inner: InnerLoss,
    outer: OuterError,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
) -> Callable[[PyTree, StudentState, PyTree, PyTree], Hypergradient]:
    """Build a stage of student steps of which no derivative is wanted: a `Hypergradient` whose gradient is {}."""
    step = student_step(plain_gradient(inner), optimizer, axis_name=axis_name)
    run = unrolled_error(partial(unroll, step), outer)

    def compute(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> Hypergradient:
        error, (state, losses, metrics) = run(phi, state, batches, validation)
        error, losses, metrics = mean_over(axis_name, (error, losses, metrics))
        return Hypergradient(error, {}, state, losses, metrics)

    return compute


def finite(*stages: tuple[str, PyTree]) -> OrderedDict[str, PyTree]:
    """For every leaf of every named tree whether all its entries are finite, [] bool.

    Name the stages in the order in which a round computes them: the first one that fails is reported as the cause.
    """
    return OrderedDict((name, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)) for name, tree in stages)


def pull_of(
    student: Student, loss: Loss, variables: dict[str, PyTree], params: PyTree, batch: Batch, **weights: Array
) -> Array:
    """How strongly each example moves the student: |d loss_b / d outputs_b|, or of the features of a `Head`; [B].

    Args:
      student, loss: the records.
      variables: of the student, with batch statistics in BatchNorm.
      params: of the loss, as `loss.at` gives them.
      batch: training examples.
      **weights: `sample_weight` of the loss, if any.
    """
    outputs, _ = outputs_for(student, loss)(variables, batch.inputs, True)

    def total(read: Array) -> Array:
        given = outputs._replace(features=read) if isinstance(outputs, Head) else read
        return jnp.sum(loss.apply(params, given, batch.targets, **weights))

    return jnp.linalg.norm(jax.grad(total)(outputs.features if isinstance(outputs, Head) else outputs), axis=-1)


def on_validation(method: Method) -> Method:
    """A method of one stage and N = 1 that trains on its validation batches: what a meta set alone would teach.

    A control for the methods that learn from a meta set; a step of it reads V examples in place of B.
    """

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        return method.round(state, batches._replace(train=jax.tree.map(lambda x: x[:, None], batches.validation)))

    return method._replace(round=round)


def several(method: Method, rounds: int) -> Method:
    """Take K rounds of a method as one, each with its own data: for methods that look ahead one step at a time.

    Its metrics are means over the K rounds; what is finite is so in all of them.
    """

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        apart = lambda x: x.reshape(rounds, method.stages, *x.shape[1:])  # noqa: E731
        train, validation = jax.tree.map(apart, (batches.train, batches.validation))
        first = batches.first_of_epoch & (jnp.arange(rounds) == 0)  # [K]
        state, metrics = lax.scan(method.round, state, RoundBatches(train, validation, first))
        flags = jax.tree.map(jnp.all, metrics.pop("finite"))
        return state, {**{name: jnp.mean(value) for name, value in metrics.items()}, "finite": flags}

    return method._replace(round=round, stages=rounds * method.stages, steps_per_round=rounds * method.steps_per_round)
