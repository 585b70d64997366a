"""What every method shares: one stage's data out of a round's, a stage without a derivative, finite flags.

Legend: S data stages of a round, N unroll length, B batch, V validation batch, K rounds taken as one.
"""

from collections import OrderedDict  # keeps its order through jit, which sorts a dict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.hypergradient import Hypergradient
from l2t_jax.types import (
    Array,
    Batch,
    Errors,
    Head,
    Key,
    Loss,
    Method,
    MethodState,
    PyTree,
    RoundBatches,
    Student,
    StudentState,
    Task,
)
from l2t_jax.unroll import (
    InnerLoss,
    OuterError,
    each_example,
    errors_of,
    examples_of,
    losses_for,
    mean_over,
    outputs_for,
    plain_gradient,
    student_step,
    unroll,
    unrolled_error,
)

FEW = 8  # parameters of a loss that are shown one by one in the metrics of a round


def stage_data(batches: RoundBatches, s: int, stages: int = 1) -> tuple[Batch, Batch]:
    """The training batches (leaves [N, B, ...]) and the validation batch (leaves [V, ...]) of stage s.

    Raises:
      ValueError: a leaf has not the leading size S that the method reads.
    """
    for x in jax.tree.leaves((batches.train, batches.validation)):
        if x.ndim < 2 or x.shape[0] != stages:
            raise ValueError(
                f"a round's data have a leaf {list(x.shape)}: this method reads {stages} stages, train leaves "
                f"[{stages}, N, B, ...] and validation leaves [{stages}, V, ...]."
            )
    return jax.tree.map(lambda x: x[s], (batches.train, batches.validation))


def train_stage(
    inner: InnerLoss,
    outer: OuterError,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
) -> Callable[[PyTree, StudentState, PyTree, PyTree], Hypergradient]:
    """Build a stage of student steps of which no derivative is wanted: a `Hypergradient` whose gradient is {}."""
    step = student_step(plain_gradient(inner), optimizer, axis_name=axis_name)
    run = unrolled_error(partial(unroll, step), outer)

    def compute(phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree) -> Hypergradient:
        error, (state, losses, metrics) = run(phi, state, batches, validation)
        error, losses, metrics = mean_over(axis_name, (error, losses, metrics))
        return Hypergradient(error, {}, state, losses, metrics)

    return compute


def finite(*stages: tuple[str, PyTree]) -> OrderedDict[str, PyTree]:
    """For every leaf of every named tree whether all its entries are finite, [] bool.

    Name the stages in the order in which a round computes them: the first one that fails is reported as the cause.
    """
    return OrderedDict((name, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)) for name, tree in stages)


def few_entries(phi: PyTree) -> dict[str, Array]:
    """The parameters of a loss of few, by name: {"loss_weights_0": ...}; {} where there are more."""
    leaves = jax.tree_util.tree_leaves_with_path(phi)
    if sum(leaf.size for _, leaf in leaves) > FEW:
        return {}
    found = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="_")
        for i, entry in enumerate(jnp.ravel(leaf)):
            found[f"loss_{name}_{i}" if jnp.ndim(leaf) else f"loss_{name}"] = entry
    return found


def pull_of(
    student: Student,
    task: Task,
    loss: Loss,
    variables: dict[str, PyTree],
    params: PyTree,
    batch: Batch,
) -> Array:
    """How strongly each example moves the student: |d loss_b / d outputs_b|, or of the features of a `Head`; [B].

    Args:
      student, task, loss: the records.
      variables: of the student, with batch statistics in BatchNorm.
      params: of the loss, as `loss.at` gives them.
      batch: training examples.
    """
    losses_of = losses_for(task, loss)
    return _slopes(lambda outputs: losses_of(params, outputs, batch), outputs_for(student, loss), variables, batch)


def pull_of_errors(student: Student, task: Task, variables: dict[str, PyTree], batch: Batch, weights: Array) -> Array:
    """As `pull_of`, where the loss is the task's error of each example times its weight [B]."""

    def losses(outputs: PyTree) -> Errors:
        return Errors(weights * each_example(errors_of(task, outputs, batch), examples_of(batch)))

    return _slopes(losses, student.apply, variables, batch)


