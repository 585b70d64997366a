"""Methods by name: one paper's algorithm, one file each."""

from collections.abc import Callable

from l2t_jax.methods.ala import ala
from l2t_jax.methods.fixed_loss import fixed_loss
from l2t_jax.methods.l2rw import l2rw
from l2t_jax.methods.l2t_dlf import l2t_dlf
from l2t_jax.methods.l2t_dln import l2t_dln
from l2t_jax.methods.mentornet import mentornet
from l2t_jax.methods.meta_weight_net import meta_weight_net
from l2t_jax.methods.slf import slf
from l2t_jax.types import Method

METHODS: dict[str, Callable[..., Method]] = {
    "l2t_dln": l2t_dln,
    "l2t_dlf": l2t_dlf,
    "ala": ala,
    "slf": slf,
    "meta_weight_net": meta_weight_net,
    "l2rw": l2rw,
    "mentornet": mentornet,
    "fixed_loss": fixed_loss,
}
