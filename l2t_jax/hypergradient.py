"""The hypergradient: the exact derivative of the validation error with respect to the loss, through N student steps.

How it trades memory for time is an argument, never another code path for the caller: see `l2t_jax.memory`.

Legend: theta student parameters, phi loss parameters, N unroll length.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import optax

from l2t_jax.memory import MEMORY_MODES, auto
from l2t_jax.types import Array, PyTree, StudentState
from l2t_jax.unroll import InnerLoss, OuterError, mean_over, unrolled_error


class Hypergradient(NamedTuple):
    """What one differentiation through an unroll gives."""

    error: Array  # [] validation error after N steps
    gradient: PyTree  # of the error with respect to phi
    state: StudentState  # after N steps
    losses: Array  # [N] training losses
    metrics: PyTree  # what the outer error reports


def hypergradient(
    inner: InnerLoss,
    outer: OuterError,
    optimizer: optax.GradientTransformation,
    *,
    memory: str = "auto",
    axis_name: str | None = None,
    at_once: int = 1,
) -> Callable[[PyTree, StudentState, PyTree, PyTree], Hypergradient]:
    """Build d e_val(theta^N) / d phi, theta^i = theta^{i-1} - eta d/dtheta L_phi(theta^{i-1}), any optimizer.

    Args:
      inner: (params, batch_stats, phi, batch) -> scalar training loss, new batch_stats. Twice differentiable.
        batch_stats is any auxiliary state ({} if there is none); derivatives flow through it.
      outer: (params, batch_stats, validation) -> scalar validation error, anything to report.
      optimizer: the student's optax transformation.
      memory: "auto" or one of the other `MEMORY_MODES` (see the table of `l2t_jax.memory`). All are exact.
      axis_name: mapped axis over which batches are split, if any.
      at_once: how many of these a device computes side by side (vmap), which "auto" cannot see.
    Returns:
      compute(phi, state, batches (leaves [N, B, ...]), validation) -> `Hypergradient`.
    Raises:
      ValueError: an unknown memory mode.
    Source: L2T-DLN (NeurIPS 2023), Eqs. 4-6. As printed, Eq. 5 starts at N-1 and Eq. 7 lacks the minus sign; this
    is the derivative itself, so neither question arises.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory mode {memory!r} is unknown; choose one of {', '.join(MEMORY_MODES)}.")
    build = partial(auto, at_once=at_once) if memory == "auto" else MEMORY_MODES[memory]
    run = build(inner, optimizer, axis_name)
    differentiate = jax.value_and_grad(unrolled_error(run, outer), has_aux=True)

    def compute(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> Hypergradient:
        (error, (state, losses, metrics)), gradient = differentiate(phi, state, batches, validation)
        # The error stays local inside the derivative; one mean of the hypergradient after it is exact.
        error, gradient, losses, metrics = mean_over(axis_name, (error, gradient, losses, metrics))
        return Hypergradient(error, gradient, state, losses, metrics)

    return compute
