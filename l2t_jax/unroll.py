"""The student step (Eq. 2), its objectives, and the unroll: a scan over N of them.

Legend: B batch, V validation batch, N unroll length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from l2t_jax.inputs import as_arrays, check_carried, check_floats, check_inner, check_outer, length_of
from l2t_jax.optimizers import check_optimizer, update_with
from l2t_jax.types import Array, Batch, Errors, Loss, PyTree, Read, Student, StudentState, Task

MANY = 2**17  # predictions, rows times classes, of which a loss is not computed at once
# Of how many then: a CPU is twice as fast where the DLN's layers stay in its cache, a GPU where kernels are large.
PIECE = {"cpu": 2**13}  # elsewhere MANY

# (params, batch_stats, loss parameters, batch) -> scalar loss, new batch_stats
InnerLoss = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[Array, PyTree]]
# (params, batch_stats, validation batch) -> scalar error, anything to report
OuterError = Callable[[PyTree, PyTree, PyTree], tuple[Array, PyTree]]
# as InnerLoss -> gradient with respect to params, loss, new batch_stats
Gradient = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, Array, PyTree]]
# (state, loss parameters, batch) -> next state, loss
Step = Callable[[StudentState, PyTree, PyTree], tuple[StudentState, Array]]
# (state, loss parameters, batches [N, ...]) -> state after N steps, losses [N]
Unroll = Callable[[StudentState, PyTree, PyTree], tuple[StudentState, Array]]


def outputs_for(student: Student, loss: Loss) -> Callable[..., tuple[Any, PyTree]]:
    """What of a student a loss reads: its `apply`, or its `head`.

    Raises:
      ValueError: the loss reads the last layer apart, and the student does not give it.
    """
    if loss.reads != "head":
        return student.apply
    if student.head is None:
        raise ValueError(
            "This loss reads the student's features and last layer, and the student has no `head`: make it with "
            "from_linen and a last Dense layer named 'output', or give Student(init, apply, head)."
        )
    return student.head


def keys_for(student: Student, batch: Batch) -> tuple[Array, ...]:
    """The last argument of a training step's `apply` or `head`: the batch's keys, where the student draws at random.

    Raises:
      ValueError: it draws, and the batch has no key: then it would silently draw nothing.
    """
    if not student.draws:
        return ()
    if isinstance(batch.key, tuple):
        raise ValueError(
            "the student draws at random (dropout), and the training batch has no keys: give Batch.key [B], one for "
            "each example, or a student without."
        )
    return (batch.key,)


def losses_for(task: Task, loss: Loss) -> Callable[..., Errors]:
    """A loss as a function of what a student puts out: through the view of the task that it reads.

    Returns:
      (params, outputs or `Head`, batch, **weights) -> losses [R] and their weights: of its example times its own.
    Raises:
      ValueError: the task has no such view; when called, the loss does not give one value for each row.
    """
    views = dict(task.views)
    if loss.reads not in views:
        raise ValueError(
            f"this loss reads {loss.reads!r}, and the task offers {', '.join(views)}: take another loss, or add a view "
            "to the task."
        )
    view = views[loss.reads]

    def losses_of(params: PyTree, outputs: Any, batch: Batch, **weights: Array) -> Errors:
        read = view(outputs, batch.targets)
        count = jax.tree.leaves(read.targets)[0].shape[0]
        values = in_pieces(loss, params, read, **weights)
        if values.shape != (count,):
            raise ValueError(
                f"The loss gives {list(values.shape)} for {count} examples; expected one value for each, not reduced."
            )
        scaled = values if read.scale == 1 else read.scale * values
        return Errors(scaled, both_weights(read.weight, batch.weight, count))

    return losses_of


def in_pieces(loss: Loss, params: PyTree, read: Read, **weights: Array) -> Array:
    """The values [R] of a loss; of many rows that are classified, pixels say, some after the others.

    Of more than `MANY` predictions only what a piece of `PIECE` needs is in memory at a time: its values are computed
    again on the way back, for derivatives of any order. The numbers are those of one piece.
    """
    outputs, rows = read.outputs, (read.outputs, read.targets, weights)
    apply = lambda outputs, targets, weights: loss.apply(params, outputs, targets, **weights)  # noqa: E731
    if loss.reads != "rows" or not hasattr(outputs, "ndim") or outputs.ndim != 2 or outputs.size <= MANY:
        return apply(*rows)
    count = outputs.shape[0]
    most = max(1, PIECE.get(jax.default_backend(), MANY) // outputs.shape[1])
    # A divisor needs no padding, which copies all rows.
    size = next((k for k in range(most, most // 2, -1) if count % k == 0), most)
    pieces = -(-count // size)
    fill = lambda x: jnp.concatenate([x, jnp.repeat(x[:1], pieces * size - count, axis=0)])  # noqa: E731
    whole = rows if pieces * size == count else jax.tree.map(fill, rows)
    split = jax.tree.map(lambda x: x.reshape(pieces, size, *x.shape[1:]), whole)
    values = lax.map(jax.checkpoint(lambda piece: apply(*piece), prevent_cse=False), split)
    if values.shape != (pieces, size):
        return values  # reduced: its caller says so
    return values.reshape(-1)[:count]


def both_weights(of_rows: Array | tuple[()], of_examples: Array | tuple[()], count: int) -> Array | tuple[()]:
    """The weight of each of `count` rows: its own times its example's; () where all count alike.

    Raises:
      ValueError: there is not one weight for each row.
    """
    if not isinstance(of_rows, tuple) and jnp.shape(of_rows) != (count,):
        raise ValueError(f"the weights of rows are {list(jnp.shape(of_rows))}: expected [{count}], one for each row.")
    if isinstance(of_examples, tuple):
        return of_rows
    repeated = jnp.repeat(of_examples, count // of_examples.shape[0])
    return repeated if isinstance(of_rows, tuple) else of_rows * repeated


def errors_of(task: Task, outputs: PyTree, batch: Batch) -> Errors:
    """The validation errors of a batch with their weights, each row's times its example's.

    Raises:
      ValueError: the task's error does not give one value for each example, or for each row of them.
    """
    errors = task.error(outputs, batch.targets)
    values, weight = errors if isinstance(errors, Errors) else (errors, ())
    if jnp.ndim(values) != 1 or values.shape[0] % examples_of(batch):
        raise ValueError(
            f"the task's error is {list(jnp.shape(values))} for {examples_of(batch)} examples: expected one value for "
            "each, or for each of their rows, not reduced."
        )
    return Errors(values, both_weights(weight, batch.weight, values.shape[0]))


def weighted_mean(errors: Errors, axis_name: str | None = None) -> Array:
    """The mean over all rows of all devices that count, as this device's part of it: the mean over devices is right.

    Without weights it is the plain mean, right as devices have equal parts. With weights w it is D sum w l / W, W being
    the sum of the weights of all D devices, since a mean of means of unequal weight is not the mean. 0 where W is 0.
    """
    values, weight = errors
    if isinstance(weight, tuple):
        return jnp.mean(values)
    whole, devices = jnp.sum(weight), 1
    if axis_name is not None:
        whole, devices = lax.psum(whole, axis_name), lax.axis_size(axis_name)
    # What does not count may be anything, NaN too: it must not reach a derivative.
    total = jnp.sum(jnp.where(weight > 0, weight * jnp.where(weight > 0, values, 0), 0))
    return devices * total / jnp.where(whole > 0, whole, 1)


def each_example(errors: Errors, examples: int) -> Array:
    """The mean error of each example [B], of its rows that count; 0 where none does."""
    values, weight = errors
    values = values.reshape(examples, -1)
    if isinstance(weight, tuple):
        return jnp.mean(values, axis=1) if values.shape[1] > 1 else values[:, 0]
    weight = weight.reshape(examples, -1)
    whole = jnp.sum(weight, axis=1)
    total = jnp.sum(jnp.where(weight > 0, weight * jnp.where(weight > 0, values, 0), 0), axis=1)
    return total / jnp.where(whole > 0, whole, 1)


def examples_of(batch: Batch) -> int:
    """B."""
    count: int = jax.tree.leaves(batch.inputs)[0].shape[0]
    return count


def inner_objective(student: Student, task: Task, loss: Loss, *, axis_name: str | None = None) -> InnerLoss:
    """The student's training objective: the mean of the unreduced loss over a batch, batch statistics in BatchNorm.

    Args:
      student, task, loss: the records that are composed; the loss is given the view of the task that it reads.
      axis_name: mapped axis over which a batch is split, if any: weights are then normalised over all of it.
    """
    outputs_of, losses_of = outputs_for(student, loss), losses_for(task, loss)

    def inner(params: PyTree, batch_stats: PyTree, phi: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, stats = outputs_of(variables, batch.inputs, True, *keys_for(student, batch))
        return weighted_mean(losses_of(phi, outputs, batch), axis_name), stats

    return inner


def outer_objective(student: Student, task: Task, *, axis_name: str | None = None) -> OuterError:
    """The validation error e_val and the task's metrics, means over a validation batch; nothing is dropped out.

    BatchNorm uses the statistics of the validation batch, as in the released code; what that batch would add to the
    running statistics is dropped, so validation data never enters the student that is tested.

    Args: as in `inner_objective`.
    """

    def outer(params: PyTree, batch_stats: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        outputs, _ = student.apply({"params": params, "batch_stats": batch_stats}, batch.inputs, True)
        metrics = {
            name: weighted_mean(Errors(value, batch.weight), axis_name)
            for name, value in task.metrics(outputs, batch.targets).items()
        }
        return weighted_mean(errors_of(task, outputs, batch), axis_name), metrics

    return outer


def init_state(variables: dict[str, PyTree], optimizer: optax.GradientTransformation) -> StudentState:
    """Make the state that an unroll carries from {"params": ..., "batch_stats": ... (optional)}.

    Raises:
      ValueError: a parameter is not an array of floats (or a Python float), a statistic is not an array, the optimizer
        is none.
    """
    check_optimizer(optimizer, "the student's optimizer")
    params = as_arrays(variables["params"], "params")
    check_floats(params, "params")
    return StudentState(params, as_arrays(variables.get("batch_stats", {}), "batch_stats"), optimizer.init(params))


def plain_gradient(inner: InnerLoss) -> Gradient:
    """The student's gradient by `jax.grad`, with nothing said about how it is differentiated in turn."""

    def gradient(params: PyTree, batch_stats: PyTree, phi: PyTree, batch: PyTree) -> tuple[PyTree, Array, PyTree]:
        def checked(params: PyTree) -> tuple[Array, PyTree]:
            return check_inner(inner(params, batch_stats, phi, batch), params, batch_stats)

        check_floats(params, "params")
        (loss, stats), grads = jax.value_and_grad(checked, has_aux=True)(params)
        return grads, loss, stats

    return gradient


