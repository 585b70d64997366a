"""Large-margin softmax: cross entropy with a right class that must win by an angle.

Legend: B batch, F features, C classes, theta the angle between features and a class's column of the last layer.
"""

import math

import jax
import jax.numpy as jnp

from l2t_jax.inputs import known
from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.types import Array, Head, Key, Loss, PyTree

MARGINS = (1, 2, 3, 4)
TINY = 1e-9  # a norm below it has no direction


def large_margin_softmax(
    *,
    m: int = 2,
    base: float = 1000.0,
    gamma: float = 1e-5,
    power: float = 45.0,
    lambda_min: float = 0.0,
    iterations: int = 30_000,
) -> Loss:
    """Build cross entropy with f_y = |w_y| |x| (lambda cos theta_y + psi(theta_y)) / (1 + lambda) + b_y.

    lambda = max(lambda_min, base (1 + gamma it)^-power), it = iterations * progress: cross entropy at first.

    Args:
      m: the margin, 1 (none: cross entropy) to 4.
      base, gamma, power, lambda_min: of the schedule. The defaults are the released configuration for CIFAR-10 with
        augmentation; without it gamma is 2e-5, for MNIST m is 4, gamma 2.5e-5 and power 35.
      iterations: what the whole run is taken to be in the schedule's count, however many steps it has.
    Returns:
      a `Loss` that reads a `Head`; its parameter {"lambda": []} starts at `base`, and nothing learns it.
    Raises:
      ValueError: m is none of 1 to 4, or a number of the schedule is out of range.
    Source: Liu et al., ICML 2016, and the released layer and solvers (30 000 iterations in each). The margin is in
    training only: a student is tested by its outputs. Their last layer has no bias; a student's own is added
    unchanged, and that the schedule scales with the run is ours too.
    """
    known(f"large_margin_softmax m={m!r}", m, MARGINS)
    for name, value in (("base", base), ("gamma", gamma), ("power", power), ("lambda_min", lambda_min)):
        if not 0 <= value < math.inf:
            raise ValueError(f"large_margin_softmax {name}={value!r} is out of range: give a finite {name} >= 0.")
    if not iterations > 0:
        raise ValueError(f"large_margin_softmax iterations={iterations!r} is not positive: give at least 1.")

    def init(key: Key) -> PyTree:
        return {"lambda": jnp.asarray(float(base))}

    def at(params: PyTree, progress: Array) -> PyTree:
        decay = jnp.exp(-power * jnp.log1p(gamma * iterations * progress))
        return {"lambda": jnp.maximum(params["lambda"] * decay.astype(params["lambda"].dtype), lambda_min)}

    def losses_of(params: PyTree, outputs: Head, targets: Array) -> Array:
        check_classes(outputs, targets)
        features = outputs.features
        column = outputs.kernel.T[targets]  # [B, F]
        plain = jnp.sum(features * column, axis=-1)  # [B]
        share = 1 / (1 + params["lambda"].astype(plain.dtype))
        change = share * (margin_product(features, column, m) - plain)  # [B]
        is_right = jax.nn.one_hot(targets, outputs.kernel.shape[-1], dtype=plain.dtype)  # [B, C]
        logits = features @ outputs.kernel + outputs.bias + is_right * change[..., None]
        return cross_entropy(logits, targets)

    return make_loss(losses_of, init=init, at=at, reads="head", learned="no")


def psi(cos: Array, m: int) -> Array:
    """(-1)^k cos(m theta) - 2k, theta in [k pi / m, (k + 1) pi / m]: falls from 1 to 1 - 2m; a function of cos theta.

    Without arccos, whose slope is infinite at 0 and at pi: cos(m theta) is the Chebyshev polynomial T_m(cos theta),
    and k counts the ends of intervals that theta has passed. At these ends the first derivative has no step.

    Args:
      cos: cos theta, any shape. Not clipped to [-1, 1]: rounding beyond it does no harm here, and clipping would cut
        the derivative at theta = 0 and pi.
      m: 1 to 4.
    Returns:
      psi, same shape.
    """
    ends = jnp.asarray([math.cos(j * math.pi / m) for j in range(1, m)], cos.dtype)
    k = jnp.sum(cos[..., None] < ends, axis=-1)  # an integer, so no derivative goes through it
    before, chebyshev = jnp.ones_like(cos), cos
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cos * chebyshev - before
    return jnp.where(k % 2 == 0, chebyshev, -chebyshev) - 2 * k.astype(cos.dtype)


def margin_product(features: Array, column: Array, m: int) -> Array:
    """|w| |x| psi(theta) of features x [B, F] and columns w [B, F]; their product w x where either has no direction."""
    (x, x_norm, x_given), (w, w_norm, w_given) = _direction(features), _direction(column)
    product = x_norm * w_norm * psi(jnp.sum(x * w, axis=-1), m)
    return jnp.where(x_given & w_given, product, jnp.sum(features * column, axis=-1))


def _direction(x: Array) -> tuple[Array, Array, Array]:
    squares = jnp.sum(x**2, axis=-1)
    given = squares > TINY**2
    norm = jnp.sqrt(jnp.where(given, squares, 1))  # inside the root: where alone leaves the derivative NaN at 0
    return x / norm[..., None], norm, given
