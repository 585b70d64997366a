"""What a run ends with, in a form that needs no knowledge of the run: arrays by name, and what they are of.

`final/METHOD_seed_SEED.npz` holds the arrays of the student, the loss and the teacher under names like
`student/params/hidden/kernel`; `final/about.json` says how each is built.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from l2t_jax.losses import LOSSES, build_loss
from l2t_jax.losses.embeddings import READS
from l2t_jax.methods.parts import Parts, dlf_loss, dln_arguments
from l2t_jax.runs.records import load_arrays, save_arrays, write_json
from l2t_jax.runs.setting import Setting
from l2t_jax.types import Loss, MethodState, PyTree

# The loss of a method that is none of `LOSSES` by its own name; those that are not here have none by itself.
LOSS_OF = {"ala": "bilinear", "ml3": "ml3", "adalfl": "ml3", "taylor_glo": "taylor_glo"}


class Final(NamedTuple):
    """A student, a loss and a teacher as a run left them: their parameters."""

    student: dict[str, PyTree]  # {"params", "batch_stats"}
    loss: PyTree
    teacher: PyTree


def save(folder: Path, name: str, seed: int, state: MethodState) -> None:
    """Write the arrays of a seed of a method."""
    folder.mkdir(parents=True, exist_ok=True)
    final = Final(state.student.variables, state.loss, state.teacher)
    save_arrays(path_of(folder, name, seed), final._asdict())


def load(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The arrays of a seed of a method: {"student": {"params": ..., "batch_stats": ...}, "loss": ..., "teacher": ...}.

    What was a tuple or a named tuple is a dict by position or name.
    """
    whole: dict[str, Any] = {"student": {"params": {}, "batch_stats": {}}, "loss": {}, "teacher": {}}
    for path, array in load_arrays(path_of(folder, name, seed)).items():
        *places, leaf = path.split("/")
        tree = whole
        for place in places:
            tree = tree.setdefault(place, {})
        tree[leaf] = array
    return whole


def path_of(folder: Path, name: str, seed: int) -> Path:
    """Where the arrays of a seed of a method are."""
    return folder / f"{name}_seed_{seed}.npz"


def about(setting: Setting, names: list[str]) -> dict[str, Any]:
    """How what was saved is built: the student by name and knobs, the inputs it takes, the loss of each method."""
    config, info, parts = setting.config, setting.dataset.info, setting.parts
    shapes = [list(x.shape[1:]) for x in jax.tree.leaves(setting.inputs)]
    known = {name: list(getattr(info, name)) for name in ("mean", "std") if hasattr(info, name)}
    return {
        "task": config.task,
        "student": {"name": config.student, "knobs": config.student_knobs, "outputs": parts.task.outputs},
        "inputs": {"shape": shapes[0] if len(shapes) == 1 else shapes, **known},
        "classes": list(getattr(info, "names", ())) or list(range(parts.task.outputs)),
        "seeds": list(config.seeds),
        "losses": {name: loss_of(name, parts) for name in names},
    }


def loss_of(entry: str, parts: Parts) -> dict[str, Any] | None:
    """The loss that an entry trains its student with, by name and knobs of `build_loss`; None where it is none."""
    name = entry.removesuffix("_transfer")
    if name == "l2t_dln" or (name == "ala" and READS in dict(parts.task.views)):
        if isinstance(parts.loss, Loss):
            return None
        knobs = dln_arguments(parts.settings) if parts.loss == "dln" else {}
        return {"name": parts.loss, "knobs": knobs}
    if name in ("l2t_dlf", "bilinear"):
        name, knobs = dlf_loss(parts)
        return {"name": name, "knobs": knobs}
    if name in LOSSES:
        return {"name": name, "knobs": parts.knobs_of(name)}
    return {"name": LOSS_OF[name], "knobs": {}} if name in LOSS_OF else None


def build(described: dict[str, Any], classes: int) -> Loss:
    """The loss that `loss_of` described."""
    return build_loss(described["name"], classes, **described["knobs"])


def write(directory: Path, setting: Setting, states: dict[tuple[str, int], MethodState]) -> None:
    """Save the final states of a run's entries by (name, seed); those of a shorter run that are no longer, go."""
    folder = directory / "final"
    for path in set(folder.glob("*.npz")) - {path_of(folder, name, seed) for name, seed in states}:
        path.unlink()
    for (name, seed), state in states.items():
        save(folder, name, seed, state)
    if states:
        write_json(folder / "about.json", about(setting, sorted({name for name, _ in states})))


def read_about(folder: Path) -> dict[str, Any]:
    """What `about` said."""
    found: dict[str, Any] = json.loads((folder / "about.json").read_text())
    return found
