"""The bilinear loss that L2T-DLF and ALA rewrite: a matrix of coefficients between labels and log-probabilities."""

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree


def bilinear(*, num_classes: int = 10) -> Loss:
    """Build l(z, y) = -sigmoid(sum_j Phi_yj log p_j + b_y), p = softmax(z).

    At Phi = I and b = 0, where it starts, it is -sigmoid(log p_y) = -p_y / (1 + p_y): its slope is that of cross
    entropy times p_y / (1 + p_y)^2, so what is quite wrong hardly moves.

    Args:
      num_classes: C.
    Returns:
      a `Loss` with parameters {"phi": [C, C], "bias": [C]}; its losses [B] lie in (-1, 0).
    Raises:
      ValueError: C is below 2, or, when applied, outputs have another number of classes.
    Source: L2T-DLF (NeurIPS 2018), 3, and ALA (ICML 2019), 4. Row y of Phi is taken, as both print it; the demo of
    L2T-DLF takes column y, which is the same for symmetric Phi. The bias is in that demo only.
    """

    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"bilinear num_classes={num_classes!r} is not an integer of at least 2: give C.")

    def init(key: Key) -> PyTree:
        return {"phi": jnp.eye(num_classes), "bias": jnp.zeros(num_classes)}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_classes(outputs, targets)
        if (classes := outputs.shape[-1]) != num_classes:
            raise ValueError(
                f"bilinear was built for {num_classes} classes and is given outputs of {classes}: build it with "
                f"num_classes={classes}."
            )
        rows = params["phi"][targets]  # [B, C]
        score = jnp.sum(rows * jax.nn.log_softmax(outputs), axis=-1) + params["bias"][targets]
        return -jax.nn.sigmoid(score)

    return make_loss(losses_of, init=init)
