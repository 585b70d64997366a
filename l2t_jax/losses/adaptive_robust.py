"""The adaptive robust loss: how much outliers count is learned beside the student, for each class.

Legend: B batch, C classes, alpha shape, c scale.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from l2t_jax.losses.common import check_number_of_classes, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree

ALPHA_LOW, ALPHA_HIGH = 0.001, 1.999
C_START = 1.0
DEGREE = 40  # of the polynomial in log Z; the error of the fit is below 2e-8


def adaptive_robust(*, num_classes: int = 10, scale_low: float = 0.1) -> Loss:
    """Build sum_j rho(r_j, alpha_j, c_j) + log c_j + log Z(alpha_j), r = onehot(y) - softmax(z).

    Args:
      num_classes: C.
      scale_low: the least c. The released code's is 1e-5, to which c falls as the residuals of a classifier vanish;
        then the loss is -log of a spike and the student is thrown off. 0.1 was stable on validation data.
    Returns:
      a `Loss` whose parameters {"alpha": [C], "c": [C]} are the latent values of `shape_and_scale`, trained beside the
      student; its losses [B] may be negative, as they are minus the log of a density.
    Raises:
      ValueError: C is below 2, the least c not in (0, 1), or, when applied, outputs have another number of classes.
    Source: Barron, CVPR 2019, Eqs. 8, 9 and 15 to 17. L2T-DLN compares with it and does not say how it is used in
    classification: the residual, an alpha and c for every class, the sum over classes and the least c are ours.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"adaptive_robust num_classes={num_classes!r} is not an integer of at least 2: give C.")
    if not 0 < scale_low < C_START:
        raise ValueError(f"adaptive_robust scale_low={scale_low} must lie between 0 and {C_START:g}, both excluded.")
    _log_partition_coefficients()  # now, and not in the middle of a trace

    def init(key: Key) -> PyTree:
        return {"alpha": jnp.zeros(num_classes), "c": jnp.zeros(num_classes)}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_number_of_classes("adaptive_robust", num_classes, outputs, targets)
        residual = jax.nn.one_hot(targets, num_classes, dtype=outputs.dtype) - jax.nn.softmax(outputs)  # [B, C]
        return jnp.sum(negative_log_likelihood(residual, *shape_and_scale(params, scale_low)), axis=-1)

    return make_loss(losses_of, init=init, learned="student")


def shape_and_scale(params: PyTree, scale_low: float) -> tuple[Array, Array]:
    """alpha in (0.001, 1.999) and c > scale_low, [C] each, of the latent values; at 0, where they start, both are 1.

    Source: the released code of Barron, CVPR 2019.
    """
    alpha = ALPHA_LOW + (ALPHA_HIGH - ALPHA_LOW) * jax.nn.sigmoid(params["alpha"])
    one = math.log(math.expm1(1.0))  # softplus of it is 1
    return alpha, scale_low + (C_START - scale_low) * jax.nn.softplus(params["c"] + one)


def negative_log_likelihood(x: Array, alpha: Array, c: Array) -> Array:
    """rho(x, alpha, c) + log c + log Z(alpha) for alpha in [0, 2]; arguments broadcast."""
    return general_robust(x, alpha, c) + jnp.log(c) + log_partition(alpha)


