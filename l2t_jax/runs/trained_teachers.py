"""Trained teachers as files: what an online run leaves in teachers/, and what --teacher_from takes over."""

import hashlib
from pathlib import Path
from typing import Any

import jax

from l2t_jax import teachers
from l2t_jax.methods.parts import dln_arguments, teacher_arguments
from l2t_jax.presets import Preset
from l2t_jax.runs.config import Config, UsageError
from l2t_jax.runs.records import load_arrays, save_arrays
from l2t_jax.teachers.trained import fill
from l2t_jax.types import PyTree

SHIPPED = "shipped:"  # before the name of a teacher that comes with the package


def save(workdir: Path, method: str, seed: int, teacher: PyTree) -> None:
    """Write a trained teacher; one without parameters leaves nothing."""
    if jax.tree.leaves(teacher):
        path = path_of(workdir, method, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, teacher)


def of_no_run(source: str) -> bool:
    """Whether a source is one teacher for all seeds: a shipped one, or a file with a card."""
    return source.startswith(SHIPPED) or source.endswith(".npz")


def load(source: str, method: str, seed: int, template: PyTree) -> PyTree:
    """Read what `save` wrote, or a teacher of no run, in the form of a template of the same names and shapes.

    Raises:
      UsageError: there is none for this method and seed, it cannot be read, or it does not fit.
    """
    if of_no_run(source):
        try:
            return teachers.load(source.removeprefix(SHIPPED)).init(jax.random.key(0))
        except ValueError as error:
            raise UsageError(f"--teacher_from={source}: {error}") from error
    path = path_of(Path(source), method, seed)
    try:
        arrays = load_arrays(path)
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.npz"))) or "none"
        raise UsageError(f"--teacher_from={source} has no {path.stem}.npz in teachers/ (there: {there}).") from None
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): train the teacher again.") from error
    try:
        return fill(template, arrays)
    except ValueError as error:
        raise UsageError(
            f"{path} does not fit this {method}: {error}. A teacher of l2t_dlf serves one number of classes; those of "
            "l2t_dln and ala serve any."
        ) from error


def check(source: str, config: Config) -> None:
    """Refuse a teacher of no run that is not there, is of another method, or was trained with other settings.

    Raises:
      UsageError: one of these, and what to do.
    """
    if not of_no_run(source):
        return
    try:
        about = teachers.card(source.removeprefix(SHIPPED))
    except ValueError as error:
        raise UsageError(f"--teacher_from={source}: {error}") from error
    if others := set(config.methods) & {"l2t_dlf", "ala"}:
        raise UsageError(f"--teacher_from={source} is of l2t_dln: leave {', '.join(sorted(others))} out of --method.")
    if config.teacher != about["teacher"]["name"]:
        raise UsageError(f"--teacher_from={source} is an {about['teacher']['name']}: leave --teacher out.")
    different: dict[str, Any] = {}
    for asked, known in (
        (teacher_arguments(config.teacher, config.settings), about["teacher"]),
        (dln_arguments(config.settings), about["dln"]),
    ):
        names = dict.fromkeys([*known, "units"])  # which stand there only where they are not the paper's
        different |= {name: known.get(name) for name in names if asked.get(name) != known.get(name)}
    if different:
        if "units" in different:
            different["units"] = "-".join(map(str, different["units"] or [])) or Preset.units
        rows = {"form": "dln_form"}
        told = ",".join(f"{rows.get(name, name)}={str(value).lower()}" for name, value in different.items())
        raise UsageError(f"--teacher_from={source} was trained with other settings: add --set={told}.")


def digest(source: str, method: str, seed: int) -> str:
    """The hash of a teacher's file, for the record; empty where there is none."""
    if of_no_run(source):
        sha: str = teachers.card(source.removeprefix(SHIPPED))["sha256"]
        return sha
    path = path_of(Path(source), method, seed)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def path_of(workdir: Path, method: str, seed: int) -> Path:
    """Where a run keeps the teacher that a seed of a method has trained."""
    return workdir / "teachers" / f"{method}_seed_{seed}.npz"
