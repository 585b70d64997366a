"""The loss of TaylorGLO: a polynomial of label and prediction with eight coefficients."""

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree

START = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0)  # theta_0 .. theta_7


def taylor_glo() -> Loss:
    """Build a third-order Taylor polynomial about (theta_0, theta_1), without the terms of the label alone.

    l = -1/C sum_j [ th2 d + th3/2 d^2 + th4/6 d^3 + th5 e d + th6/2 e d^2 + th7/2 e^2 d ],
    d = p_j - th1, e = onehot(y)_j - th0, p = softmax(z).

    Returns:
      a `Loss` whose parameters are theta [8].
    Source: Gonzalez and Miikkulainen, GECCO 2021, which searches theta by evolution. The start is ours:
    l = (w + w^2 / 2) / C, w = 1 - p_y, the first two terms of cross entropy's series about p_y = 1.
    """

    def init(key: Key) -> PyTree:
        return jnp.asarray(START)

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_classes(outputs, targets)
        labels = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        return -jnp.mean(polynomial(params, labels, jax.nn.softmax(outputs)), axis=-1)

    return make_loss(losses_of, init=init)


def polynomial(theta: Array, label: Array, prediction: Array) -> Array:
    """The bracket above, for theta [8] and labels and predictions of any one shape."""
    e, d = label - theta[0], prediction - theta[1]
    in_d = theta[2] * d + theta[3] / 2 * d**2 + theta[4] / 6 * d**3
    return in_d + theta[5] * e * d + theta[6] / 2 * e * d**2 + theta[7] / 2 * e**2 * d
