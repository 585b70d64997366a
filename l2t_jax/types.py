"""The records the library is composed of: small tuples of pure functions and of arrays.

Legend: B batch, V validation batch, R rows of a batch, C classes, F features, N unroll length, S data stages.
Everything random takes a key; nothing here holds state.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import numpy as np

Array = jax.Array
Key = jax.Array  # a typed PRNG key, shape []
PyTree = Any


class Batch(NamedTuple):
    """One batch of examples. Inputs and targets are whatever the task's students and errors read."""

    inputs: PyTree  # leaves [B, ...]
    targets: PyTree  # leaves [B, ...]; [B] int32 for classification
    weight: Array | tuple[()] = ()  # [B] how much an example counts, 0 for padding; (): all alike
    # [B, ...] the targets before they were corrupted or made into ids, where known: for records, not for methods
    true: Array | tuple[()] = ()
    key: Key | tuple[()] = ()  # [B] for what a student draws at random; (): it draws nothing


class Read(NamedTuple):
    """What a loss is given of a batch: the rows that are classified (examples, pixels, tokens), or what a view makes.

    R = B k rows, those of an example one after the other.
    """

    outputs: PyTree  # leaves [R, ...]; logits [R, C] of "rows", a `Head` of "head"
    targets: PyTree  # leaves [R, ...]; classes [R] of "rows"
    weight: Array | tuple[()] = ()  # [R] how much a row counts, 0 where it is ignored; (): all alike
    scale: float = 1.0  # of the mean over rows: the sum of the weights of several terms that are rows of one mean


class Errors(NamedTuple):
    """The errors of a batch, unreduced; their weighted mean is the validation error."""

    values: Array  # [R], R = B k as in `Read`
    weight: Array | tuple[()] = ()  # [R]; (): all alike


class Metric(NamedTuple):
    """The headline of a task, as tables show it."""

    name: str  # of what `Task.score` gives
    unit: str = ""  # "%" is of fractions
    better: Literal["higher", "lower"] = "higher"


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


class Segmented(NamedTuple):
    """What a student puts out that classifies pixels."""

    logits: Array  # [B, H, W, C], as large as the image
    auxiliary: Array | tuple[()] = ()  # [B, H, W, C] of a second head, in training


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """The part of a student that is not trained: computed once a batch, never differentiated."""

    variables: PyTree  # NumPy
    # (variables, inputs [B, ...]) -> what the student's init, apply and head take in place of inputs, leaves [B, ...]
    apply: Callable[[PyTree, PyTree], PyTree]


def as_it_is(gradient: PyTree) -> PyTree:
    """The descent of a loss whose parameters all descend."""
    return gradient


class Stepwise(NamedTuple):
    """How a student that puts out a sequence is asked for one place after the other."""

    # (variables, source [B, S], steps) -> what all steps read, and what is handed on from step to step; leaves [B, ...]
    begin: Callable[[dict[str, PyTree], Array, int], tuple[PyTree, PyTree]]
    # (variables, what is read, what is handed on, ids [B], place t []) -> logits [B, V] of what follows, handed on
    step: Callable[[dict[str, PyTree], PyTree, PyTree, Array, Array], tuple[Array, PyTree]]


def unscheduled(params: PyTree, progress: Array) -> PyTree:
    """The schedule of a loss that has none."""
    return params


class Loss(NamedTuple):
    """A training loss: unreduced, batch first, with parameters that may be learned (`{}` where there are none)."""

    init: Callable[[Key], PyTree]
    apply: Callable[..., Array]  # (params, outputs [R, C], targets [R], *, sample_weight, mask) -> [R]
    # (params, part of all student steps that is done, [] in [0, 1)) -> params as they are then
    at: Callable[[PyTree, Array], PyTree] = unscheduled
    reads: str = "rows"  # the view of the task that apply is given; of "head" it is a `Head` of the batch
    learned: Literal["no", "student", "teacher"] = (
        "teacher"  # params: fixed, trained beside the student, or by a teacher
    )
    # of params trained beside the student: their gradient -> what the optimizer is given, e.g. turned round to ascend
    descent: Callable[[PyTree], PyTree] = as_it_is
    reverse_only: bool = False  # whether its gradient is no derivative of a function: forward mode would be wrong


