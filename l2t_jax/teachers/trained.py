"""Trained teachers that come with the package: each an array file and a card in `l2t_jax/assets`."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.types import Array, Key, PyTree, Teacher

ASSETS = resources.files("l2t_jax") / "assets"


def shipped() -> tuple[str, ...]:
    """The names that `load` and `card` know."""
    return tuple(sorted(file.name.removesuffix(".json") for file in ASSETS.iterdir() if file.name.endswith(".json")))


def card(name: str) -> dict[str, Any]:
    """What a trained teacher is, where and how it was trained, and how well it taught there.

    Args:
      name: one of `shipped()`, or a file, NAME.npz, with its card, NAME.json, beside it.
    Returns:
      "teacher" and "dln": arguments of `build_teacher` and of `losses.dln.dln`; "student": what it taught; "trained_on"
      and "command", "commit", "seed", "scores": where it is from; "sha256" of the arrays.
    Raises:
      ValueError: there is none of this name, or the file has no card.
    """
    if name.endswith(".npz"):
        return _card_of_file(Path(name))
    if name not in shipped():
        known = ", ".join(shipped())
        raise ValueError(
            f"There is no teacher {name!r}; " + (f"choose one of {known}." if known else "none is shipped yet.")
        )
    found: dict[str, Any] = json.loads((ASSETS / f"{name}.json").read_text())
    return found


def _card_of_file(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not (path.is_file() and beside.is_file()):
        raise ValueError(f"There is no teacher {path} with its card {beside}: experiments.many_lives makes both.")
    try:
        found: dict[str, Any] = json.loads(beside.read_text())
        _ = found["teacher"], found["dln"], found["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} is no card of a teacher ({type(error).__name__}: {error}).") from error
    return found


def load_with(name: str, build: Callable[..., Teacher]) -> Teacher:
    """Load a trained teacher; see `teachers.load`, which knows what builds it."""
    about = card(name)
    content = (Path(name) if name.endswith(".npz") else ASSETS / f"{name}.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(f"The arrays of teacher {name!r} are damaged: install the package, or make them, again.")
    teacher = build(**about["teacher"])
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        params = fill(jax.eval_shape(teacher.init, jax.random.key(0)), arrays)

    def init(key: Key) -> PyTree:
        return params

    return teacher._replace(init=init)


def fill(template: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """A tree of a template's form out of named arrays.

    Args:
      template: a tree of arrays or of their shapes.
      arrays: an array for each of its leaves, under the leaf's path joined by "/".
    Raises:
      ValueError: an array is missing or has another shape.
    """
    places = jax.tree_util.tree_leaves_with_path(template)
    leaves: list[Array] = []
    for where, leaf in places:
        name = jax.tree_util.keystr(where, simple=True, separator="/")
        array = np.asarray(arrays[name]) if name in arrays else None
        if array is None or array.shape != leaf.shape:
            found = "absent" if array is None else list(array.shape)
            raise ValueError(f"{name} is {found}, expected {list(leaf.shape)}")
        leaves.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
