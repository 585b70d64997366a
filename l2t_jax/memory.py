"""Memory modes: how the derivative through an unroll trades memory for time. All of them are exact.

| memory    | kept for each of the N steps             | work of a step, beside the gradient            |
|-----------|------------------------------------------|------------------------------------------------|
| save      | all that plain autodiff keeps            | its transpose                                  |
| remat     | the student's state                      | the gradient again, its transpose              |
| mixed     | the parameters (and, where the optimizer | one forward-over-reverse product               |
|           | is not linear, its state and gradient)   |                                                |
| linearize | what the linearised gradient reads       | the linear part of that product                |
| nested    | as mixed, for about 2 sqrt(N) steps only | the gradient again, the product                |
| auto      | takes save where it keeps no more than mixed, nested where that would not fit, else mixed         |

Legend: theta student parameters, phi loss parameters, N unroll length, u cotangent of the gradient.
"""

import logging
import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal

from l2t_jax.types import Array, PyTree, StudentState
from l2t_jax.unroll import Gradient, InnerLoss, Step, Unroll, plain_gradient, student_step, unroll

logger = logging.getLogger(__name__)

FITS = 0.5  # the share of the device's memory that what is kept over an unroll may take before "auto" nests


def _save(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(plain_gradient(inner), optimizer, axis_name=axis_name)


def _remat(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    # In a scan nothing can be merged across iterations, so the barriers that would prevent it are only in the way.
    return jax.checkpoint(_save(inner, optimizer, axis_name), prevent_cse=False)


def _mixed(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(mixed_gradient(inner), _lean(optimizer), axis_name=axis_name)


def _linearize(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Step:
    return student_step(linearized_gradient(inner), _lean(optimizer), axis_name=axis_name)


def _lean(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep a non-linear optimizer (Adam) from storing its intermediate values."""
    return optax.GradientTransformation(optimizer.init, jax.checkpoint(optimizer.update, prevent_cse=False))


STEPS: dict[str, Callable[[InnerLoss, optax.GradientTransformation, str | None], Step]] = {
    "save": _save,
    "remat": _remat,
    "mixed": _mixed,
    "linearize": _linearize,
}


def _nested(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None) -> Unroll:
    """Keep the state at the start of each segment of about sqrt(N) steps, and what mixed keeps within one segment."""
    step = _mixed(inner, optimizer, axis_name)

    def run(state: StudentState, loss_params: PyTree, batches: PyTree) -> tuple[StudentState, Array]:
        count, size = segments(_length(batches))

        def segment(state: StudentState, begin: Array | int, length: int) -> tuple[StudentState, Array]:
            # Sliced here, so that the batches of one segment are copied at a time and not those of all.
            part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, begin, length), batches)
            return unroll(step, state, loss_params, part)

        again = jax.checkpoint(partial(segment, length=size), prevent_cse=False)
        state, losses = lax.scan(again, state, size * jnp.arange(count))
        # The last segment is differentiated first, so nothing is gained by computing it again.
        state, last = segment(state, count * size, _length(batches) - count * size)
        return state, jnp.concatenate([losses.reshape(-1), last])

    return run


def segments(length: int) -> tuple[int, int]:
    """How "nested" divides N steps: segments that are computed again, and the steps of each; 1 to size steps remain."""
    size = math.ceil(math.sqrt(length))
    return (length - 1) // size, size


def auto(inner: InnerLoss, optimizer: optax.GradientTransformation, axis_name: str | None, at_once: int = 1) -> Unroll:
    """Choose by what each mode would keep, and say so; `at_once` unrolls share a device (vmap, which is not seen)."""
    explained = set()

    @cache  # each mode's step is traced to know it, and a method differentiates two stages of the same shapes
    def predicted(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, float]:
        return kept_bytes(inner, optimizer, axis_name, *jax.tree.unflatten(structure, leaves))

    def run(state: StudentState, loss_params: PyTree, batches: PyTree) -> tuple[StudentState, Array]:
        leaves, structure = jax.tree.flatten((state, loss_params, batches))
        kept = predicted(structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
        available = device_bytes() / at_once
        mode = choose(kept, available)
        sizes = ", ".join(f"{name} {_mib(size)}" for name, size in kept.items())
        line = f"memory mode auto takes {mode} for N = {_length(batches)}; predicted MiB to keep: {sizes}"
        if line not in explained:
            explained.add(line)
            shared = f", for each of {at_once} at once" if at_once > 1 else ""
            logger.info("%s; the device has %s%s", line, _mib(available), shared)
        return MEMORY_MODES[mode](inner, optimizer, axis_name)(state, loss_params, batches)

    return run


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}" if size < 1000 * 2**20 else f"{size / 2**20:.0f}"


def choose(kept: dict[str, float], available: float) -> str:
    """The mode "auto" takes, from the bytes each mode keeps over an unroll and those of the device.

    The faster of save and mixed is, measured, the one that keeps less; linearize keeps what save does.
    """
    fastest = "save" if kept["save"] <= kept["mixed"] else "mixed"
    return fastest if kept[fastest] <= FITS * available else "nested"


def kept_bytes(
    inner: InnerLoss,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    state: StudentState,
    loss_params: PyTree,
    batches: PyTree,
) -> dict[str, float]:
    """Predict, by abstract evaluation, how many bytes each mode keeps for the backward pass of an unroll.

    Args:
      inner, optimizer, axis_name: as in `hypergradient`.
      state, loss_params, batches (leaves [N, B, ...]): arrays, tracers or `jax.ShapeDtypeStruct`s.
    Returns:
      mode -> bytes. What the batches and the loss parameters occupy anyway is not counted, nor is the working memory of
      a single step, except that of "remat", where it is the memory of the gradient that is computed again. "nested"
      copies the batches of two segments: of the last one, and of the one it computes again.
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    step = {
        name: _residual_bytes(build(inner, optimizer, axis_name), state, loss_params, first)
        for name, build in STEPS.items()
    }
    carried = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    length = _length(batches)
    count, size = segments(length)
    kept = {name: length * size for name, size in step.items()}
    kept["remat"] += step["save"]
    copied = sum(_bytes(leaf) for leaf in jax.tree.leaves(first))
    return kept | {"nested": count * carried + size * (step["mixed"] + 2 * copied)}


def _residual_bytes(step: Step, state: StudentState, loss_params: PyTree, batch: PyTree) -> float:
    """The bytes that differentiating one step keeps, beside its batch and the loss parameters."""

    def residuals(state: StudentState, loss_params: PyTree, batch: PyTree) -> list[Any]:
        _, pull = jax.vjp(lambda state, loss_params: step(state, loss_params, batch), state, loss_params)
        return jax.tree.leaves(pull)

    jaxpr = jax.make_jaxpr(residuals)(state, loss_params, batch).jaxpr
    there = set(jaxpr.invars[len(jax.tree.leaves(state)) :])
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - there
    return sum(_bytes(v.aval) for v in kept)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * (0 if x.dtype == jax.dtypes.float0 else x.dtype.itemsize)


def _length(batches: PyTree) -> int:
    return jax.tree.leaves(batches)[0].shape[0]


def device_bytes() -> float:
    """The memory of one device: the allocator's limit, or for a CPU the machine's memory."""
    statistics: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _steps(name: str) -> Callable[[InnerLoss, optax.GradientTransformation, str | None], Unroll]:
    return lambda inner, optimizer, axis_name: partial(unroll, STEPS[name](inner, optimizer, axis_name))


MEMORY_MODES: dict[str, Callable[[InnerLoss, optax.GradientTransformation, str | None], Unroll]] = {
    **{name: _steps(name) for name in STEPS},
    "nested": _nested,
    "auto": auto,
}


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

    def forward(pull: Pull, params: list[Array], weights: list[Array], arguments: Any) -> tuple[Any, Any, Any]:
        return *pull(params, weights, arguments), (params, weights, arguments)

    def backward(pull: Pull, kept: Any, u: tuple[list[Array], list[Array]]) -> list[Array]:
        params, weights, arguments = kept
        return jax.jvp(partial(pull, arguments=arguments), (params, weights), u, has_aux=True)[1]

    return _with_derivative(inner, forward, backward)


def linearized_gradient(inner: InnerLoss) -> Gradient:
    """The student's gradient with the derivative of `mixed_gradient`, linearised on the way forward.

    What is kept is what the linear map u -> d2L/d(theta, phi)dtheta u reads, so nothing is computed again. For wide
    dense layers that is much less than theta: the map reads activations and no first-layer kernel.

    Raises and limit: as `mixed_gradient`.
    """

    def forward(pull: Pull, params: list[Array], weights: list[Array], arguments: Any) -> tuple[Any, Any, Any]:
        derivatives, push, results = jax.linearize(partial(pull, arguments=arguments), params, weights, has_aux=True)
        return derivatives, results, push

    def backward(pull: Pull, push: Any, u: tuple[list[Array], list[Array]]) -> list[Array]:
        return push(*u)

    return _with_derivative(inner, forward, backward)


# (leaves of theta, weights of the float outputs of the inner loss, all its arguments) -> derivatives of the weighed sum
# with respect to all float arguments but the batch, those of theta first; what the inner loss returns
Pull = Callable[..., tuple[list[Array], Any]]


def _with_derivative(
    inner: InnerLoss, forward: Callable[[Pull, list[Array], list[Array], Any], Any], backward: Callable[..., Any]
) -> Gradient:
    """The student's gradient with a derivative made of two halves, which see lists of floats and no symbolic zeros.

    Args:
      forward: (pull, leaves of theta, weights, arguments) -> what pull returns, what backward needs.
      backward: (pull, that, (cotangents of the gradient, of the float outputs of inner)) -> cotangents of the floats.
    """

    def gradient(
        params: PyTree, batch_stats: PyTree, loss_params: PyTree, batch: PyTree
    ) -> tuple[PyTree, Array, PyTree]:
        floats, others, merge = _partition((params, batch_stats, loss_params))
        leaves, structure = jax.tree.flatten(params)
        count = len(leaves)

        def outputs(floats: list[Array], others: list[Array], batch: PyTree) -> tuple[list[Array], Any]:
            params, stats, phi = merge(floats, others)
            results = inner(params, stats, phi, batch)
            return _partition(results)[0], results

        def pull(params: list[Array], weights: list[Array], arguments: Any) -> tuple[list[Array], Any]:
            floats, *constants = arguments
            _, vjp, results = jax.vjp(
                lambda x: outputs(x, constants[0], constants[1]), [*params, *floats[count:]], has_aux=True
            )
            return vjp(weights)[0], results

        def weights(arguments: Any) -> list[Array]:  # those of the student's gradient: of the loss alone
            loss, *rest = jax.eval_shape(outputs, *arguments)[0]
            return [jnp.ones(loss.shape, loss.dtype), *(jnp.zeros(x.shape, x.dtype) for x in rest)]

        def plain(*arguments: Any) -> tuple[list[Array], Any]:
            derivatives, results = pull(arguments[0][:count], weights(arguments), arguments)
            return derivatives[:count], results

        def kept(*primals: Any) -> tuple[Any, Any]:
            if any(jax.tree.leaves(jax.tree.map(lambda p: p.perturbed, primals[2], is_leaf=_is_primal))):
                raise ValueError(
                    "This memory mode holds the batch constant but its derivative was asked for; "
                    'move it into the loss parameters, or use memory="save" or "remat".'
                )
            arguments = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)
            derivatives, results, kept = forward(pull, arguments[0][:count], weights(arguments), arguments)
            return (derivatives[:count], results), kept

        def adjoint(kept: Any, cotangents: Any) -> tuple[list[Array], None, None]:
            u_gradient, u_results = jax.tree.map(_instantiate, cotangents, is_leaf=_is_zero)
            return backward(pull, kept, (u_gradient, _partition(u_results)[0])), None, None

        function = jax.custom_vjp(plain)
        function.defvjp(kept, adjoint, symbolic_zeros=True)
        grads, (loss, stats) = function(floats, others, batch)
        return jax.tree.unflatten(structure, grads), loss, stats

    return gradient


def _partition(tree: PyTree) -> tuple[list[Array], list[Array], Callable[[list[Array], list[Array]], Any]]:
    """Divide the leaves of a tree into floats and others; the third result puts such lists together again."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def merge(floats: list[Array], others: list[Array]) -> PyTree:
        float_leaves, other_leaves = iter(floats), iter(others)
        return jax.tree.unflatten(structure, [next(float_leaves if x else other_leaves) for x in is_float])

    parts = [[leaf for leaf, x in zip(leaves, is_float, strict=True) if x is wanted] for wanted in (True, False)]
    return parts[0], parts[1], merge


def _instantiate(cotangent: Any) -> Any:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
