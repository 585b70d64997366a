"""Whether a loss is one: what a user's function must give, found out before a student is trained with it."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.inputs import as_arrays
from l2t_jax.types import Array, Head, Loss, PyTree

KINDS = {"ordinary outputs": 1.0, "confident outputs": 30.0, "outputs that are all equal": 0.0}  # and their scale
EACH = 4  # examples of each kind
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
      LossError: the loss fails, its values are not finite floats [B], one of them depends on another example, it cannot
        be differentiated twice, a derivative is not finite, or that with respect to the outputs is zero everywhere, so
        that nothing can be learned. Outputs are ordinary, confident and all equal.
    """
    if not isinstance(loss, Loss):
        raise LossError(f"{name}: it is a {type(loss).__name__}, expected a Loss: make one by fixed(function)().")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise LossError(f"{name}: num_classes={num_classes!r} is not an integer of at least 2: give C.")
    each = EACH + (num_classes == EACH * len(KINDS))  # B is not C, so no axis is mistaken for the other
    kinds = np.repeat([*KINDS], each)
    random = np.random.default_rng(0)
    outputs, way = random.normal(size=(2, len(kinds), num_classes)).astype(np.float32)
    outputs = np.array([KINDS[kind] for kind in kinds], np.float32)[:, None] * outputs
    targets = np.arange(len(kinds), dtype=np.int32) % num_classes
    for i in np.flatnonzero(kinds == "confident outputs"):  # every second one is right, the others are hopelessly wrong
        outputs[i, targets[i]] = outputs[i].max() + 30 if i % 2 else outputs[i].min() - 60
    params = _tried(f"{name}: init failed", lambda: as_arrays(loss.init(jax.random.key(0)), "what it gives"))
    if not _finite(params):
        raise LossError(f"{name}: init gives parameters that are not finite.")

    def values_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        return loss.apply(loss.at(params, jnp.float32(0)), as_read(loss, outputs), targets)

    found = _tried(f"{name}: apply failed", lambda: jax.eval_shape(values_of, params, outputs, targets))
    if not (hasattr(found, "shape") and hasattr(found, "dtype")):
        raise LossError(f"{name}: apply gives a {type(found).__name__}, expected an array of losses [B].")
    if found.shape != kinds.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise LossError(
            f"{name}: apply gives {found.dtype}{list(found.shape)} for {len(kinds)} examples; "
            "expected one float for each, not reduced."
        )

    @jax.jit
    def compute(params: PyTree, outputs: Array, targets: Array) -> tuple[Array, PyTree, PyTree]:
        def total(params: PyTree, outputs: Array, weights: Array) -> tuple[Array, Array]:
            values = values_of(params, outputs, targets)
            return jnp.sum(weights * values), values

        def first_of(outputs: Array, weights: Array) -> tuple[PyTree, Array]:
            return jax.grad(total, argnums=(0, 1), has_aux=True, allow_int=True)(params, outputs, weights)

        # Weights move too: what the derivative does with a factor from outside must have a derivative as well.
        ones = jnp.ones(len(kinds), found.dtype)
        first, second, values = jax.jvp(first_of, (outputs, ones), (way, ones), has_aux=True)
        return values, first, second

    values, first, second = _tried(
        f"{name}: it cannot be differentiated twice", lambda: jax.device_get(compute(params, outputs, targets))
    )
    for what, by_example, tree in (
        ("values", values, values),
        ("first derivatives", first[1], first),
        ("second derivatives", second[1], second),
    ):
        if not _finite(tree):
            whole = np.isfinite(np.asarray(by_example).reshape(len(kinds), -1)).all(axis=1)
            raise LossError(f"{name}: {what} are not finite for {(*kinds[~whole], 'its parameters')[0]}.")
    kept = kinds == kinds[0]  # of all others outputs and targets become something else: nothing is compiled for it
    changed, *_ = jax.device_get(
        compute(params, np.where(kept[:, None], outputs, 1 - outputs / 2), np.where(kept, targets, 0))
    )
    if not np.allclose(values[kept], changed[kept], rtol=1e-3, atol=1e-5):
        raise LossError(
            f"{name}: the value of an example changes with the others of its batch: expected that of each by itself."
        )
    if not np.any(first[1]):
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
