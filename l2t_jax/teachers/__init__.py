"""Teachers by name. Every builder takes gamma, the step size of the loss parameters, as first argument."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import optax

from l2t_jax.inputs import known
from l2t_jax.teachers.coordinate_lstm import coordinate_lstm
from l2t_jax.teachers.from_optax import from_optax
from l2t_jax.teachers.sum_of import sum_of
from l2t_jax.teachers.trained import card, load_with, shipped
from l2t_jax.types import Teacher

TEACHERS: dict[str, Callable[..., Teacher]] = {
    "lstm": coordinate_lstm,
    "adam": lambda dln_lr: from_optax(optax.adam(dln_lr)),
    "sgd": lambda dln_lr: from_optax(optax.sgd(dln_lr)),
    "rmsprop": lambda dln_lr: from_optax(optax.rmsprop(dln_lr)),
}


def build_teacher(name: str, dln_lr: float, *, base: str = "none", **knobs: Any) -> Teacher:
    """Build a teacher of the DLN.

    Args:
      name: a key of `TEACHERS`.
      dln_lr: gamma, for the teacher and for its base.
      base: an optax teacher that the LSTM corrects: the sum of both is the update; "none" for the LSTM alone.
      **knobs: of `coordinate_lstm`; an optax teacher has none.
    Raises:
      ValueError: an unknown name or base, a knob that this teacher has not, or a value that is out of range.
    """
    for what, value in (("teacher", name), ("base", base)):
        known(f"{what} {value!r}", value, TEACHERS if what == "teacher" else ("none", *TEACHERS))
    if isinstance(dln_lr, (int, float)) and not 0 <= dln_lr < math.inf:
        raise ValueError(f"dln_lr={dln_lr} is not a finite number of at least 0: give gamma.")
    try:
        inspect.signature(TEACHERS[name]).bind(dln_lr, **knobs)
    except TypeError as error:
        raise ValueError(f"teacher {name!r} with {knobs}: {error}. See the arguments of its builder.") from error
    teacher = TEACHERS[name](dln_lr, **knobs)
    return teacher if base == "none" else sum_of(TEACHERS[base](dln_lr), teacher)


def load(name: str) -> Teacher:
    """Load a trained teacher that comes with the package.

    Args:
      name: one of `shipped()`; `card(name)` tells what it is and with which DLN it was trained.
    Returns:
      a `Teacher` whose `init` gives the trained parameters, whatever the key. It is coordinate-wise, so it teaches DLNs
      of any size, for any data, student and number of classes: give it to `l2t_dln` with `learn=False`.
    Raises:
      ValueError: there is none of this name, or its file is damaged.
    """
    return load_with(name, build_teacher)


__all__ = ["TEACHERS", "build_teacher", "card", "from_optax", "load", "shipped", "sum_of"]