def general_robust(x: Array, alpha: Array, c: Array) -> Array:
    """rho = (b / alpha) (((x / c)^2 / b + 1)^(alpha / 2) - 1), b = |alpha - 2|, with all of its limits.

    alpha = 2: s / 2, s = (x / c)^2; 0: log(1 + s / 2); -inf: 1 - exp(-s / 2); inf: exp(s / 2) - 1.

    Args:
      x: residuals; alpha: shape, any real number or infinity; c: scale > 0. They broadcast.
    Returns:
      losses, finite with first and second derivatives for all finite x. Nothing flows into an infinite alpha. At
      alpha = 2 the derivative with respect to alpha is infinite like log |alpha - 2|: there b is held at the float's
      epsilon, so that it is finite.
    Source: Barron, CVPR 2019, Eq. 8; bounds of the arguments as in the released code.
    """
    x, alpha, c = jnp.broadcast_arrays(*(jnp.asarray(value, jnp.result_type(x, alpha, c)) for value in (x, alpha, c)))
    s = (x / c) ** 2
    shape = jnp.where(jnp.isinf(alpha), 1, alpha)
    b = jnp.maximum(jnp.abs(shape - 2), jnp.finfo(s.dtype).eps)
    u = jnp.log1p(jnp.minimum(s / b, 3e37)) / 2
    finite = b * u * _expm1_over(shape * u)  # b / alpha expm1(alpha u), which has no pole at alpha = 0
    below, above = -jnp.expm1(-s / 2), jnp.expm1(jnp.minimum(s / 2, 87.5))
    return jnp.where(jnp.isinf(alpha), jnp.where(alpha < 0, below, above), finite)


@jax.jit  # traced once, however often it is met in one program
def log_partition(alpha: Array) -> Array:
    """log Z(alpha), Z = integral of exp(-rho(x, alpha, 1)) dx, for alpha in [0, 2]; any shape.

    P(alpha) + b log b Q(alpha), b = 2 - alpha: two polynomials fitted to quadrature, as log Z has the slope of b log b
    at alpha = 2. There b is held at the float's epsilon, as in `general_robust`.

    Source: Barron, CVPR 2019, Eqs. 15 and 16. The released code has a table and a cubic spline; this fit is ours.
    """
    coefficients = _log_partition_coefficients()
    b = jnp.maximum(2 - alpha, jnp.finfo(jnp.result_type(alpha)).eps)
    q = coefficients[-2] + coefficients[-1] * (alpha - 1)
    return _clenshaw(coefficients[:-2], alpha - 1) + b * jnp.log(b) * q


@cache
def _log_partition_coefficients() -> tuple[float, ...]:
    """Fit log Z at Chebyshev nodes: coefficients of P (DEGREE + 1 of them), then of Q (2)."""
    alpha = 1 - np.cos((np.arange(2 * DEGREE) + 0.5) / (2 * DEGREE) * np.pi)
    b = 2 - alpha
    basis = [chebyshev.chebvander(alpha - 1, DEGREE), (b * np.log(b))[:, None] * chebyshev.chebvander(alpha - 1, 1)]
    fitted, *_ = np.linalg.lstsq(np.concatenate(basis, axis=1), np.log(_partition(alpha)), rcond=None)
    return tuple(map(float, fitted))


def _partition(alpha: np.ndarray) -> np.ndarray:
    """Z of alphas strictly between 0 and 2, in float64: the trapezoid rule after x = sinh(y), which tames the tails."""
    step = 1 / 128
    y = np.arange(0, 42, step)  # for alpha = 0 the integrand falls like exp(-y), for larger alpha faster
    weights = 2 * step * np.cosh(y)  # both sides of 0
    weights[0] /= 2
    a, b = alpha[:, None], 2 - alpha[:, None]
    rho = b / a * np.expm1(a / 2 * np.log1p(np.sinh(y) ** 2 / b))
    return np.exp(-rho) @ weights


def _clenshaw(coefficients: tuple[float, ...], x: Array) -> Array:
    later, last = jnp.zeros_like(x), jnp.zeros_like(x)
    for coefficient in coefficients[:0:-1]:
        later, last = 2 * x * later - last + coefficient, later
    return x * later - last + coefficients[0]


def _expm1_over(z: Array) -> Array:
    """(exp(z) - 1) / z, 1 at 0, with all digits of its first two derivatives."""
    small = jnp.abs(z) < 0.5
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.zeros_like(z)
    for k in range(15, 0, -1):
        series = series * near + 1 / math.factorial(k)
    return jnp.where(small, series, jnp.expm1(jnp.minimum(far, 87.5)) / far)