def student_step(gradient: Gradient, optimizer: optax.GradientTransformation, *, axis_name: str | None = None) -> Step:
    """Build the only place where a student is updated: theta <- theta - eta * d/dtheta L_phi(S_theta(x), y).

    Args:
      gradient: see `Gradient`.
      optimizer: any optax transformation that can be differentiated; the paper's is `optax.sgd(0.1)`. Inside an
        unroll Adam needs `eps_root > 0`: its square root has no derivative at a zero gradient.
      axis_name: mapped axis over which a batch is split, if any. The mean is taken of the gradient, never of the
        loss: only so is the derivative through the step exact.
    Returns:
      step(state, phi, batch) -> next state, loss [].
    Raises:
      ValueError: the optimizer is none; when called, it cannot take a step with a gradient alone.
    Source: L2T-DLN (NeurIPS 2023), Eq. 2.
    """
    check_optimizer(optimizer, "the student's optimizer")

    def step(state: StudentState, phi: PyTree, batch: PyTree) -> tuple[StudentState, Array]:
        grads, loss, stats = gradient(state.params, state.batch_stats, phi, batch)
        grads = mean_over(axis_name, grads)
        updates, optimizer_state = update_with(
            optimizer, grads, state.optimizer_state, state.params, "the student's optimizer"
        )
        return StudentState(optax.apply_updates(state.params, updates), stats, optimizer_state), loss

    return step


