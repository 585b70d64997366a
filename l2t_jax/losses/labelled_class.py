"""Losses of the labelled class's probability alone: p_y, p = softmax(z). All but focal and poly resist wrong labels."""

import math

import jax
import jax.numpy as jnp
import optax

from l2t_jax.losses.common import check_classes
from l2t_jax.types import Array


def focal(outputs: Array, targets: Array, *, gamma: float = 2.0) -> Array:
    """-(1 - p_y)^gamma log p_y: cross entropy in which what is already right counts for less.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
      gamma: at least 0, which is cross entropy.
    Returns:
      losses [B].
    Raises:
      ValueError: gamma is negative or not finite; or see `check_classes`.
    Source: Lin et al., ICCV 2017, Eq. 4, without its class weights. It is printed for two classes; p_y of a softmax
    in the place of theirs is the usual extension.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"focal gamma={gamma!r} is out of range: give a finite gamma >= 0.")
    log_p = _log_labelled(outputs, targets)
    # Through log(1 - p): for gamma < 2 a plain power has no finite second derivative at p = 1.
    wrong = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).eps)
    return -jnp.exp(gamma * jnp.log(wrong)) * log_p


def mae(outputs: Array, targets: Array) -> Array:
    """sum_j |onehot(y)_j - p_j| = 2 (1 - p_y), the mean absolute error.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
    Returns:
      losses [B] in [0, 2].
    Raises:
      ValueError: see `check_classes`.
    Source: Ghosh et al., AAAI 2017.
    """
    return -2 * jnp.expm1(_log_labelled(outputs, targets))


def sce(outputs: Array, targets: Array, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0) -> Array:
    """alpha CE + beta RCE, symmetric cross entropy; RCE = -sum_j p_j log onehot(y)_j = -log_zero (1 - p_y).

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
      alpha, beta: weights of cross entropy and of reverse cross entropy.
      log_zero: A < 0, what stands for log 0.
    Returns:
      losses [B].
    Raises:
      ValueError: A is not negative, or a weight is; or see `check_classes`.
    Source: Wang et al., ICCV 2019; the values are theirs for CIFAR-10.
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and -math.inf < log_zero < 0):
        raise ValueError(
            f"sce alpha={alpha!r}, beta={beta!r}, log_zero={log_zero!r} are out of range: give finite weights >= 0 and "
            "a finite log_zero < 0."
        )
    log_p = _log_labelled(outputs, targets)
    return -alpha * log_p + beta * log_zero * jnp.expm1(log_p)


def poly(outputs: Array, targets: Array, *, epsilon: float = 2.0) -> Array:
    """CE + epsilon (1 - p_y), Poly-1: cross entropy with the first term of its series in 1 - p_y changed.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
      epsilon: at least -1; 0 is cross entropy.
    Returns:
      losses [B].
    Raises:
      ValueError: epsilon is below -1 or not finite; or see `check_classes`.
    Source: Leng et al., ICLR 2022; epsilon = 2 is their value for ImageNet.
    """
    if not -1 <= epsilon < math.inf:
        raise ValueError(f"poly epsilon={epsilon!r} is out of range: give a finite epsilon >= -1.")
    check_classes(outputs, targets)
    labels = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
    return optax.losses.poly_loss_cross_entropy(outputs, labels, epsilon=epsilon)


def taylor_ce(outputs: Array, targets: Array, *, order: int = 2) -> Array:
    """sum_{k=1}^t (1 - p_y)^k / k: the series of -log p_y in 1 - p_y, cut at t; t = 1 is half of the MAE.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
      order: t, at least 1.
    Returns:
      losses [B].
    Raises:
      ValueError: the order is no integer of at least 1; or see `check_classes`.
    Source: Feng et al., IJCAI 2020.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"taylor_ce order={order!r} is not a positive integer: give order at least 1.")
    wrong = -jnp.expm1(_log_labelled(outputs, targets))
    losses = jnp.full_like(wrong, 1 / order)
    for k in range(order - 1, 0, -1):  # Horner
        losses = losses * wrong + 1 / k
    return losses * wrong


def _log_labelled(outputs: Array, targets: Array) -> Array:
    check_classes(outputs, targets)
    return jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)[..., 0]
