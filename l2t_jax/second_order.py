"""The student's gradient with a derivative of its own, forward over reverse: what most memory modes are made of.

Legend: theta student parameters, phi loss parameters, u cotangents of the gradient and of what the inner loss returns.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params

from l2t_jax.inputs import check_floats, check_inner, full_like, run_now
from l2t_jax.types import Array, PyTree
from l2t_jax.unroll import Gradient, InnerLoss


def mixed_gradient(inner: InnerLoss) -> Gradient:
    """The student's gradient with a derivative of its own: forward over reverse, keeping only its arguments.

    The adjoint of g = dL/dtheta needs u^T d2L/dtheta2 and u^T d2L/dtheta dphi. Partial derivatives commute, so both
    are the tangent of d/d(theta, phi) L along u in theta: one Jacobian-vector product of the gradient, which stores
    nothing of the backward pass. Cotangents of the loss and of the new batch statistics ride along as tangents of
    the weights of these outputs. What else the loss reads takes the place of phi: statistics, the batch, and traced
    arrays that it closes over.

    Raises (when called):
      ValueError: theta is not of floats, the inner loss returns something else than a scalar float and statistics like
        those it was given, or a `jax.custom_vjp` in it cannot be differentiated forward.
    Limit: partial derivatives commute only if the gradient is one. Where a custom derivative inside the loss is not its
    derivative (a straight-through estimator, a clipped gradient), use memory="save" or "remat"; `gradient_gap` tells.
    """

    def forward(reverse: Reverse, at: Point, weights: list[Array]) -> tuple[Any, Any, Any]:
        return *reverse(at, at.params, weights), at

    def backward(reverse: Reverse, at: Point, weights: list[Array], u: tuple[list[Array], list[Array]]) -> list[Array]:
        return jax.jvp(lambda *x: reverse(at, *x), (at.params, weights), u, has_aux=True)[1]

    return _with_derivative(inner, forward, backward)


def linearized_gradient(inner: InnerLoss) -> Gradient:
    """The student's gradient with the derivative of `mixed_gradient`, linearised on the way forward.

    What is kept is what the linear map u -> d2L/d(theta, phi)dtheta u reads, so nothing is computed again. For wide
    dense layers that is much less than theta: the map reads activations and no first-layer kernel.

    Raises and limit: as `mixed_gradient`.
    """

    def forward(reverse: Reverse, at: Point, weights: list[Array]) -> tuple[Any, Any, Any]:
        derivatives, push, results = jax.linearize(lambda *x: reverse(at, *x), at.params, weights, has_aux=True)
        return derivatives, results, push

    def backward(reverse: Reverse, push: Any, weights: list[Array], u: tuple[list[Array], list[Array]]) -> list[Array]:
        return push(*u)

    return _with_derivative(inner, forward, backward)


class Point(NamedTuple):
    """All that the inner loss reads, as lists of leaves."""

    params: list[Array]  # theta
    rest: list[Array]  # all other floats: statistics, phi, the batch, traced arrays that it closes over
    others: list[Array]  # integers, keys


@jax.tree_util.register_static
class Wanted(tuple[int, ...]):
    """The positions in `Point.rest` that are differentiated by, beside theta; no leaf, but structure."""


# (where, the wanted, theta, weights of the float outputs of the inner loss) -> derivatives of the weighed sum with
# respect to theta and to the wanted; what the inner loss returns, flat
Reverse = Callable[..., tuple[list[Array], list[Array]]]


class Flat(NamedTuple):
    """An inner loss as a function of lists of leaves, traced once."""

    at: Point
    evaluate: Callable[[Point], list[Array]]  # -> what the inner loss returns, flat
    outputs: list[Any]  # shapes and dtypes of it
    structure: Any  # of it
    jaxpr: Jaxpr  # of the function

    def reverse(
        self, at: Point, wanted: Wanted, params: list[Array], weights: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        """See `Reverse`."""

        def floats_of(params: list[Array], some: list[Array]) -> tuple[list[Array], list[Array]]:
            rest = dict(zip(wanted, some, strict=True))
            results = self.evaluate(at._replace(params=params, rest=[rest.get(i, x) for i, x in enumerate(at.rest)]))
            return _floats(results), results

        _, vjp, results = jax.vjp(floats_of, params, [at.rest[i] for i in wanted], has_aux=True)
        of_params, of_wanted = vjp(weights)
        return [*of_params, *of_wanted], results

    def weights(self) -> list[Array]:
        """Those of the student's gradient: of the loss alone."""
        loss, *rest = _floats(self.outputs)
        return [full_like(loss, 1), *(full_like(x, 0) for x in rest)]


