"""What students make of some of the test set, in pictures or words: as it is, as they began, as they ended."""

from pathlib import Path

import jax
import numpy as np

from l2t_jax.data import at
from l2t_jax.runs.image_panels import panels
from l2t_jax.runs.setting import Entry, Setting
from l2t_jax.tasks import TASKS, Panel
from l2t_jax.tasks.reading import whole
from l2t_jax.types import MethodState, PyTree, Student

EXAMPLES = 4  # spread over the test set, whatever they are


def draw(path: Path, setting: Setting, entries: list[Entry], begun: MethodState, ended: dict[str, MethodState]) -> None:
    """Draw some images of the test set, a row each: the truth, the beginning, the end of each entry.

    Args:
      path: the picture.
      setting, entries: of the run.
      begun: the state at round 0 of one seed.
      ended: the last state of that seed by the entry's name, of those that finished.
    """
    spec = TASKS[setting.config.task]
    if spec.illustrate is None or not ended:
        return
    task, test, info = setting.parts.task, setting.dataset.test, setting.dataset.info
    which = _spread(test)
    block = task.read(at(test, which), np.arange(len(which)), None) if task.read else at(test, which)
    student = scored(setting.parts.student)
    columns: dict[str, list[Panel]] = {"truth": spec.illustrate(info, task, student, None, block)}
    seen = {"before": begun, **{entry.name: ended[entry.name] for entry in entries if entry.name in ended}}
    for name, state in seen.items():
        columns[name] = spec.illustrate(info, task, student, state.student.variables, block)
    names = getattr(info, "names", ())
    panels(path, columns, names=names, title=f"{setting.config.dataset}, {setting.config.student}")


def in_words(path: Path, setting: Setting, begun: MethodState, ended: dict[str, MethodState]) -> list[str]:
    """Write what students make of some test examples in words: what they are, the beginning, the end of each entry.

    Args:
      path: the text.
      setting, begun, ended: as of `draw`.
    Returns:
      the lines; none where the task has no words.
    """
    spec = TASKS[setting.config.task]
    if spec.in_words is None or not ended:
        return []
    task, test, info = setting.parts.task, setting.dataset.test, setting.dataset.info
    block, student = at(test, _spread(test)), scored(setting.parts.student)
    told = spec.in_words(info, task, student, None, block)
    for name, state in {"before": begun, **ended}.items():
        told[name] = spec.in_words(info, task, student, state.student.variables, block)[""]
    width = max(map(len, told))
    lines = []
    for i in range(len(next(iter(told.values())))):
        lines += [*(f"{name:>{width}}: {of[i]}" for name, of in told.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return lines


def _spread(test: PyTree) -> np.ndarray:
    n = len(jax.tree.leaves(test)[0])
    return np.linspace(0, n - 1, min(EXAMPLES, n)).round().astype(int)


def scored(student: Student) -> Student:
    """The student that takes inputs as they are, its backbone with it."""
    variables: PyTree = None if student.backbone is None else student.backbone.variables
    return student if variables is None else whole(student, jax.device_put(variables))
