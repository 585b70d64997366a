"""The records the library is composed of: small tuples of pure functions and of arrays.

Legend: B batch, V validation batch, C classes, F features, N unroll length, S data stages of a round.
Everything random takes a key; nothing here holds state.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
Key = jax.Array  # a typed PRNG key, shape []
PyTree = Any


class Batch(NamedTuple):
    """One batch of examples."""

    inputs: Array  # [B, ...] float
    targets: Array  # [B] int32 for classification
    true: (
        Array | tuple[()]
    ) = ()  # [B] the targets before they were corrupted, where known: for records, not for methods


class RoundBatches(NamedTuple):
    """All data one round of a method reads. S is 2 where each stage has its own data and 1 where both share it."""

    train: Batch  # leaves [S, N, B, ...]
    validation: Batch  # leaves [S, V, ...]
    first_of_epoch: Array  # [] bool


class Head(NamedTuple):
    """The last layer of a student, taken apart: what a loss on angles reads in place of the outputs."""

    features: Array  # [B, F]
    kernel: Array  # [F, C]
    bias: Array  # [C]; the outputs are features @ kernel + bias


def unscheduled(params: PyTree, progress: Array) -> PyTree:
    """The schedule of a loss that has none."""
    return params


class Loss(NamedTuple):
    """A training loss: unreduced, batch first, with parameters that may be learned (`{}` where there are none)."""

    init: Callable[[Key], PyTree]
    apply: Callable[..., Array]  # (params, outputs [B, C], targets [B], *, sample_weight, mask) -> [B]
    # (params, part of all student steps that is done, [] in [0, 1)) -> params as they are then
    at: Callable[[PyTree, Array], PyTree] = unscheduled
    reads: Literal["outputs", "head"] = "outputs"  # what apply is given: outputs, or a `Head` of the batch
    learned: Literal["no", "student", "teacher"] = (
        "teacher"  # params: fixed, trained beside the student, or by a teacher
    )


class Student(NamedTuple):
    """A network. `variables` is {"params": ..., "batch_stats": ...}; batch_stats is {} without BatchNorm."""

    init: Callable[[Key, Array], dict[str, PyTree]]  # (key, inputs [B, ...]) -> variables
    apply: Callable[[dict[str, PyTree], Array, bool], tuple[Array, PyTree]]  # -> outputs [B, C], new batch_stats
    # as apply -> `Head`, new batch_stats; None where the last layer cannot be taken apart
    head: Callable[[dict[str, PyTree], Array, bool], tuple[Head, PyTree]] | None = None


class StudentState(NamedTuple):
    """What N student steps carry."""

    params: PyTree
    batch_stats: PyTree
    optimizer_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """The form `Student.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Teacher(NamedTuple):
    """A (possibly learned) optimizer of the loss parameters."""

    init: Callable[[Key], PyTree]  # -> teacher parameters
    memory: Callable[[PyTree], PyTree]  # loss parameters -> initial memory (LSTM state, optimizer moments)
    # (params, memory, hypergradient, loss parameters) -> update to ADD to the loss parameters, new memory
    update: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Task(NamedTuple):
    """What is learned: its error and metrics (unreduced), and how indices become batches on the device."""

    error: Callable[[Array, Array], Array]  # outputs [B, C], targets [B] -> outer (validation) error [B]
    metrics: Callable[[Array, Array], dict[str, Array]]  # -> {"accuracy": [B], ...}
    # (data, indices [...], keys [...] or None) -> Batch with leaves [..., ...]; keys switch augmentation on
    gather: Callable[[PyTree, Array, Key | None], Batch]


class MethodState(NamedTuple):
    """Everything a method carries from round to round; a checkpoint of it is a checkpoint of the run."""

    student: StudentState
    loss: PyTree  # loss parameters
    teacher: PyTree  # teacher parameters
    memory: PyTree  # teacher memory
    optimizer_state: PyTree  # of the teacher's own optimizer


class Method(NamedTuple):
    """One paper's algorithm."""

    init: Callable[[Key, Array], MethodState]  # (key, example inputs [B, ...]) -> state
    round: Callable[[MethodState, RoundBatches], tuple[MethodState, dict[str, Any]]]  # -> state, metrics
    stages: int  # S: how many separate sets of batches a round reads
    steps_per_round: int  # student steps kept per round, in units of N
    # (state, training batch, validation batch) -> [B]: how strongly each example of the training batch would move the
    # student, the norm of its loss's derivative with respect to the student's outputs (the features of a `Head`);
    # None where a method does not say, and then no record of it is kept
    pull: Callable[[MethodState, Batch, Batch], Array] | None = None
