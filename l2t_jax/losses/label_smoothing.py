"""Cross entropy with smoothed labels."""

import jax
import optax

from l2t_jax.losses.common import check_classes
from l2t_jax.types import Array


def label_smoothing(outputs: Array, targets: Array, *, smoothing: float = 0.1) -> Array:
    """Cross entropy against (1 - e) onehot(y) + e / C.

    Args:
      outputs: logits z [B, C].
      targets: classes y [B], int.
      smoothing: e in [0, 1].
    Returns:
      losses [B], in nats.
    Raises:
      ValueError: e is not in [0, 1]; or see `check_classes`.
    Source: Szegedy et al., CVPR 2016, section 7.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing smoothing={smoothing!r} is not a share: give a number in [0, 1].")
    check_classes(outputs, targets)
    labels = optax.smooth_labels(jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype), smoothing)
    return optax.softmax_cross_entropy(outputs, labels)
