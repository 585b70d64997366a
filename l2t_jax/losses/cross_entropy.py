"""Cross entropy, the baseline of every table."""

import optax

from l2t_jax.losses.common import check_classes
from l2t_jax.types import Array


def cross_entropy(outputs: Array, targets: Array) -> Array:
    """-log softmax(z)_y.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
    Returns:
      losses [B], in nats.
    Raises:
      ValueError: see `check_classes`.
    """
    check_classes(outputs, targets)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