class Student(NamedTuple):
    """A network. `variables` is {"params": ..., "batch_stats": ...}; batch_stats is {} without BatchNorm."""

    init: Callable[[Key, Array], dict[str, PyTree]]  # (key, inputs [B, ...]) -> variables
    apply: Callable[[dict[str, PyTree], Array, bool], tuple[Array, PyTree]]  # -> outputs [B, C], new batch_stats
    # as apply -> `Head`, new batch_stats; None where the last layer cannot be taken apart
    head: Callable[[dict[str, PyTree], Array, bool], tuple[Head, PyTree]] | None = None
    # whether it draws at random in training (dropout): apply and head then take keys [B] as a fourth argument, one for
    # each example, so that how a batch is divided over devices changes nothing; without keys they draw nothing
    draws: bool = False
    backbone: Backbone | None = None  # what comes before all of this and is not trained
    stepwise: Stepwise | None = None  # of one that writes sequences; None: each place asks `apply` anew


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
    hidden: Callable[[PyTree], PyTree]  # phi -> initial hidden state (an LSTM's, an optimizer's moments)
    # (params, hidden state, hypergradient, phi) -> update to ADD to phi, new hidden state
    update: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def rows(outputs: Array, targets: Array) -> Read:
    """The view of a student that classifies its examples: each is a row. Also of a `Head` in place of outputs."""
    return Read(outputs, targets)


def means(measured: PyTree) -> dict[str, float]:
    """The score of a task whose measures are averaged over the examples."""
    return {name: float(np.mean(value, dtype=np.float64)) for name, value in measured.items()}


class Lengths(NamedTuple):
    """Examples that are padded: how long each is, and how they are cut where all that a round reads are short."""

    of: Callable[[PyTree], np.ndarray]  # examples, leaves [n, ...] -> [n]
    cut: Callable[[PyTree, int], PyTree]  # (examples, length) -> arrays no longer than that
    buckets: int = 2  # rounds among which examples are shared out by length


class Task(NamedTuple):
    """What is learned: its error, what a loss may read, how indices become batches, how a student is scored."""

    error: Callable[[PyTree, PyTree], Array | Errors]  # outputs, targets -> outer (validation) errors, [B] or `Errors`
    metrics: Callable[[PyTree, PyTree], dict[str, Array]]  # of a validation batch while training: {name: [B]}
    # (data, indices [...], keys [...] or None) -> Batch with leaves [..., ...]; keys switch augmentation on
    gather: Callable[[PyTree, Array, Key | None], Batch]
    # name -> (outputs or `Head`, targets) -> what a loss with this name in `Loss.reads` is given
    # (pairs and no dict, since a task is hashed where it is an argument of compiled functions)
    views: tuple[tuple[str, Callable[[Any, PyTree], Read]], ...] = (("rows", rows), ("head", rows))
    # (student, variables, batch) -> what must be known of each example to score a student, leaves [B, ...];
    # None: the errors and the metrics
    measure: Callable[["Student", dict[str, PyTree], Batch], PyTree] | None = None
    score: Callable[[PyTree], dict[str, float]] = means  # that of all examples, leaves [n, ...], NumPy -> {name: value}
    metric: Metric = Metric("accuracy", "%")  # the headline
    outputs: int = 0  # C, what a student puts out for each row: classes, where rows are classified
    draws: bool = False  # whether gather draws at random, and is given keys in training
    # Where examples are read on the host: (examples, indices [k], None or the seeds of each one's random draws)
    # -> leaves [k, ...], NumPy, which gather then reads by position; seeds switch augmentation on
    read: Callable[[PyTree, np.ndarray, Sequence[tuple[int, ...]] | None], PyTree] | None = None
    together: int = 1  # examples of one kind (`TaskSpec.strata`) that stand together in a batch
    apart: bool = False  # whether kinds are divided into training and validation, and not the examples of each
    loss: str = ""  # of `LOSSES`: what L2T-DLN and ALA teach in place of the spec's
    lengths: Lengths | None = None  # None: all batches of a run have one shape
    scored_at_once: int = 1000  # examples that are measured in one piece, for their memory


class MethodState(NamedTuple):
    """Everything a method carries from round to round; a checkpoint of it is a checkpoint of the run."""

    student: StudentState
    loss: PyTree  # loss parameters
    teacher: PyTree  # teacher parameters
    carried: PyTree  # what else goes on: the teacher's hidden state, counters, keys
    optimizer_state: PyTree  # of the teacher's own optimizer


class How(TypedDict, total=False):
    """How a hypergradient is computed, keywords of `hypergradient`: they change time and memory, and no result."""

    memory: str
    at_once: int
    check_gradient: bool


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
    # what of it depends on how long the run is planned, as words; "": nothing, so that a run may go on for longer
    of_length: str = ""