def _slopes(
    losses: Callable[[Any], Errors], apply: Callable[..., Any], variables: dict[str, PyTree], batch: Batch
) -> Array:
    """The norm of the derivative of losses with respect to each example's outputs [B]."""
    outputs, _ = apply(variables, batch.inputs, True)

    def total(moved: PyTree) -> Array:
        values, weight = losses(outputs._replace(features=moved) if isinstance(outputs, Head) else moved)
        return jnp.sum(values if isinstance(weight, tuple) else weight * values)

    slope = jax.grad(total)(outputs.features if isinstance(outputs, Head) else outputs)
    squares = [jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=-1) for x in jax.tree.leaves(slope)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def on_validation(method: Method) -> Method:
    """A method of one stage and N = 1 that trains on its validation batches: what a meta set alone would teach.

    A control for the methods that learn from a meta set; a step of it reads V examples in place of B.
    """

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        return method.round(state, batches._replace(train=jax.tree.map(lambda x: x[:, None], batches.validation)))

    return method._replace(round=round)


class Life(NamedTuple):
    """What `over_lives` carries beside what the method does."""

    carried: PyTree  # the method's own
    key: Array  # [...] uint32, data of a key
    rounds: Array  # [] int32, since the beginning


def over_lives(method: Method, rounds: int) -> Method:
    """Train the teacher of a method over many student lives: every so many rounds student and loss begin anew.

    The teacher's parameters and its optimizer's state go on; its hidden state, which is of the loss, begins anew too.

    Args:
      method: e.g. of `l2t_dln`.
      rounds: of a life.
    Returns:
      a `Method` that carries a `Life`; the student it ends with is that of the last life.
    Raises:
      ValueError: a life has no round.
    Source: ours; the paper trains a teacher over one life.
    """
    if rounds < 1:
        raise ValueError(f"a life of {rounds} rounds teaches nothing: give at least 1.")

    def init(key: Key, inputs: Array) -> MethodState:
        state = method.init(key, inputs)
        return state._replace(carried=Life(state.carried, jax.random.key_data(key), jnp.int32(0)))

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        life = state.carried
        going_on = state._replace(carried=life.carried)

        def begin_anew() -> MethodState:
            key = jax.random.fold_in(jax.random.wrap_key_data(life.key), life.rounds)
            fresh = method.init(key, jax.tree.map(lambda x: x[0, 0], batches.train.inputs))
            return fresh._replace(teacher=state.teacher, optimizer_state=state.optimizer_state)

        over = (life.rounds > 0) & (life.rounds % rounds == 0)
        state, metrics = method.round(lax.cond(over, begin_anew, lambda: going_on), batches)
        return state._replace(carried=Life(state.carried, life.key, life.rounds + 1)), metrics

    return method._replace(init=init, round=round, of_length="the lives")


def merge_rounds(method: Method, rounds: int) -> Method:
    """Take K rounds of a method as one, each with its own data: for methods that look ahead one step at a time.

    Its metrics are means over the K rounds; what is finite is so in all of them.

    Raises:
      ValueError: there are no rounds to take as one.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"merge_rounds rounds={rounds!r} is not a positive integer: give at least 1.")

    def round(state: MethodState, batches: RoundBatches) -> tuple[MethodState, dict[str, Any]]:
        apart = lambda x: x.reshape(rounds, method.stages, *x.shape[1:])  # noqa: E731
        train, validation = jax.tree.map(apart, (batches.train, batches.validation))
        first = batches.first_of_epoch & (jnp.arange(rounds) == 0)  # [K]
        state, metrics = lax.scan(method.round, state, RoundBatches(train, validation, first))
        flags = jax.tree.map(jnp.all, metrics.pop("finite"))
        return state, {**{name: jnp.mean(value) for name, value in metrics.items()}, "finite": flags}

    return method._replace(round=round, stages=rounds * method.stages, steps_per_round=rounds * method.steps_per_round)
