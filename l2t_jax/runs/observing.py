"""What a student does with wrong labels while it is trained: whether it learns them, and how strongly they pull.

Legend: E examples looked at, C classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.runs.setting import Setting
from l2t_jax.tasks.reading import batch_at
from l2t_jax.types import Array, Batch, Method, MethodState, PyTree

EXAMPLES = 1000  # of the corrupted training part, the first ones in its random order; always the same
TOGETHER = 100  # examples of one pull, a validation batch's worth


class Observer:
    """Looks at a state of a method, on training examples of which it is known whether their label is wrong.

    memorised: share of the examples with a wrong label whose wrong label is predicted.
    recovered: share of them whose true class is predicted.
    fitted: share of the examples with a right label that are predicted right.
    wrong_pull: share of the pull on the student (`Method.pull`) that is of examples with a wrong label; where every
      example pulls equally it is the share of wrong labels. Not given for a method without `pull`.
    """

    def __init__(self, setting: Setting, method: Method) -> None:
        """Take the examples; compiles one function for all states of the method."""
        dataset, task, student = setting.dataset, setting.parts.task, setting.parts.student
        kept = dataset.examples - dataset.meta
        batch = batch_at(task, dataset.train, np.arange(min(EXAMPLES, kept)))
        validation = batch_at(task, dataset.train, validation_examples(setting))

        def look(state: MethodState, batch: Batch, validation: Batch) -> dict[str, Array]:
            outputs, _ = student.apply(state.student.variables, batch.inputs, False)
            predicted = outputs.argmax(-1)
            wrong = jnp.not_equal(batch.targets, jnp.asarray(batch.true))  # [E]
            right = ~wrong
            observed = {
                "memorised": _share(predicted == batch.targets, wrong),
                "recovered": _share(predicted == jnp.asarray(batch.true), wrong),
                "fitted": _share(predicted == batch.targets, right),
            }
            if method.pull is not None:
                pulls = _pulls(method, state, batch, validation)
                observed["wrong_pull"] = jnp.sum(pulls * wrong[: len(pulls)]) / jnp.sum(pulls)
            return observed

        seen = alone(setting, look)
        self._look = jax.jit(lambda state: seen(state, batch, validation))
        self._steps_per_round = setting.parts.plan.of(method.stages).unroll_length * method.steps_per_round

    def __call__(self, seed: int, done: int, state: PyTree) -> dict[str, float]:
        """Observe the state after so many rounds."""
        values = {name: float(np.ravel(value)[0]) for name, value in self._look(state).items()}
        return {"student_steps": done * self._steps_per_round, **values}


def validation_examples(setting: Setting) -> np.ndarray:
    """Examples that stand for a validation batch: the meta set's; without one they are as wrong as the others."""
    n = setting.dataset.examples
    return np.arange(n - setting.parts.plan.validation_batch_size, n)


def alone(setting: Setting, look: Callable[..., Any]) -> Callable[..., Any]:
    """What looks at a state, on one device: there a method's means over the devices are means over one."""
    axis = setting.layout.axis_name
    return look if axis is None else jax.vmap(look, in_axes=None, axis_size=1, axis_name=axis)


def _pulls(method: Method, state: MethodState, batch: Batch, validation: Batch) -> Array:
    """The pull of each example, in batches of `TOGETHER`, since a method may weigh an example by its batch."""
    assert method.pull is not None
    count = max(1, len(batch.targets) // TOGETHER)
    size = min(TOGETHER, len(batch.targets))
    parts = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), batch)
    return jax.lax.map(lambda part: method.pull(state, part, validation), parts).reshape(-1)


def _share(what: Array, among: Array) -> Array:
    return jnp.sum(what & among) / jnp.sum(among)
