"""Optimizers inside an unroll: they are differentiated, also where a gradient is exactly zero.

Any optax transformation of a gradient will do. Those of its sign alone (`sign_sgd`, `lion`, `rprop`) are piecewise
constant, so a hypergradient through them is zero, as it should be, and teaches nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.inputs import run_now
from l2t_jax.types import PyTree, Teacher

FIRST = 6  # steps; optax.radam is unlike itself in so many


WARM_UP, SHARE = 4000, 10  # steps at most, and one in so many of a run


def inverse_sqrt(rate: float, steps: int) -> optax.Schedule:
    """Build the rate min(t / w, sqrt(w / t)) of the t-th step, t = 1, 2, ...: it rises for w steps, and then falls.

    Args:
      rate: the highest, of step w.
      steps: of the run; w is a tenth of them, at least 1 and at most 4000.
    Source: Vaswani et al. 2017, 5.3, with w = 4000 in runs of many times that; the tenth is ours, for shorter ones.
    """
    warm_up = min(WARM_UP, max(1, steps // SHARE))

    def at(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count) + 1.0
        return rate * jnp.minimum(t / warm_up, jnp.sqrt(warm_up / t))

    return at


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Build g <- g min(1, c / |g|), |g| the norm over all leaves, with a derivative everywhere but at |g| = c.

    The numbers are those of `optax.clip_by_global_norm`. Its derivative is NaN where the gradient is exactly zero, as
    that of the norm is; a batch of which every example is masked makes one.

    Args:
      max_norm: c > 0.
    Raises:
      ValueError: c is not positive and finite.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm={max_norm} is not a positive, finite number: give the largest norm to let through.")

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        square = optax.tree.norm(updates, squared=True)
        clipped = jnp.sqrt(square) >= max_norm
        norm = jnp.sqrt(jnp.where(clipped, square, 1))  # so that nothing is divided by zero, nor rooted there
        return jax.tree.map(lambda g: jnp.where(clipped, g / norm.astype(g.dtype) * max_norm, g), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def sgd(
    rate: optax.ScalarOrSchedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Stochastic gradient descent.

    Args:
      rate: a number, or of each step.
      momentum: share of the last step that goes on; 0 for none.
      nesterov: look ahead along it.
      weight_decay: times the parameters, added to the gradient.
    """
    return _decayed(weight_decay, optax.sgd(rate, momentum or None, nesterov))


def adam(
    rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps_root: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam, with a derivative at a zero gradient.

    Args:
      rate: a number, or of each step.
      b1: decay of the mean gradient.
      b2: decay of the mean squared gradient.
      eps_root: added below the root; at 0 there is no derivative where a gradient is zero.
      weight_decay: times the parameters, added to the gradient.
    """
    return _decayed(weight_decay, optax.adam(rate, b1, b2, eps_root=eps_root))


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps_root: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """Adam whose decay is of the parameters themselves. Arguments as of `adam`.

    Args:
      weight_decay: times the rate and the parameters, taken off them.
    """
    return optax.adamw(rate, b1, b2, eps_root=eps_root, weight_decay=weight_decay)


def rmsprop(rate: optax.ScalarOrSchedule, *, decay: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """RMSprop, with its eps below the root.

    Args:
      rate: a number, or of each step.
      decay: of the mean squared gradient.
      eps: added below the root.
    """
    return optax.rmsprop(rate, decay, eps)


def _decayed(decay: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optimizer) if decay else optimizer


# Of a student, by name: (rate, knobs) -> transformation.
STUDENT_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "rmsprop": rmsprop,
}


def check_optimizer(optimizer: Any, who: str) -> None:
    """Check that an optimizer is an optax transformation.

    Raises:
      ValueError: it is not; a builder that was not called, or a teacher, perhaps.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")) or isinstance(optimizer, Teacher):
        called = "; give what it returns, optax.sgd(0.1) and not optax.sgd" if callable(optimizer) else ""
        raise ValueError(f"{who} is a {type(optimizer).__name__}: expected an optax transformation{called}.")


def update_with(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: PyTree, params: PyTree, who: str
) -> tuple[PyTree, PyTree]:
    """The updates and the new state of an optimizer, which is given no more than these.

    Raises:
      ValueError: it fails; the line says who and what else it wants.
    """
    try:
        updates, after = optimizer.update(gradient, state, params)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise ValueError(
            f"{who} cannot take a step ({type(error).__name__}: {reason}). It is given a gradient, the state of its "
            "own init and parameters, no value of the loss and no function of it (lbfgs, polyak_sgd, momo want one), "
            "and parameters as they are (sm3 wants an axis in each): take another, e.g. optax.sgd."
        ) from error
    return updates, after


def check_at_zero(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Check that an optimizer's first update can be differentiated at a gradient that is exactly zero.

    Args:
      optimizer: an optax transformation.
      params: what it updates; arrays, no tracers.
    Raises:
      ValueError: its derivative there is not finite, so one zero gradient would make a whole hypergradient NaN; or see
        `check_at_first`.
    """
    if not _finite_slope(optimizer, params, 0.0, steps=1):
        check_at_first(optimizer, params)
        raise ValueError(
            "the student's optimizer has no derivative at a zero gradient, so the hypergradient would be NaN there: "
            "use l2t_jax.optimizers.clip_by_global_norm in place of optax's, and eps_root > 0 in Adam and its kin."
        )


def check_at_first(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Check that an optimizer's first updates can be differentiated at ordinary gradients.

    Args: as for `check_at_zero`.
    Raises:
      ValueError: a derivative is not finite.
    """
    if not _finite_slope(optimizer, params, 1.0, FIRST):
        raise ValueError(
            "the student's optimizer has no finite derivative in its first steps, whatever the gradient (optax.radam "
            "has a NaN behind a `where` there), so the hypergradient would be NaN: take another, e.g. optax.adam with "
            "eps_root > 0."
        )


def _finite_slope(optimizer: optax.GradientTransformation, params: PyTree, gradient: float, steps: int) -> bool:
    """Whether the derivative of some updates by a gradient, all of whose entries are the same, is finite."""

    def derivatives(params: PyTree) -> PyTree:
        def updated(given: PyTree) -> PyTree:
            theta, state = params, optimizer.init(params)
            for _ in range(steps):
                updates, state = update_with(optimizer, given, state, theta, "the student's optimizer")
                theta = optax.apply_updates(theta, updates)
            return theta

        after, vjp = jax.vjp(updated, jax.tree.map(lambda x: jnp.full_like(x, gradient), params))
        return vjp(jax.tree.map(jnp.ones_like, after))

    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run_now(derivatives, params)))
