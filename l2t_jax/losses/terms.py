"""Losses of the terms of an error that is a sum, as a detector's: how much each counts is taught.

Legend: R rows, T terms.
"""

import jax.numpy as jnp

from l2t_jax.losses.common import fixed, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree

READS = "terms"  # the view of a task: outputs [R, T]


def linear_dln(*, terms: int = 3) -> Loss:
    """Build the DLN of a detector: sum_t w_t l_t + b, one linear layer over the terms l of a row.

    It begins with w = 1 and b = 0, as the sum of the terms.

    Args:
      terms: T; of detection class, confidence and location.
    Source: L2T-DLN (NeurIPS 2023), 5.2: a single-layer perceptron. How it begins is not stated; Kaiming's law could
    give negative weights, and ones make the loss that of YOLOv3 before anything is taught. b moves no student.
    """

    def init(key: Key) -> PyTree:
        return {"bias": jnp.zeros(()), "weights": jnp.ones(terms)}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        return outputs @ params["weights"].astype(outputs.dtype) + params["bias"].astype(outputs.dtype)

    return make_loss(losses_of, init, reads=READS)


def _sum(outputs: Array, targets: Array) -> Array:
    """sum_t l_t of the terms [R, T] of each row: the fixed loss of a detector."""
    return outputs.sum(-1)


sum_of_terms = fixed(_sum, reads=READS)