def flatten(inner: InnerLoss, params: PyTree, batch_stats: PyTree, phi: PyTree, batch: PyTree) -> Flat:
    """Trace an inner loss, and make arguments of the traced arrays that it closes over.

    A function with a derivative of its own may not close over them, as jax would not know how to differentiate by them.

    Raises:
      ValueError: theta is not of floats, or the inner loss returns something else than it should.
    """
    check_floats(params, "params")
    arguments = (params, batch_stats, phi, batch)
    checked = lambda *a: check_inner(inner(*a), a[0], a[1])  # noqa: E731
    closed, shapes = jax.make_jaxpr(checked, return_shape=True)(*arguments)
    traced = [isinstance(x, jax.core.Tracer) for x in closed.consts]
    leaves = jax.tree.leaves(arguments[1:]) + [
        x for x, is_traced in zip(closed.consts, traced, strict=True) if is_traced
    ]
    count = len(leaves) - sum(traced)

    def evaluate(at: Point) -> list[Array]:
        rest, others = iter(at.rest), iter(at.others)
        given = [next(rest if _is_float(x) else others) for x in leaves]
        captured = iter(given[count:])
        constants = [next(captured) if t else x for t, x in zip(traced, closed.consts, strict=True)]
        results: list[Array] = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*at.params, *given[:count])
        return results

    at = Point(jax.tree.leaves(params), _floats(leaves), [x for x in leaves if not _is_float(x)])
    return Flat(at, evaluate, list(closed.out_avals), jax.tree.structure(shapes), closed.jaxpr)


def _with_derivative(
    inner: InnerLoss, forward: Callable[[Reverse, Point, list[Array]], Any], backward: Callable[..., list[Array]]
) -> Gradient:
    """The student's gradient with a derivative made of two halves, which see lists of floats and no symbolic zeros.

    Args:
      forward: (reverse, where, weights) -> what reverse returns, what backward needs.
      backward: (reverse, that, weights, (cotangents of the gradient, of the float outputs of inner)) -> cotangents of
        theta and of the wanted floats. The reverse of both halves knows which these are.
    """

    def gradient(params: PyTree, batch_stats: PyTree, phi: PyTree, batch: PyTree) -> tuple[PyTree, Array, PyTree]:
        flat = flatten(inner, params, batch_stats, phi, batch)
        _check_forward_mode(flat)
        count = len(flat.at.params)

        def reverse(wanted: Wanted) -> Reverse:
            return lambda at, params, weights: flat.reverse(at, wanted, params, weights)

        def plain(*at: Any) -> tuple[list[Array], list[Array]]:
            return reverse(Wanted())(Point(*at), at[0], flat.weights())

        def kept(*primals: Any) -> tuple[Any, Any]:
            wanted = Wanted(i for i, primal in enumerate(primals[1]) if primal.perturbed)
            at = Point(*jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal))
            derivatives, results, kept = forward(reverse(wanted), at, flat.weights())
            return (derivatives[:count], results), (wanted, kept)

        def adjoint(residuals: Any, cotangents: Any) -> tuple[list[Array], list[Array | None], None]:
            wanted, kept = residuals
            u_gradient, u_results = jax.tree.map(_instantiate, cotangents, is_leaf=_is_zero)
            found = backward(reverse(wanted), kept, flat.weights(), (u_gradient, _floats(u_results)))
            of_rest = dict(zip(wanted, found[count:], strict=True))
            return found[:count], [of_rest.get(i) for i in range(len(flat.at.rest))], None

        function = jax.custom_vjp(plain)
        function.defvjp(kept, adjoint, symbolic_zeros=True)
        grads, results = function(*flat.at)
        loss, stats = jax.tree.unflatten(flat.structure, results)
        return jax.tree.unflatten(jax.tree.structure(params), grads), loss, stats

    return gradient


