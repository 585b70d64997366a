"""Methods by name: one paper's algorithm, one file each."""

from collections.abc import Callable

from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.types import Method

METHODS: dict[str, Callable[..., Method]] = {"l2t_dln": l2t_dln, "fixed_loss": fixed_loss}
