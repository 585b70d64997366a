"""Examples that are read on the host, and students whose backbone is not trained: what stands between data and gather.

Legend: k examples that are read together, n examples of a set.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.types import Array, Batch, Key, PyTree, Student, Task

MOST_READERS = 8  # threads that read examples

Seeds = Sequence[tuple[int, ...]] | None


class Held(NamedTuple):
    """What gather reads for a student with a backbone. Its variables are data: in a program they would be copied."""

    examples: PyTree  # leaves [n, ...]
    backbone: PyTree  # variables


def on_host(task: Task) -> Task:
    """The task whose examples stay on the host: those of each round are brought to the device before it, as they are.

    What is drawn of them is drawn on the device as before, so every number stays what it is.
    """

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        return jax.tree.map(lambda x: x[indices], examples)

    return task if task.read else task._replace(read=read)


def batch_at(task: Task, examples: PyTree, indices: np.ndarray) -> Batch:
    """The batch of examples at indices [k], with nothing drawn at random, wherever they are."""
    if task.read is None:
        return task.gather(examples, jnp.asarray(indices), None)
    return task.gather(task.read(examples, indices, None), jnp.arange(len(indices)), None)


def held(student: Student, examples: PyTree) -> PyTree:
    """Examples as the gather of a task reads them for this student."""
    return examples if student.backbone is None else Held(examples, student.backbone.variables)


def behind(task: Task, student: Student) -> Task:
    """The task as a student sees it through its backbone: of a `Held`, gather puts features in place of inputs.

    So they are computed once a batch, before the unroll and not inside it, and no derivative goes through them. Of
    examples alone gather gives the inputs themselves: so a student is scored, as a `whole`.
    """
    backbone = student.backbone
    if backbone is None:
        return task

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        if not isinstance(data, Held):
            return task.gather(data, indices, keys)
        batch = task.gather(data.examples, indices, keys)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[indices.ndim :]), batch.inputs)
        found = jax.lax.stop_gradient(backbone.apply(data.backbone, flat))
        return batch._replace(inputs=jax.tree.map(lambda x: x.reshape(*indices.shape, *x.shape[1:]), found))

    return task._replace(gather=gather)


def whole(student: Student, variables: PyTree) -> Student:
    """A student together with its backbone, which has these variables: its apply takes the inputs themselves."""
    backbone = student.backbone
    assert backbone is not None

    def apply(own: dict[str, PyTree], inputs: PyTree, train: bool, *keys: Key) -> tuple[Any, PyTree]:
        return student.apply(own, backbone.apply(variables, inputs), train, *keys)

    return student._replace(apply=apply, head=None, backbone=None)


class Reader:
    """Reads examples in threads, while the device computes."""

    def __init__(self, task: Task, examples: PyTree, workers: int | None = None) -> None:
        """Take what is read: a task with `read`, and examples of its own, leaves [n, ...] NumPy; and how many threads.

        By default as many as the machine has cores, up to `MOST_READERS`.
        """
        assert task.read is not None
        self._read = partial(task.read, examples)
        self._workers = workers or min(MOST_READERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers)

    def begin(self, indices: np.ndarray, seeds: Seeds) -> Callable[[], PyTree]:
        """Begin to read the examples at indices [k]; the function that comes back waits, and gives leaves [k, ...]."""
        bounds = np.linspace(0, len(indices), min(self._workers, len(indices)) + 1).astype(int)
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        submit: Callable[[slice], Future[Any]] = lambda part: self._pool.submit(  # noqa: E731
            self._read, indices[part], None if seeds is None else seeds[part]
        )
        waiting = [submit(part) for part in parts]
        return lambda: jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one.result() for one in waiting))

    def close(self) -> None:
        """End the threads; what is not begun is not read."""
        self._pool.shutdown(wait=False, cancel_futures=True)