def gradient_gap(
    inner: InnerLoss,
    params: PyTree,
    batch_stats: PyTree,
    phi: PyTree,
    batch: PyTree,
    *,
    axis_name: str | None = None,
) -> float:
    """How far the student's gradient is from being one: its derivative in reverse against that taken forward.

    |u^T dg/d(theta, phi) - d/d(theta, phi) of the loss, differentiated along u| / the larger of both norms, for a
    random u. Both agree where g is the gradient of the loss, and the forward one is what `mixed_gradient` takes.

    Args:
      inner, params, batch_stats, phi, batch: as of a student step. Where values are not known yet (under jit),
        random ones of the same shapes stand in for them.
      axis_name: mapped axis over which batches are split, if any.
    Returns:
      a number of at least 0, known at once: rounding errors where the gradient is one.
    Raises:
      ValueError: as `mixed_gradient`.
    """
    flat = flatten(inner, params, batch_stats, phi, batch)
    _check_forward_mode(flat)
    size = 1 if axis_name is None else lax.axis_size(axis_name)
    wanted = Wanted(range(len(_floats(jax.tree.leaves((batch_stats, phi))))))

    def both(at: Point, u: list[Array]) -> tuple[list[Array], list[Array]]:
        def gradient(params: list[Array], some: list[Array]) -> list[Array]:
            there = at._replace(rest=[*some, *at.rest[len(wanted) :]])
            return flat.reverse(there, Wanted(), params, flat.weights())[0]

        _, vjp = jax.vjp(gradient, at.params, [at.rest[i] for i in wanted])
        of_params, of_some = vjp(u)
        still = [full_like(x, 0) for x in _floats(flat.outputs)]
        reverse = lambda *x: flat.reverse(at, wanted, *x)  # noqa: E731
        forward = jax.jvp(reverse, (at.params, flat.weights()), (u, still), has_aux=True)[1]
        return [*of_params, *of_some], forward

    draws = np.random.default_rng(0)  # NumPy's, as each shape of jax's would be compiled
    at = jax.tree.map(lambda x: _stand_in(draws, x) if isinstance(x, jax.core.Tracer) else x, flat.at)
    u = [draws.normal(size=x.shape).astype(x.dtype) for x in at.params]
    mapped = jax.vmap(both, None, axis_name=axis_name, axis_size=size) if axis_name else both
    reverse, forward = (np.concatenate([np.ravel(x) for x in found]) for found in run_now(mapped, at, u))
    larger = max(np.linalg.norm(reverse), np.linalg.norm(forward))
    return float(np.linalg.norm(reverse - forward) / larger) if larger > 0 else 0.0


def _stand_in(draws: np.random.Generator, like: Array) -> Any:
    """Random values of the size that parameters, statistics and data have: positive where there are no rows."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():
            return jnp.broadcast_to(jax.random.key(0, impl=str(jax.random.key_impl(like))), like.shape)
    if not _is_float(like):
        return np.zeros(like.shape, like.dtype)
    drawn = draws.normal(size=like.shape)
    return (drawn / math.sqrt(math.prod(like.shape[:-1])) if like.ndim > 1 else 0.5 + 0.1 * drawn).astype(like.dtype)


def _check_forward_mode(flat: Flat) -> None:
    """Check that the student's gradient can be differentiated forward, where a `jax.custom_vjp` makes it doubtful.

    jax finds out only when it compiles, and fails there; `custom_lin` is what it then meets.
    """
    if "custom_vjp_call" not in _primitives(flat.jaxpr):
        return
    reverse = lambda params: flat.reverse(flat.at, Wanted(), params, flat.weights())[0]  # noqa: E731
    forward = jax.make_jaxpr(lambda params, u: jax.jvp(reverse, (params,), (u,))[1])(flat.at.params, flat.at.params)
    if "custom_lin" in _primitives(forward.jaxpr):
        raise ValueError(
            "this memory mode differentiates the student's gradient forward, and a jax.custom_vjp inside the inner "
            'loss has reverse mode only: use memory="save" or "remat", which "auto" takes by itself, or jax.custom_jvp.'
        )


def _primitives(jaxpr: Jaxpr) -> set[str]:
    """The names of all primitives in a program, those of its parts included."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return names.union(*(_primitives(part) for equation in jaxpr.eqns for part in jaxprs_in_params(equation.params)))


def _floats(leaves: list[Any]) -> list[Any]:
    return [x for x in leaves if _is_float(x)]


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _instantiate(cotangent: Any) -> Any:
    return full_like(cotangent.aval, 0) if _is_zero(cotangent) else cotangent


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)
