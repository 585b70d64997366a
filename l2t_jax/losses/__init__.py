"""Training losses by name. A new loss is one pure function in one file and one line here."""

from collections.abc import Callable

from l2t_jax.losses.checking import LossError, check_loss
from l2t_jax.losses.common import fixed
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.losses.dln import dln
from l2t_jax.losses.generalized_cross_entropy import generalized_cross_entropy
from l2t_jax.losses.label_smoothing import label_smoothing
from l2t_jax.types import Loss

LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": fixed(cross_entropy),
    "label_smoothing": fixed(label_smoothing),
    "generalized_cross_entropy": fixed(generalized_cross_entropy),
    "dln": dln,
}


def fixed_losses() -> list[str]:
    """Names of the losses that need no teacher: those a student can be trained with as they are."""
    return [name for name, build in LOSSES.items() if build().learned != "teacher"]


__all__ = ["LOSSES", "LossError", "check_loss", "fixed", "fixed_losses"]
