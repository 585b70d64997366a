"""What every method shares: one stage's data out of a round's, a stage without a derivative, finite flags."""

from collections import OrderedDict  # keeps its order through jit, which sorts a dict
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from l2t_jax.hypergradient import Hypergradient
from l2t_jax.types import Batch, PyTree, RoundBatches, StudentState
from l2t_jax.unroll import InnerLoss, OuterError, mean_over, plain_gradient, student_step, unroll, unrolled_error


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