def unroll(step: Step, state: StudentState, phi: PyTree, batches: PyTree) -> tuple[StudentState, Array]:
    """Run N student steps, one for each entry of the batches (leaves [N, B, ...]).

    Returns:
      the state after N steps, and the losses [N] before each of them.
    Raises:
      ValueError: batches do not have one leading N, or a step changes shapes or dtypes of the state.
    """
    length_of(batches)

    def checked(before: StudentState, batch: PyTree) -> tuple[StudentState, Array]:
        after, loss = step(before, phi, batch)
        check_carried(before.optimizer_state, after.optimizer_state, "the student's optimizer", "its state")
        check_carried(before.params, after.params, "the student's optimizer", "params")
        return after, loss

    return lax.scan(checked, state, batches)


def unrolled_error(
    run: Unroll, outer: OuterError
) -> Callable[[PyTree, StudentState, PyTree, PyTree], tuple[Array, tuple[StudentState, Array, PyTree]]]:
    """Build the function that hypergradients differentiate: an unroll under phi, then the validation error.

    Returns:
      objective(phi, state, batches, validation) -> error [], (state after N steps, losses [N], metrics).
    """

    def objective(
        phi: PyTree, state: StudentState, batches: PyTree, validation: PyTree
    ) -> tuple[Array, tuple[StudentState, Array, PyTree]]:
        state, losses = run(state, phi, batches)
        error, metrics = check_outer(outer(state.params, state.batch_stats, validation))
        return error, (state, losses, metrics)

    return objective


def mean_over(axis_name: str | None, tree: PyTree) -> PyTree:
    """The mean over a mapped axis, or the tree itself where nothing is mapped."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)
