"""The loss that L2T-DLF and ALA rewrite: a matrix of coefficients between labels and log-probabilities.

Legend: B batch, C classes, r rank.
"""

import math

import jax
import jax.numpy as jnp

from l2t_jax.losses.common import check_number_of_classes, make_loss
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
        check_number_of_classes("bilinear", num_classes, outputs, targets)
        rows = params["phi"][targets]  # [B, C]
        score = jnp.sum(rows * jax.nn.log_softmax(outputs), axis=-1) + params["bias"][targets]
        return -jax.nn.sigmoid(score)

    return make_loss(losses_of, init=init)


def bilinear_low_rank(*, num_classes: int = 10, rank: int = 8) -> Loss:
    """Build the same loss with Phi = diag(c) + U V^T, for so many classes that Phi has no room: a vocabulary.

    Phi is never built: sum_j Phi_yj log p_j = c_y log p_y + U_y . (V^T log p).

    Args:
      num_classes: C.
      rank: r, columns of U and V.
    Returns:
      a `Loss` with parameters {"diagonal": c [C], "left": U [C, r], "right": V [C, r], "bias": b [C]}. It begins with
      Phi = I: V is zero and U is not, so that both can be learned.
    Raises:
      ValueError: C is below 2, r below 1, or, when applied, outputs have another number of classes.
    Source: L2T-DLF (NeurIPS 2018) restricts the matrix of its translation loss; how is not at hand, and this is ours.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"bilinear_low_rank num_classes={num_classes!r} is not an integer of at least 2: give C.")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"bilinear_low_rank rank={rank!r} is not a positive integer: give at least 1.")

    def init(key: Key) -> PyTree:
        left = jax.random.normal(key, (num_classes, rank)) / math.sqrt(rank)
        return untaught(num_classes, rank) | {"left": left}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_number_of_classes("bilinear_low_rank", num_classes, outputs, targets)
        chances = jax.nn.log_softmax(outputs)
        right = jnp.take_along_axis(chances, targets[:, None], axis=-1)[:, 0]
        across = jnp.sum(params["left"][targets] * (chances @ params["right"]), axis=-1)
        return -jax.nn.sigmoid(params["diagonal"][targets] * right + across + params["bias"][targets])

    return make_loss(losses_of, init=init)


def untaught(num_classes: int, rank: int = 0) -> dict[str, Array]:
    """The parameters of Phi = I and no bias: of `bilinear` at rank 0, else of `bilinear_low_rank`."""
    bias = jnp.zeros(num_classes)
    if rank == 0:
        return {"phi": jnp.eye(num_classes), "bias": bias}
    factors = {name: jnp.zeros((num_classes, rank)) for name in ("left", "right")}
    return {"diagonal": jnp.ones(num_classes), **factors, "bias": bias}


def distance(one: dict[str, Array], other: dict[str, Array]) -> Array:
    """|Phi - Phi'| [], the root of the sum of squares, of parameters of the same form; no C x C matrix is built."""
    if "phi" in one:
        return jnp.linalg.norm(one["phi"] - other["phi"])
    diagonal = one["diagonal"] - other["diagonal"]
    left = jnp.concatenate([one["left"], -other["left"]], axis=1)
    right = jnp.concatenate([one["right"], other["right"]], axis=1)
    across = 2 * jnp.sum(diagonal[:, None] * left * right) + jnp.sum((left.T @ left) * (right.T @ right))
    return jnp.sqrt(jnp.maximum(jnp.sum(diagonal**2) + across, 0))
