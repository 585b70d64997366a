"""Losses of how well scores rank: the area under precision and recall, and under the ROC curve, each class by itself.

Legend: R rows, C classes, A anchors; z scores, y 1 where a row is of the class and 0 where it is of another.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.losses.common import check_classes, check_number_of_classes, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree

READS = "batch"  # the view of a task: the rows of the whole batch, on every device


def aucpr(
    *, num_classes: int = 10, anchors: int = 20, low: float = 0.0, high: float = 1.0, dual_rate: float = 0.1
) -> Loss:
    """Build the Lagrangian of the area under the precision-recall curve: recall at each of A precisions p_a.

    L = w sum_a mean[(1 + lambda_a (1 - p_a)) y l(z + b_a) + lambda_a p_a (1 - y) l(-z - b_a)
                     - lambda_a (1 - p_a) y log 2],
    averaged over classes, l(x) = log(1 + exp(-x)); l / log 2 bounds true positives from below and false positives from
    above. p_a are evenly spaced inside (low, high), w = delta / (high - low - delta), delta = p_2 - p_1. Student and
    thresholds b descend, the multipliers lambda >= 0 ascend at `dual_rate` times the student's rate: `Loss.descent`.

    Args:
      num_classes: C.
      anchors: A.
      low, high: the range of precision whose area counts, within [0, 1].
      dual_rate: of the multipliers' ascent.
    Returns:
      a `Loss` with parameters {"bias": [C, A], "lambda": [C, A]}, from 0 and 1, trained beside the student; the
      multipliers are their absolute values. Its losses [R] may be negative.
    Raises:
      ValueError: a knob is out of range, or outputs have another number of classes.
    Source: Eban et al., AISTATS 2017, and the released code. There pi, the share of a class, is a moving average of
    labels; here y itself stands in its place, whose mean is pi of the batch, so that nothing must be carried. There
    ascent is a gradient that is turned round inside the loss, whose derivative is not that of the update; here the
    gradient is turned after it was taken, so derivatives of any order are those of what happens.
    """
    for name, count, least in (("num_classes", num_classes, 2), ("anchors", anchors, 2)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"aucpr {name}={count!r} is not an integer of at least {least}: give another {name}.")
    if not 0 <= low < high <= 1:
        raise ValueError(f"aucpr low={low}, high={high} are no range of precision: give 0 <= low < high <= 1.")
    if not 0 <= dual_rate < math.inf:
        raise ValueError(f"aucpr dual_rate={dual_rate} is out of range: give a finite dual_rate of at least 0.")
    precisions = np.linspace(low, high, anchors + 2)[1:-1]
    delta = precisions[0] - low
    scale = float(delta / (high - low - delta))

    def init(key: Key) -> PyTree:
        return {"bias": jnp.zeros((num_classes, anchors)), "lambda": jnp.ones((num_classes, anchors))}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_number_of_classes("aucpr", num_classes, outputs, targets)
        p = precisions.astype(outputs.dtype)
        of_class = jax.nn.one_hot(targets, num_classes, dtype=outputs.dtype)[:, :, None]  # [R, C, 1]
        multiplier = jnp.abs(params["lambda"]).astype(outputs.dtype)  # [C, A]
        score = outputs[:, :, None] + params["bias"].astype(outputs.dtype)  # [R, C, A]
        positive = (1 + multiplier * (1 - p)) * jax.nn.softplus(-score) - multiplier * (1 - p) * math.log(2)
        negative = multiplier * p * jax.nn.softplus(score)
        return scale * jnp.mean(jnp.sum(of_class * positive + (1 - of_class) * negative, axis=2), axis=1)

    def descent(gradient: PyTree) -> PyTree:
        return gradient | {"lambda": -dual_rate * gradient["lambda"]}

    return make_loss(losses_of, init=init, learned="student", descent=descent)


def pairwise_aucroc(outputs: Array, targets: Array) -> Array:
    """The ranking loss of the area under the ROC curve: every row of a class against every row of another.

    values_i = 1/C sum_c 1/(2R) sum_j |y_ic - y_jc| log(1 + exp(-(y_ic - y_jc)(z_ic - z_jc))), whose mean over i is a
    half of the mean over all pairs of rows.

    Args:
      outputs: [R, C] of the whole batch; targets: [R].
    Returns:
      [R].
    Source: the pairwise loss of Eban et al.'s released code, each class against the others.
    """
    check_classes(outputs, targets)
    of_class = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
    order = of_class[:, None] - of_class[None]  # [R, R, C]: 1, 0 or -1
    gap = outputs[:, None] - outputs[None]
    return jnp.mean(jnp.abs(order) * jax.nn.softplus(-order * gap), axis=(1, 2)) / 2
