"""Evaluation of a student on a whole set."""

from functools import partial

import jax
import jax.numpy as jnp

from l2t_jax.types import Array, PyTree, Student, Task


@partial(jax.jit, static_argnames=("student", "task", "batch_size"))
def evaluate(
    student: Student, variables: dict[str, PyTree], data: PyTree, task: Task, batch_size: int = 1000
) -> dict[str, Array]:
    """Take the mean error and metrics of a student over all of `data`, with running statistics.

    The set is read in equal batches, the last filled up with examples of weight zero, so the means are over
    exactly the n examples whatever the batch size. Compiled once for each student and task: keep these two,
    and keep `data` on the device.

    Args:
      student: the network.
      variables: {"params", "batch_stats"}.
      data: what `task.gather` reads, with n examples in each leaf.
      task: gives error and metrics; its augmentation is off.
      batch_size: examples at a time, which changes memory and no result.

    Returns:
      {"error": [], and each of the task's metrics: []}, means over the examples.
    """
    n = jax.tree.leaves(data)[0].shape[0]
    batch_size = min(batch_size, n)
    steps = -(-n // batch_size)
    positions = jnp.arange(steps * batch_size).reshape(steps, batch_size)

    def sums(position: Array) -> dict[str, Array]:
        batch = task.gather(data, jnp.minimum(position, n - 1), None)
        outputs, _ = student.apply(variables, batch.inputs, False)
        values = task.metrics(outputs, batch.targets) | {"error": task.error(outputs, batch.targets)}
        return jax.tree.map(lambda v: jnp.where(position < n, v, 0).sum(), values)

    return jax.tree.map(lambda s: s.sum() / n, jax.lax.map(sums, positions))
