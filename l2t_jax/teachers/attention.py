"""The teacher of L2T-DLF: attention over slots of coefficient matrices, asked by features of the student's state.

Legend: F state features, D units of a key, n slots, C classes, r rank, T steps of a student's life.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from l2t_jax.losses.bilinear import untaught
from l2t_jax.types import Array, Key, PyTree

FEATURES = 7  # F
DECAY = 0.9  # of the running averages: those of about the last ten batches
SMALL = 1e-3  # standard deviation of the slots' entries at the start: next to nothing, as the demo starts at I


class Running(NamedTuple):
    """What the teacher is told of a student: measured along its life, every entry []."""

    steps: Array  # int, student steps taken
    train_loss: Array  # running average of the cross entropy, nats
    train_accuracy: Array  # running average
    dev_accuracy: Array  # on the last validation batch; 0 before the first
    batch_error: Array  # share of the last training batch that was wrong before its update
    best_dev_accuracy: Array
    margin: Array  # mean p_y - max_{j != y} p_j of the last training batch before its update


class Attention(NamedTuple):
    """The teacher's parameters."""

    query: Array  # [D, F]
    keys: Array  # [n, D]
    values: PyTree  # [n, C, C]; of the low-rank form {"diagonal" [n, C], "left" and "right" [n, C, r]}
    bias: Array  # [C]


def newborn() -> Running:
    """What is known of a student before its first step; no two entries share a buffer."""
    return Running(jnp.int32(0), *(jnp.zeros(()) for _ in Running._fields[1:]))


def saw_batch(running: Running, measured: dict[str, Array]) -> Running:
    """Take in the means of a training batch, measured before its update; the step itself is not counted yet.

    The averages are those of all batches so far while these are few, and forget by `DECAY` afterwards, so that they
    start without a bias.

    Args:
      running: before the batch.
      measured: {"loss", "accuracy", "margin"}, each [].
    """
    chex.assert_rank(list(measured.values()), 0)
    before = running.steps.astype(running.train_loss.dtype)  # an int would make it float32 whatever the rest is
    rate = jnp.maximum(1 - DECAY, 1 / (before + 1))
    return running._replace(
        train_loss=_toward(running.train_loss, measured["loss"], rate),
        train_accuracy=_toward(running.train_accuracy, measured["accuracy"], rate),
        batch_error=(1 - measured["accuracy"]).astype(running.batch_error.dtype),
        margin=measured["margin"].astype(running.margin.dtype),
    )


def _toward(old: Array, new: Array, rate: Array) -> Array:
    return (old + rate * (new - old)).astype(old.dtype)  # the carry of a scan keeps its dtype


def saw_validation(running: Running, accuracy: Array) -> Running:
    """Take in the accuracy [] on a validation batch."""
    chex.assert_rank(accuracy, 0)
    accuracy = accuracy.astype(running.dev_accuracy.dtype)
    return running._replace(dev_accuracy=accuracy, best_dev_accuracy=jnp.maximum(running.best_dev_accuracy, accuracy))


def state_features(running: Running, *, num_classes: int, steps: int) -> Array:
    """The state s [F]: t / T, training loss / log C (1 is chance), training and dev accuracy, batch error, best dev
    accuracy, margin. All lie in [0, 1] but the loss, and the margin in [-1, 1]; t / T exceeds 1 after T steps.

    Source: L2T-DLF (NeurIPS 2018), whose list is not available to us: that the state tells training and dev accuracy
    and the iteration is, the rest, the units and the averages are ours.
    """
    time = running.steps.astype(running.train_loss.dtype) / steps
    return jnp.stack(running._replace(steps=time, train_loss=running.train_loss / math.log(num_classes)))


def init_attention(key: Key, *, num_classes: int, slots: int = 10, width: int = 16, rank: int = 0) -> Attention:
    """Draw the teacher: queries and keys N(0, 1), so that attention is neither even nor decided, values N(0, 0.001^2).

    The values must not start at zero together with what attends to them: the product of the two has no derivative
    there, and a teacher with both at zero stays static for ever.

    Args:
      key: of the draws.
      num_classes: C.
      slots: n.
      width: D.
      rank: r of `bilinear_low_rank`, whose U are drawn of N(0, 1 / r), so that U V^T is as small as what is drawn for
        the full matrix; 0: that of `bilinear`.
    """
    k_query, k_keys, k_values = jax.random.split(key, 3)
    return Attention(
        query=jax.random.normal(k_query, (width, FEATURES)),
        keys=jax.random.normal(k_keys, (slots, width)),
        values=_values(k_values, slots, num_classes, rank),
        bias=jnp.zeros(num_classes),
    )


def _values(key: Key, slots: int, num_classes: int, rank: int) -> PyTree:
    if rank == 0:
        return SMALL * jax.random.normal(key, (slots, num_classes, num_classes))
    k_diagonal, k_left, k_right = jax.random.split(key, 3)
    return {
        "diagonal": SMALL * jax.random.normal(k_diagonal, (slots, num_classes)),
        "left": jax.random.normal(k_left, (slots, num_classes, rank)) / math.sqrt(rank),
        "right": SMALL * jax.random.normal(k_right, (slots, num_classes, rank)),
    }


def coefficients(params: Attention, features: Array) -> PyTree:
    """Phi = I + sum_i alpha_i V_i, alpha = softmax(K W_q s / sqrt(D)): the parameters of the bilinear loss.

    Args:
      params: of the teacher.
      features: the state s [F].
    Returns:
      {"phi": [C, C], "bias": [C]}, or likewise c, U and V of Phi = diag(c) + U V^T, each a mean
      of slots; the bias does not depend on the state.
    Source: L2T-DLF (NeurIPS 2018) has an attention network emit the matrix; its form and sizes are not available to
    us, so slots that are attended to by key and query, the identity they are added to, and n, D are ours. The bias is
    a learned constant as in the demo of L2T-DLF.
    """
    query = params.query @ features.astype(params.query.dtype)  # [D]
    alpha = jax.nn.softmax(params.keys @ query / math.sqrt(query.size))  # [n]
    values = params.values if isinstance(params.values, dict) else {"phi": params.values}
    begun = untaught(params.bias.size, values["left"].shape[-1] if "left" in values else 0)
    moved = {name: jnp.tensordot(alpha, value, axes=1) for name, value in values.items()}
    return {**{name: begun[name].astype(x.dtype) + x for name, x in moved.items()}, "bias": params.bias}
