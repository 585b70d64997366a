"""The hypergradient: the exact derivative of the validation error with respect to the loss, through N student steps.

How it trades memory for time is an argument, never another code path for the caller: see `l2t_jax.memory`.

Legend: theta student parameters, phi loss parameters, N unroll length.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.inputs import (
    as_arrays,
    check_effects,
    check_floats,
    check_mapped,
    check_validation,
    is_finite,
    is_known,
    known,
    length_of,
)
from l2t_jax.memory import FORWARD, MEMORY_MODES, auto, untrue
from l2t_jax.optimizers import check_at_first, check_at_zero, check_optimizer
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
    check_gradient: bool = False,
) -> Callable[[PyTree, StudentState, PyTree, PyTree], Hypergradient]:
    """Build d e_val(theta^N) / d phi, theta^i = theta^{i-1} - eta d/dtheta L_phi(theta^{i-1}), any optimizer.

    Args:
      inner: (params, batch_stats, phi, batch) -> scalar training loss, new batch_stats. Twice differentiable.
        batch_stats is any auxiliary state ({} if there is none); derivatives flow through it. It may close over
        anything, traced arrays too. Of effects in it, jax.debug's are carried: once a step by "save" and "linearize",
        again on the way back by the others.
      outer: (params, batch_stats, validation) -> scalar validation error, anything to report.
      optimizer: the student's optax transformation.
      memory: "auto" or one of the other `MEMORY_MODES` (see the table of `l2t_jax.memory`). All are exact.
      axis_name: mapped axis over which batches are split, if any.
      at_once: how many of these a device computes side by side (vmap), which "auto" cannot see.
      check_gradient: try first, at the price of compiling a step, whether the optimizer has a derivative at a zero
        gradient, and whether custom derivatives inside the inner loss are true, as "mixed", "linearize" and "nested"
        take for granted (`second_order.gradient_gap`); where they are not, "auto" takes another mode.
    Returns:
      compute(phi, state, batches (leaves [N, B, ...]), validation) -> `Hypergradient`.
    Raises:
      ValueError: an unknown memory mode, an optimizer that is none; when called, what is given or returned has not the
        structure, shape or dtype that is expected, the optimizer cannot take a step with a gradient alone, the mode
        cannot differentiate the inner loss, `check_gradient` found it untrue, or the optimizer has no derivative at a
        zero gradient or in its first steps (found where values are known, not under jit: there it is NaN).
    Source: L2T-DLN (NeurIPS 2023), Eqs. 4-6. As printed, Eq. 5 starts at N-1 and Eq. 7 lacks the minus sign; this
    is the derivative itself, so neither question arises.
    """
    known(f"memory mode {memory!r}", memory, MEMORY_MODES)
    check_optimizer(optimizer, "the student's optimizer")
    build = partial(auto, at_once=at_once, check_gradient=check_gradient) if memory == "auto" else MEMORY_MODES[memory]
    run = build(inner, optimizer, axis_name)
    differentiate = jax.value_and_grad(unrolled_error(run, outer), has_aux=True)
    tried = set()

    def try_gradient(*arguments: PyTree) -> None:
        leaves, structure = jax.tree.flatten(arguments)
        seen = structure, tuple((x.shape, x.dtype) for x in leaves)
        if seen in tried:
            return
        check_at_zero(optimizer, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), arguments[0].params))
        if memory in FORWARD and (wrong := untrue(inner, axis_name, *arguments)):
            raise ValueError(f'{wrong}: memory="{memory}" would be wrong, use "save", "remat" or "auto".')
        tried.add(seen)

    def compute(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> Hypergradient:
        phi, state, batches = as_arrays(phi, "phi"), as_arrays(state, "state"), as_arrays(batches, "batches")
        validation = as_arrays(validation, "validation")
        check_floats(phi, "phi")
        length_of(batches)
        check_validation(batches, validation)
        check_mapped(phi, state, batches, validation)
        check_effects(inner, state.params, state.batch_stats, phi, jax.tree.map(lambda x: x[0], batches))
        if check_gradient:
            try_gradient(state, phi, batches)
        (error, (after, losses, metrics)), gradient = differentiate(phi, state, batches, validation)
        if is_known((error, gradient)) and jnp.isfinite(error) and not is_finite(gradient):
            check_at_zero(optimizer, state.params)  # the usual reason
            check_at_first(optimizer, state.params)  # and the only other that can be named
        # The error stays local inside the derivative; one mean of the hypergradient after it is exact.
        error, gradient, losses, metrics = mean_over(axis_name, (error, gradient, losses, metrics))
        return Hypergradient(error, gradient, after, losses, metrics)

    return compute
