"""The hypergradient: the exact derivative of the validation error with respect to the loss, through N student steps.

How it trades memory for time is an argument, never another code path for the caller:

| memory | kept for each step                        | work of a step, beside the gradient      |
|--------|-------------------------------------------|------------------------------------------|
| save   | all that plain autodiff keeps             | its transpose                            |
| remat  | the student's state                       | the gradient again, its transpose        |
| mixed  | the parameters (and, where the optimizer  | one forward-over-reverse product         |
|        | is not linear, its state and the gradient)|                                          |

Legend: theta student parameters, phi loss parameters, N unroll length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero

from l2t_jax.types import Array, PyTree, StudentState
from l2t_jax.unroll import (
    Gradient,
    InnerLoss,
    OuterError,
    Step,
    mean_over,
    plain_gradient,
    student_step,
    unrolled_error,
)


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
    memory: str = "mixed",
    axis_name: str | None = None,
) -> Callable[[PyTree, StudentState, PyTree, PyTree], Hypergradient]:
    """Build d e_val(theta^N) / d phi, theta^i = theta^{i-1} - eta d/dtheta L_phi(theta^{i-1}), any optimizer.

    Args:
      inner: (params, batch_stats, phi, batch) -> scalar training loss, new batch_stats. Twice differentiable.
        batch_stats is any auxiliary state ({} if there is none); derivatives flow through it.
      outer: (params, batch_stats, validation) -> scalar validation error, anything to report.
      optimizer: the student's optax transformation.
      memory: "save", "remat" or "mixed" (see the module's table). All are exact.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      compute(phi, state, batches (leaves [N, B, ...]), validation) -> `Hypergradient`.
    Raises:
      ValueError: an unknown memory mode.
    Source: L2T-DLN (NeurIPS 2023), Eqs. 4-6. As printed, Eq. 5 starts at N-1 and Eq. 7 lacks the minus sign; this
    is the derivative itself, so neither question arises.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory mode {memory!r} is unknown; choose one of {', '.join(MEMORY_MODES)}.")
    step = MEMORY_MODES[memory](inner, optimizer, axis_name)

    differentiate = jax.value_and_grad(unrolled_error(step, outer), has_aux=True)

    def compute(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> Hypergradient:
        (error, (state, losses, metrics)), gradient = differentiate(phi, state, batches, validation)
        # The error stays local inside the derivative; one mean of the hypergradient after it is exact.
        error, gradient, losses, metrics = mean_over(axis_name, (error, gradient, losses, metrics))
        return Hypergradient(error, gradient, state, losses, metrics)

    return compute


def _save(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(plain_gradient(inner), optimizer, axis_name=axis_name)


def _remat(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return jax.checkpoint(_save(inner, optimizer, axis_name))


def _mixed(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    # The checkpoint keeps a non-linear optimizer (Adam) from storing its intermediate values as well.
    lean = optax.GradientTransformation(optimizer.init, jax.checkpoint(optimizer.update))
    return student_step(mixed_gradient(inner), lean, axis_name=axis_name)


MEMORY_MODES: dict[str, Callable[..., Step]] = {"save": _save, "remat": _remat, "mixed": _mixed}


def mixed_gradient(inner: InnerLoss) -> Gradient:
    """The student's gradient with a derivative of its own: forward over reverse, keeping only its arguments.

    The adjoint of g = dL/dtheta needs u^T d2L/dtheta2 and u^T d2L/dtheta dphi. Partial derivatives commute, so both
    are the tangent of d/d(theta, phi) L along u in theta: one Jacobian-vector product of the gradient, which stores
    nothing of the backward pass. Cotangents of the loss and of the new batch statistics ride along as tangents of
    the weights of these two outputs.

    Raises (when differentiated):
      ValueError: the derivative is asked with respect to the batch, which is kept constant here.
    Limit: partial derivatives commute only if the gradient is one. Where a `jax.custom_vjp` inside the loss returns
    something else (a straight-through estimator, a clipped gradient), use memory="save" or "remat".
    """
    plain = plain_gradient(inner)
    gradient = jax.custom_vjp(plain)

    def forward(*primals: Any) -> tuple[Any, Any]:
        perturbed = jax.tree.leaves(jax.tree.map(lambda p: p.perturbed, primals[3], is_leaf=_is_primal))
        if any(perturbed):
            raise ValueError(
                'memory="mixed" holds the batch constant but its derivative was asked for; '
                'move it into the loss parameters, or use memory="save" or "remat".'
            )
        values = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)
        return plain(*values), values

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        params, batch_stats, phi, batch = residuals
        _, join = _split_floats((params, batch_stats, phi))
        u_gradient, u_loss, u_stats = jax.tree.map(_instantiate, cotangents, is_leaf=_is_zero)
        u_outputs, _ = _split_floats((u_loss, u_stats))

        def outputs(floats: list[Array]) -> list[Array]:
            params, batch_stats, phi = join(floats)
            return _split_floats(inner(params, batch_stats, phi, batch))[0]  # loss, then new batch_stats

        def pull(params: PyTree, weights: list[Array]) -> list[Array]:
            floats, _ = _split_floats((params, batch_stats, phi))
            return jax.vjp(outputs, floats)[1](weights)[0]

        weights = [jnp.ones_like(u_outputs[0]), *map(jnp.zeros_like, u_outputs[1:])]
        _, tangents = jax.jvp(pull, (params, weights), (u_gradient, u_outputs))
        return (*join(tangents, fill=_no_tangent), jax.tree.map(_zero_cotangent, batch))

    gradient.defvjp(forward, backward, symbolic_zeros=True)
    return gradient


def _split_floats(tree: PyTree) -> tuple[list[Array], Callable[..., Any]]:
    """Take the differentiable leaves out of a tree; the second result puts (new) ones back."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def join(floats: list[Array], fill: Callable[[Array], Any] = lambda leaf: leaf) -> PyTree:
        rest = iter(floats)
        merged = [next(rest) if float_ else fill(leaf) for leaf, float_ in zip(leaves, is_float, strict=True)]
        return jax.tree.unflatten(structure, merged)

    return [leaf for leaf, float_ in zip(leaves, is_float, strict=True) if float_], join


def _no_tangent(leaf: Array) -> np.ndarray:
    return np.zeros(np.shape(leaf), jax.dtypes.float0)


def _zero_cotangent(leaf: Array) -> Any:
    return jnp.zeros_like(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else _no_tangent(leaf)


def _instantiate(cotangent: Any) -> Any:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
