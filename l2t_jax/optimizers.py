"""Student optimizers inside an unroll: they are differentiated, also where a gradient is exactly zero."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.inputs import run_now
from l2t_jax.types import PyTree


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


def check_at_zero(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Check that an optimizer's first update can be differentiated at a gradient that is exactly zero.

    Args:
      optimizer: an optax transformation.
      params: what it updates; arrays, no tracers.
    Raises:
      ValueError: its derivative there is not finite, so one zero gradient would make a whole hypergradient NaN.
    """

    def derivatives(params: PyTree) -> PyTree:
        state, zeros = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
        updates, vjp = jax.vjp(lambda g: optimizer.update(g, state, params)[0], zeros)
        return vjp(jax.tree.map(jnp.ones_like, updates))

    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run_now(derivatives, params))):
        raise ValueError(
            "the student's optimizer has no derivative at a zero gradient, so the hypergradient would be NaN there: "
            "use l2t_jax.optimizers.clip_by_global_norm in place of optax's, and eps_root > 0 in Adam and its kin."
        )
