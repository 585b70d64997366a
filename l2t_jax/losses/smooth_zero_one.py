"""The smooth 0-1 loss, which becomes the count of mistakes in the course of a run."""

import jax
import jax.numpy as jnp

from l2t_jax.inputs import known
from l2t_jax.losses.common import check_classes, make_loss
from l2t_jax.types import Array, Key, Loss, PyTree, unscheduled

FORMS = ("both_sides", "wrong_only")
K_MIN, RATE, PARTS = 2.0, 10.0, 3  # K = 2, 20, 200


def smooth_zero_one(*, k: float | None = None, form: str = "both_sides") -> Loss:
    """Build sigmoid(K m), m = max_{j != y} p_j - p_y, p = softmax(z): the number of mistakes as K grows.

    Args:
      k: K > 0, fixed; None raises it from 2 over 20 to 200, each for a third of the run.
      form: "both_sides" is the above, which pulls at what is right too; "wrong_only" is
        2 sigmoid(K (max_j p_j - p_y)) - 1, which is 0 there and has no slope.
    Returns:
      a `Loss` with the parameter {"k": []}, which nothing learns; its losses [B] lie in (0, 1).
    Raises:
      ValueError: an unknown form, or K is not positive.
    Source: Nguyen and Sanner, ICML 2013, section 5, for two classes and K = 2, 20, 200, each until their search stops.
    No text at hand says how the L2T papers extend it to more classes: the margin of probabilities, and thirds of the
    run in place of their search, are ours. The second form is that of the L2T-DLF demo, which has K = 50.
    """
    known(f"smooth_zero_one form {form!r}", form, FORMS)
    if k is not None and not k > 0:
        raise ValueError(f"smooth_zero_one k={k!r} is not positive: give k > 0, or None to raise it in the run.")

    def init(key: Key) -> PyTree:
        return {"k": jnp.asarray(float(K_MIN if k is None else k))}

    def raised(params: PyTree, progress: Array) -> PyTree:
        part = jnp.clip(jnp.floor(PARTS * progress), 0, PARTS - 1)
        return {"k": params["k"] * (RATE**part).astype(params["k"].dtype)}

    def losses_of(params: PyTree, outputs: Array, targets: Array) -> Array:
        check_classes(outputs, targets)
        return smooth_mistake(outputs, targets, params["k"].astype(outputs.dtype), form)

    return make_loss(losses_of, init=init, at=raised if k is None else unscheduled, learned="no")


def smooth_mistake(outputs: Array, targets: Array, k: Array, form: str) -> Array:
    """The smoothed count of mistakes of either form: logits [B, C], classes [B], K [] -> [B]."""
    p = jax.nn.softmax(outputs)
    right = jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0]
    if form == "wrong_only":
        return 2 * jax.nn.sigmoid(k * (jnp.max(p, axis=-1) - right)) - 1
    is_right = jax.nn.one_hot(targets, outputs.shape[-1], dtype=bool)
    best_wrong = jnp.max(jnp.where(is_right, 0, p), axis=-1)
    return jax.nn.sigmoid(k * (best_wrong - right))
