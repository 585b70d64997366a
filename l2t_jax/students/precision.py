"""Students that compute in half precision, with all that is kept between steps in full.

Legend: B batch, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from l2t_jax.students.layers import as_before
from l2t_jax.types import Array, Key, PyTree, Student

COMPUTE_DTYPES = ("float32", "bfloat16")


def in_bfloat16(student: Student) -> Student:
    r"""Compute a student in bfloat16: eight significant bits, and half the bytes on devices that have it.

        apply'(\theta, x) = float32(apply(bfloat16(\theta), bfloat16(x)))

    Parameters, their updates, BatchNorm's statistics and the outputs, so losses, errors, the hypergradient and the
    teacher, stay in the precision they have. What is rounded is each layer's input and output, and what differentiation
    makes of them: the hypergradient is that of the rounded student, up to rounding, and is not that of the student.

    Args:
      student: any, whose layers take the dtype of their inputs and parameters, as flax.linen's do.

    Returns:
      A student with the same variables, inputs and outputs. What comes before it (`backbone`) and how it writes
      sequences (`stepwise`) is left as it is.

    Source: Kalamkar et al. 2019 for the format; weights are kept in full as by Micikevicius et al. 2018. No loss is
    scaled: bfloat16 has the range of float32.
    """

    def rounded(variables: dict[str, PyTree], inputs: PyTree) -> tuple[dict[str, PyTree], PyTree]:
        return {**variables, "params": _floats_as(variables["params"], jnp.bfloat16)}, _floats_as(inputs, jnp.bfloat16)

    def wrapped(call: Callable[..., tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
        def apply(variables: dict[str, PyTree], inputs: Array, train: bool, *keys: Key | None) -> tuple[PyTree, PyTree]:
            outputs, stats = call(*rounded(variables, inputs), train, *keys)
            dtype = jax.tree.leaves(variables["params"])[0].dtype
            return _floats_as(outputs, dtype), as_before(stats, variables["batch_stats"])

        return apply

    return student._replace(apply=wrapped(student.apply), head=None if student.head is None else wrapped(student.head))


def _floats_as(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """The floats of a tree in another dtype; ids and keys as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
