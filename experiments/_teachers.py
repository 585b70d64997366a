"""Trained teachers as files: what an online run leaves in teachers/, and what --teacher_from takes over."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments._config import UsageError
from l2t_jax.records import load_arrays, save_arrays
from l2t_jax.types import PyTree


def save(workdir: Path, method: str, seed: int, teacher: PyTree) -> None:
    """Write a trained teacher; one without parameters leaves nothing."""
    if jax.tree.leaves(teacher):
        path = _path(workdir, method, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, teacher)


def load(workdir: str, method: str, seed: int, template: PyTree) -> PyTree:
    """Read what `save` wrote, in the form of a template of the same names and shapes.

    Raises:
      UsageError: there is none for this method and seed, it cannot be read, or it does not fit.
    """
    path = _path(Path(workdir), method, seed)
    try:
        arrays = load_arrays(path)
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.npz"))) or "none"
        raise UsageError(f"--teacher_from={workdir} has no {path.stem}.npz in teachers/ (there: {there}).") from None
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): train the teacher again.") from error
    places = jax.tree_util.tree_leaves_with_path(template)
    names = [jax.tree_util.keystr(where, simple=True, separator="/") for where, _ in places]
    for name, (_, leaf) in zip(names, places, strict=True):
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = list(arrays[name].shape) if name in arrays else "absent"
            raise UsageError(
                f"{path} does not fit this {method}: {name} is {found}, expected {list(leaf.shape)}. A teacher of "
                "l2t_dlf serves one number of classes; those of l2t_dln and ala serve any."
            )
    return jax.tree.unflatten(jax.tree.structure(template), [jnp.asarray(arrays[name]) for name in names])


def digest(workdir: str, method: str, seed: int) -> str:
    """The hash of a teacher's file, for the record."""
    return hashlib.sha256(_path(Path(workdir), method, seed).read_bytes()).hexdigest()


def _path(workdir: Path, method: str, seed: int) -> Path:
    return workdir / "teachers" / f"{method}_seed_{seed}.npz"
