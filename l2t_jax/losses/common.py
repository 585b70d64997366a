"""What every loss shares: turning a pure function into a `Loss`, sample weights and masks, and its door.

Legend: B batch, C classes.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.inputs import is_known
from l2t_jax.types import Array, Head, Key, Loss, PyTree, unscheduled


def no_parameters(key: Key) -> PyTree:
    """Return the parameters of a loss that has none."""
    return {}


def make_loss(
    losses_of: Callable[[PyTree, Any, Array], Array],
    init: Callable[[Key], PyTree] = no_parameters,
    at: Callable[[PyTree, Array], PyTree] = unscheduled,
    **fields: Any,
) -> Loss:
    """Make a `Loss` of a pure function of its parameters: sample weights and masks are added.

    Args:
      losses_of: (params, outputs [B, C] or a `Head`, targets [B, ...]) -> losses [B]. One that reads its targets as
        class indices calls `check_classes` first.
      init, at, **fields: as in `Loss`.
    Returns:
      a `Loss`; its apply raises a ValueError where a mask is no bool [B] or sample weights are not [B].
    """

    def apply(
        params: PyTree,
        outputs: Array | Head,
        targets: Array,
        *,
        sample_weight: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        check_weights(outputs, sample_weight, mask)
        return weigh(losses_of(params, *hide(outputs, targets, mask)), sample_weight, mask)

    return Loss(init, apply, at, **fields)


def fixed(function: Callable[..., Array], **fields: Any) -> Callable[..., Loss]:
    """Make a builder of a `Loss` without parameters from a pure function (outputs [B, C], targets [B]) -> [B].

    The function's keyword-only knobs become the builder's keywords: `fixed(focal)(gamma=2.0)`. The builder raises a
    ValueError where it is given a knob that the function has not. `fields` are of the `Loss`, e.g. the view it reads.
    """

    def build(**knobs: Any) -> Loss:
        try:
            inspect.signature(function).bind(None, None, **knobs)
        except TypeError as error:  # now, and not where a student is trained with it
            name = getattr(function, "__name__", "this loss")
            raise ValueError(f"{name} cannot be built with {knobs}: {error}. See its keyword arguments.") from error
        unweighted = partial(function, **knobs)
        return make_loss(lambda params, outputs, targets: unweighted(outputs, targets), learned="no", **fields)

    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    build.__doc__, build.__signature__ = function.__doc__, inspect.Signature(keywords)  # type: ignore[attr-defined]
    return build


def hide(outputs: Array | Head, targets: Array, mask: Array | None) -> tuple[Any, Array]:
    """Replace masked examples by zeros *before* the loss, so that a NaN in one cannot reach any derivative."""
    if mask is None:
        return outputs, targets
    if isinstance(outputs, Head):
        return outputs._replace(features=_shown(mask, outputs.features)), _shown(mask, targets)
    return _shown(mask, outputs), _shown(mask, targets)


def weigh(losses: Array, sample_weight: Array | None, mask: Array | None) -> Array:
    """Multiply losses [B] by weights [B] and set masked ones (mask [B] false) to zero; still unreduced, [B]."""
    if sample_weight is not None:
        losses = losses * sample_weight
    return losses if mask is None else jnp.where(mask, losses, 0)


def check_weights(outputs: Array | Head, sample_weight: Array | None, mask: Array | None) -> None:
    """Check that a mask and sample weights have one entry for each example: others would be broadcast without a word.

    Raises:
      ValueError: the mask is no bool [B], or the weights are not [B].
    """
    batch = jnp.shape(outputs.features if isinstance(outputs, Head) else outputs)[:1]
    for what, given in (("sample_weight", sample_weight), ("mask", mask)):
        if given is not None and getattr(given, "shape", None) != batch:
            raise ValueError(
                f"{what} is {_told(given)} for outputs {_told(outputs)}: expected an array {list(batch)}, an entry for "
                "each example."
            )
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask is {_told(mask)}: expected bool, True for what counts; weights go to sample_weight.")


def check_number_of_classes(name: str, num_classes: int, outputs: Array, targets: Array) -> None:
    """As `check_classes`, of a loss with parameters for each of so many classes.

    Raises:
      ValueError: as there, or outputs have another number of classes than this loss was built for.
    """
    check_classes(outputs, targets)
    if (classes := outputs.shape[-1]) != num_classes:
        raise ValueError(
            f"{name} was built for {num_classes} classes and is given outputs of {classes}: build it with "
            f"num_classes={classes}."
        )


def check_classes(outputs: Array | Head, targets: Array) -> None:
    """Check that outputs are logits [B, C] and targets the indices [B] of their classes.

    Where values are known, not traced, so are the classes: -1 would be read as the last class without a word, and what
    is not below C gives NaN or, from some losses, a finite number.

    Raises:
      ValueError: they are not; the line says what was given and what to do.
    """
    logits: Any = outputs
    if isinstance(outputs, Head):
        features, kernel = outputs.features, outputs.kernel
        logits = jax.ShapeDtypeStruct((*features.shape[:-1], kernel.shape[-1]), features.dtype)
    for what, given in (("outputs", logits), ("targets", targets)):
        if not (hasattr(given, "shape") and hasattr(given, "dtype")):
            raise ValueError(f"{what} are a {type(given).__name__}: expected an array, logits [B, C] and classes [B].")
    if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"outputs are {_told(logits)}: a loss of classes reads floats [B, C], a logit for each of two or more "
            "classes. One logit z for two classes becomes two, jnp.stack([0 * z, z], -1)."
        )
    *batch, classes = logits.shape
    expected = f"a loss of classes expects integers {batch}, a class index for each row of outputs {_told(logits)}"
    if targets.shape == logits.shape:
        raise ValueError(
            f"targets are {_told(targets)}: {expected}. One-hot targets become it by targets.argmax(-1); for targets "
            "of several labels make a loss of your own (make_loss)."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets are {_told(targets)}: {expected}. Whole numbers become it by astype(int32); for regression make "
            "a loss of your own (make_loss)."
        )
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets are {_told(targets)}: {expected}. Reshape one of the two.")
    if targets.size and is_known(targets) and getattr(targets, "is_fully_addressable", True):
        values = np.asarray(targets)  # by NumPy, which computes now, also in the middle of a trace
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"targets have the class {low if low < 0 else high}: expected 0 to {classes - 1}, as outputs are "
                f"{_told(logits)}. Correct the labels, hide examples without one by mask, or give the student more "
                "outputs."
            )


def _shown(mask: Array, x: Array) -> Array:
    return jnp.where(jnp.reshape(mask, (*mask.shape, *(1,) * (jnp.ndim(x) - mask.ndim))), x, 0)


def _told(x: Any) -> str:
    if isinstance(x, Head):
        x = x.features
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
