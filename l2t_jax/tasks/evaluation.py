"""Evaluation of a student on a whole set."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.inputs import as_arrays
from l2t_jax.tasks.reading import Held, Reader, held, whole
from l2t_jax.types import Array, Batch, PyTree, Student, Task
from l2t_jax.unroll import each_example, errors_of, examples_of


def evaluate(
    student: Student, variables: dict[str, PyTree], data: PyTree, task: Task, batch_size: int | None = None
) -> dict[str, float]:
    """Score a student on all of `data`, with running statistics.

    What the task measures of each example is stacked over the whole set, and then scored: an accuracy is a mean of
    examples, a precision, an intersection over union or a recall is not.

    Args:
      student: the network.
      variables: {"params", "batch_stats"}.
      data: examples, n in each leaf; keep them on the device, or where the task reads on the host, there.
      task: gives measure and score; its augmentation is off. Of a student with a backbone it is `reading.behind` it.
      batch_size: examples at a time, which changes memory and no result; by default `task.scored_at_once`.

    Returns:
      {name: value} of `task.score`.

    Raises:
      ValueError: see `measure_all`.
    """
    return task.score(jax.device_get(measure_all(student, variables, data, task, batch_size)))


def measure_all(
    student: Student, variables: dict[str, PyTree], data: PyTree, task: Task, batch_size: int | None = None
) -> PyTree:
    """What the task measures of all examples, leaves [n, ...]; it may be mapped over students.

    Examples that are read on the host come back from the device batch by batch, as NumPy arrays.
    Compiled once for each student and task: keep these two. Arguments as of `evaluate`.

    Raises:
      ValueError: data hold no examples or leaves of different n, the batch size is no positive integer, variables have
        not the two entries, or what is measured is not of each example.
    """
    batch_size = task.scored_at_once if batch_size is None else batch_size
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data if task.read else as_arrays(data, "data"))]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        told = ", ".join(str(list(shape)) for shape in shapes) or "none"
        raise ValueError(f"the leaves of data are {told}: expected [n, ...], with one n of at least 1.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not a positive integer: give batch_size at least 1.")
    if missing := {"params", "batch_stats"} - set(variables):
        raise ValueError(f"variables have no {sorted(missing)[0]!r}: give both, batch_stats {{}} without BatchNorm.")
    if task.read:
        return _measure_read(student, variables, data, task, batch_size)
    return _measure_all(student, variables, held(student, data), task, batch_size)


def _measure_read(student: Student, variables: dict[str, PyTree], data: PyTree, task: Task, batch_size: int) -> PyTree:
    """As `_measure_all`, of examples that are read on the host while the device measures those before."""
    n = jax.tree.leaves(data)[0].shape[0]
    batch_size = min(batch_size, n)
    constant = None if student.backbone is None else jax.device_put(student.backbone.variables)
    begins = range(0, n, batch_size)
    reader = Reader(task, data)
    which = lambda begin: np.minimum(np.arange(begin, begin + batch_size), n - 1)  # noqa: E731
    try:
        ahead, found = reader.begin(which(0), None), []
        for begin in begins:
            block = ahead()
            if begin != begins[-1]:
                ahead = reader.begin(which(begin + batch_size), None)
            block = block if constant is None else Held(block, constant)
            # A batch of all that was read.
            found.append(jax.device_get(_measure_all(student, variables, block, task, batch_size)))
    finally:
        reader.close()
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *found)


@partial(jax.jit, static_argnames=("student", "task", "batch_size"))
def _measure_all(student: Student, variables: dict[str, PyTree], data: PyTree, task: Task, batch_size: int) -> PyTree:
    examples, seeing = data, student
    if isinstance(data, Held):
        examples, seeing = data.examples, whole(student, data.backbone)
    n = jax.tree.leaves(examples)[0].shape[0]
    batch_size = min(batch_size, n)
    steps = -(-n // batch_size)
    positions = jnp.minimum(jnp.arange(steps * batch_size).reshape(steps, batch_size), n - 1)
    measure = task.measure or partial(measure_errors, task)

    def measured(position: Array) -> PyTree:
        found = measure(seeing, variables, task.gather(examples, position, None))
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            if jnp.shape(leaf)[:1] != position.shape:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"the task's {name} is {list(jnp.shape(leaf))} for {len(position)} examples: expected one value "
                    "for each, not reduced."
                )
        return found

    # The last batch is filled up with the last example.
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], jax.lax.map(measured, positions))


def measure_errors(task: Task, student: Student, variables: dict[str, PyTree], batch: Batch) -> dict[str, Array]:
    """The error of each example, and its metrics [B]: what is measured where a task says nothing else."""
    outputs, _ = student.apply(variables, batch.inputs, False)
    errors = each_example(errors_of(task, outputs, batch), examples_of(batch))
    return {**task.metrics(outputs, batch.targets), "error": errors}
