"""Whether a loss is one: what a user's function must give, found out before a student is trained with it."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from l2t_jax.types import Array, Head, Loss, PyTree

EXAMPLES = 6
T = TypeVar("T")


class LossError(ValueError):
    """A loss that cannot be trained with; one line says why."""


def check_loss(loss: Loss, num_classes: int, name: str = "the loss") -> None:
    """Try a loss on random outputs: its values [B], their first and their second derivatives.

    Args:
      loss: the record.
      num_classes: C.
      name: what to call it.
    Raises:
      LossError: the loss fails, its values are not finite floats [B], it cannot be differentiated twice, a derivative
        is not finite, or that with respect to the outputs is zero everywhere, so that nothing can be learned.
    """
    key = jax.random.key(0)
    outputs = jax.random.normal(key, (EXAMPLES, num_classes))
    targets = jnp.arange(EXAMPLES) % num_classes
    params = _tried(f"{name}: init failed", lambda: loss.init(key))
    if not _finite(params):
        raise LossError(f"{name}: init gives parameters that are not finite.")

    def values_of(params: PyTree, outputs: Array) -> Array:
        return loss.apply(loss.at(params, jnp.float32(0)), as_read(loss, outputs), targets)

    def total(params: PyTree, outputs: Array) -> Array:
        return jnp.sum(values_of(params, outputs))

    found = _tried(f"{name}: apply failed", lambda: jax.eval_shape(values_of, params, outputs))
    if not (hasattr(found, "shape") and hasattr(found, "dtype")):
        raise LossError(f"{name}: apply gives a {type(found).__name__}, expected an array of losses [B].")
    if found.shape != (EXAMPLES,) or not jnp.issubdtype(found.dtype, jnp.floating):
        raise LossError(
            f"{name}: apply gives {found.dtype}{list(found.shape)} for {EXAMPLES} examples; "
            "expected one float for each, not reduced."
        )

    def derivatives(params: PyTree, outputs: Array) -> tuple[PyTree, PyTree]:
        first = jax.grad(total, argnums=(0, 1), allow_int=True)
        ones = jnp.ones_like(outputs)
        return jax.jvp(lambda outputs: first(params, outputs), (outputs,), (ones,))

    compute = jax.jit(lambda *a: (values_of(*a), *derivatives(*a)))
    values, first, second = _tried(f"{name}: it cannot be differentiated twice", lambda: compute(params, outputs))
    for what, tree in (("values", values), ("first derivatives", first), ("second derivatives", second)):
        if not _finite(tree):
            raise LossError(f"{name}: {what} are not finite for ordinary outputs.")
    if not jnp.any(first[1]):
        raise LossError(
            f"{name}: its derivative with respect to the outputs is zero everywhere: nothing would be learned."
        )


def as_read(loss: Loss, outputs: Array) -> Array | Head:
    """Outputs [B, C] in the form a loss reads: themselves, or as the features of a last layer that is the identity."""
    if loss.reads != "head":
        return outputs
    classes = outputs.shape[-1]
    return Head(outputs, jnp.eye(classes, dtype=outputs.dtype), jnp.zeros(classes, outputs.dtype))


def _tried(what: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise LossError(f"{what} ({type(error).__name__}: {line})".replace(": )", ")")) from error


def _finite(tree: PyTree) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in floats)
