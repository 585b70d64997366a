"""Students that see a batch in parts, one after the other, so that a step needs the memory of one part.

Legend: B examples of a batch, b of a part (a micro-batch), m = B / b parts.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l2t_jax.students.layers import require_positive
from l2t_jax.types import Array, Backbone, Head, Key, PyTree, Student

logger = logging.getLogger(__name__)


def in_micro_batches(student: Student, size: int) -> Student:
    r"""Compute a student on b examples at a time; what is in it is computed again on the way back.

        apply'(\theta, x) = [apply(\theta, x_1), ..., apply(\theta, x_m)]

    Outputs are those of the whole batch, and so losses that weigh or compare its examples, errors, hypergradients and
    teachers' gradients are exact. The price is one more forward pass in each gradient.

    BatchNorm alone sees what it is given: it normalises b examples by their own statistics, which is another student
    than that of whole batches. All parts begin with the running statistics of before the batch, and the mean of what
    they make of them is kept, so their order does not matter.

    Args:
      student: any that treats examples apart, but for BatchNorm.
      size: b. Batches of up to b examples are left whole.

    Returns:
      A student with the same variables, inputs and outputs. How it writes sequences (`stepwise`) is left as it is.

    Raises:
      ValueError: size is below 1; when called in training, b does not divide B. Elsewhere the last part is filled up.
    """
    require_positive(size=size)
    told = set()

    def parts(call: Callable[..., Any], arguments: PyTree) -> Any:
        """What a function of leaves [b, ...] gives for leaves [B, ...], stacked: [m, b, ...] of each example."""
        split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arguments)
        # In a scan nothing can be merged across iterations, so the barriers that would prevent it are in the way.
        return jax.lax.map(jax.checkpoint(lambda part: call(*part), prevent_cse=False), split)

    def wrapped(call: Callable[..., tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
        def apply(variables: dict[str, PyTree], inputs: PyTree, train: bool, *keys: Key | None) -> tuple[Any, PyTree]:
            examples = jax.tree.leaves(inputs)[0].shape[0]
            if examples <= size:
                return call(variables, inputs, train, *keys)
            if train and examples % size:
                raise ValueError(
                    f"a batch of {examples} examples cannot be divided into micro-batches of {size}: choose a multiple "
                    f"of {size}, or micro-batches of another size."
                )
            filled = jax.tree.map(lambda x: _filled(x, -examples % size), inputs)
            if train and jax.tree.leaves(variables["batch_stats"]) and examples not in told:
                told.add(examples)
                logger.warning("BatchNorm sees %d examples at a time in place of %d", size, examples)
            # Keys may be None, which has no leaves.
            outputs, stats = parts(lambda x, keys: call(variables, x, train, *keys), (filled, keys))
            kept = jax.tree.map(_together, stats) if train else variables["batch_stats"]
            return _joined(outputs, examples), kept

        return apply

    backbone = student.backbone
    if backbone is not None:
        own = backbone.apply

        def features(variables: PyTree, inputs: PyTree) -> PyTree:
            examples = jax.tree.leaves(inputs)[0].shape[0]
            filled = jax.tree.map(lambda x: _filled(x, -examples % size), inputs)
            return _joined(parts(lambda x: own(variables, x), (filled,)), examples)

        backbone = Backbone(backbone.variables, features)
    head = None if student.head is None else wrapped(student.head)
    return student._replace(apply=wrapped(student.apply), head=head, backbone=backbone)


def _filled(x: Array, missing: int) -> Array:
    return x if missing == 0 else jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])


def _joined(outputs: Any, examples: int) -> Any:
    """Outputs of all examples [B, ...] from those of parts [m, b, ...]."""
    joined = lambda x: x.reshape(-1, *x.shape[2:])[:examples]  # noqa: E731
    if isinstance(outputs, Head):  # a part's kernel and bias are the student's
        return Head(jax.tree.map(joined, outputs.features), outputs.kernel[0], outputs.bias[0])
    return jax.tree.map(joined, outputs)


def _together(stats: Array) -> Array:
    """The mean over parts [m, ...]; of what is no float, a count say, the first, for all began alike."""
    return jnp.mean(stats, axis=0) if jnp.issubdtype(stats.dtype, jnp.inexact) else stats[0]
