"""What a run has learned about each of its training examples: which label its students would give it, how it pulls.

Legend: n training examples outside a meta set, G seeds, C classes.
"""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2t_jax.data import Dataset
from l2t_jax.runs.observing import TOGETHER, alone, validation_examples
from l2t_jax.runs.setting import Entry, Setting
from l2t_jax.tasks.reading import batch_at
from l2t_jax.types import Array, Batch, MethodState, PyTree

TINY = 1e-6  # below which a pull is none


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A row for each training example, means over the seeds that finished. Suspicious ones have the least `trust`."""

    index: np.ndarray  # [n] where it stands in the set as it was loaded
    given: np.ndarray  # [n] its label
    predicted: np.ndarray  # [n] the label that the students give it
    confidence: np.ndarray  # [n] the probability of that
    trust: np.ndarray  # [n] the probability that the students give to its label
    pull: (
        np.ndarray | None
    )  # [n] how strongly it pulls at the student, 1 on average; None where the method does not say
    # [n] its pull over that under cross entropy, the same student's: how much of it the loss lets through
    weight: np.ndarray | None
    true: np.ndarray | None = None  # [n] its right label, where that is known

    def suspicious(self, share: float) -> np.ndarray:
        """The rows of so large a share of the examples that are trusted least, the least first."""
        return np.argsort(self.trust, kind="stable")[: max(1, round(share * len(self.trust)))]


def describe(setting: Setting, entry: Entry, states: list[MethodState]) -> Examples:
    """Ask the students of all seeds of an entry about the training examples.

    Args:
      setting, entry: of the run, which classifies its examples.
      states: of the seeds that finished.
    """
    dataset, task, student = setting.dataset, setting.parts.task, setting.parts.student
    kept = dataset.examples - dataset.meta
    data = dataset.train if task.read else jax.device_put(dataset.train)
    pulls = _pulls(setting, entry, data, kept)

    @jax.jit
    def probabilities(variables: dict[str, PyTree], batch: Batch) -> Array:
        return jax.nn.softmax(student.apply(variables, batch.inputs, False)[0])

    given = dataset.train["labels"][:kept]
    whole, pull, weight = np.zeros((kept, setting.parts.classes)), np.zeros(kept), np.zeros(kept)
    for state in states:
        chances = np.zeros_like(whole)
        for which in _batches(kept, min(task.scored_at_once, kept)):
            chances[which] = np.asarray(probabilities(state.student.variables, batch_at(task, data, which)))
        whole += chances / len(states)
        if pulls is not None:
            one, slope = pulls(state), chances - np.eye(setting.parts.classes)[given]
            pull += one / max(one.mean(), TINY) / len(states)
            weight += one / np.maximum(np.linalg.norm(slope, axis=1), TINY) / len(states)
    true = dataset.train.get("true")
    assert dataset.index is not None
    return Examples(
        index=dataset.index[:kept],
        given=given,
        predicted=whole.argmax(1).astype(np.int32),
        confidence=whole.max(1),
        trust=whole[np.arange(kept), given],
        pull=None if pulls is None else pull,
        weight=None if pulls is None else weight,
        true=None if true is None else true[:kept],
    )


def _pulls(setting: Setting, entry: Entry, data: PyTree, kept: int) -> Callable[[MethodState], np.ndarray] | None:
    """A state's pull of each example [n], in batches, since a method may weigh an example by its batch."""
    method, task = entry.method, setting.parts.task
    if method.pull is None:
        return None
    validation = batch_at(task, data, validation_examples(setting))

    def pull(state: MethodState, batch: Batch, validation: Batch) -> Array:
        return method.pull(state, batch, validation)  # type: ignore[misc]

    compute = jax.jit(alone(setting, pull))

    def pulls(state: MethodState) -> np.ndarray:
        found = np.zeros(kept)
        for which in _batches(kept, min(TOGETHER, kept)):
            found[which] = np.asarray(compute(state, batch_at(task, data, which), validation)).reshape(-1)
        return found

    return pulls


def _batches(count: int, size: int) -> list[np.ndarray]:
    """All of so many examples in batches of one size; the last one goes back to have it."""
    return [np.arange(size) + min(begin, count - size) for begin in range(0, count, size)]


def write(path: Path, dataset: Dataset, found: dict[str, Examples]) -> None:
    """Write examples.csv: a line for each method and example, the least trusted first."""
    names = dataset.info.names or [str(place) for place in range(dataset.info.num_classes)]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        heads = ["method", "index", "label", "predicted", "confidence", "trust", "pull", "weight"]
        table.writerow([*heads, *(["true", "right"] if "true" in dataset.train else [])])
        for method, examples in found.items():
            for row in examples.suspicious(1.0):
                table.writerow([method, *_line(examples, row, names)])


def _line(examples: Examples, row: int, names: Any) -> list[Any]:
    given, predicted = examples.given[row], examples.predicted[row]
    line = [examples.index[row], names[given], names[predicted]]
    for values in (examples.confidence, examples.trust, examples.pull, examples.weight):
        line.append("" if values is None else f"{values[row]:.4f}")
    if examples.true is not None:
        line += [names[examples.true[row]], str(bool(examples.true[row] == given)).lower()]
    return line


def precision_among(examples: Examples, share: float) -> float:
    """Of the share of examples that are trusted least, how many labels are wrong; the truth must be known."""
    rows = examples.suspicious(share)
    assert examples.true is not None
    return float(np.mean(examples.true[rows] != examples.given[rows]))
