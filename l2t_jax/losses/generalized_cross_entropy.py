"""Generalized cross entropy, robust to wrong labels."""

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_classes
from l2t_jax.types import Array


def generalized_cross_entropy(outputs: Array, targets: Array, *, q: float = 0.7) -> Array:
    """(1 - p_y^q) / q, between cross entropy (q -> 0) and the mean absolute error (q = 1).

    Args:
      outputs: logits z [B, C]; p = softmax(z).
      targets: classes y [B], int.
      q: in (0, 1].
    Returns:
      losses [B] in [0, 1/q].
    Raises:
      ValueError: q is not in (0, 1]; or see `check_classes`.
    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 6 (q = 0.7 throughout).
    """
    if not 0 < q <= 1:
        raise ValueError(f"generalized_cross_entropy q={q!r} is out of range: give 0 < q <= 1; cross_entropy is q = 0.")
    check_classes(outputs, targets)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)[..., 0]
    return -jnp.expm1(q * log_p) / q  # p^q through log p: no infinite slope at p = 0, no loss of digits at p = 1
