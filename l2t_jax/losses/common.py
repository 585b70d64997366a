"""What every loss shares: turning a pure function into a `Loss`, sample weights and masks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from l2t_jax.types import Array, Head, Key, Loss, PyTree, unscheduled


def no_parameters(key: Key) -> PyTree:
    """Return the parameters of a loss that has none."""
    return {}


def make_loss(
    losses_of: Callable[[PyTree, Any, Array], Array],
    init: Callable[[Key], PyTree] = no_parameters,
    at: Callable[[PyTree, Array], PyTree] = unscheduled,
    **fields: Any,
) -> Loss:
    """Make a `Loss` of a pure function of its parameters: sample weights and masks are added.

    Args:
      losses_of: (params, outputs [B, C] or a `Head`, targets [B]) -> losses [B].
      init, at, **fields: as in `Loss`.
    """

    def apply(
        params: PyTree,
        outputs: Array | Head,
        targets: Array,
        *,
        sample_weight: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        return weigh(losses_of(params, *hide(outputs, targets, mask)), sample_weight, mask)

    return Loss(init, apply, at, **fields)


def fixed(function: Callable[..., Array]) -> Callable[..., Loss]:
    """Make a builder of a `Loss` without parameters from a pure function (outputs [B, C], targets [B]) -> [B].

    The function's keyword-only knobs become the builder's keywords: `fixed(focal)(gamma=2.0)`.
    """

    def build(**knobs: Any) -> Loss:
        unweighted = partial(function, **knobs)
        return make_loss(lambda params, outputs, targets: unweighted(outputs, targets), learned="no")

    build.__doc__ = function.__doc__
    return build


def hide(outputs: Array | Head, targets: Array, mask: Array | None) -> tuple[Any, Array]:
    """Replace masked examples by zeros *before* the loss, so that a NaN in one cannot reach any derivative."""
    if mask is None:
        return outputs, targets
    if isinstance(outputs, Head):
        outputs = outputs._replace(features=jnp.where(mask[..., None], outputs.features, 0))
    else:
        outputs = jnp.where(mask[..., None], outputs, 0)
    return outputs, jnp.where(mask, targets, 0)


def weigh(losses: Array, sample_weight: Array | None, mask: Array | None) -> Array:
    """Multiply losses [B] by weights [B] and set masked ones (mask [B] false) to zero; still unreduced, [B]."""
    if sample_weight is not None:
        losses = losses * sample_weight
    return losses if mask is None else jnp.where(mask, losses, 0)
