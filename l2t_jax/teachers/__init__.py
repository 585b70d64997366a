"""Teachers by name. Every builder takes gamma, the step size of the loss parameters, as first argument."""

from collections.abc import Callable

import optax

from l2t_jax.teachers.coordinate_lstm import coordinate_lstm
from l2t_jax.teachers.from_optax import from_optax
from l2t_jax.teachers.sum_of import sum_of
from l2t_jax.types import Teacher

TEACHERS: dict[str, Callable[..., Teacher]] = {
    "lstm": coordinate_lstm,
    "adam": lambda dln_lr: from_optax(optax.adam(dln_lr)),
    "sgd": lambda dln_lr: from_optax(optax.sgd(dln_lr)),
    "rmsprop": lambda dln_lr: from_optax(optax.rmsprop(dln_lr)),
}

__all__ = ["TEACHERS", "from_optax", "sum_of"]
