"""What the benchmarks run: four students, the images they see, and the hypergradient's arguments made of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.losses import LOSSES
from l2t_jax.students import STUDENTS
from l2t_jax.types import Batch, PyTree, Student, StudentState, Task
from l2t_jax.unroll import InnerLoss, OuterError, init_state, inner_objective, outer_objective

BATCH, VALIDATION = 25, 100
TASK = Task(optax.softmax_cross_entropy_with_integer_labels, lambda outputs, targets: {}, lambda data, *_: data)


class Workload(NamedTuple):
    """A student and the images it sees; random pixels, since no figure depends on what they show."""

    student: Callable[[], Student]
    shape: tuple[int, int, int]
    describe: str


def _wide() -> Student:
    return STUDENTS["resnet8"](num_classes=10, width=64, shortcut="b", head_grid=2)


WORKLOADS = {
    "w1": Workload(lambda: STUDENTS["resnet8"](num_classes=10, shortcut="b"), (32, 32, 3), "ResNet-8 16-32-64"),
    "w2": Workload(lambda: STUDENTS["lenet"](num_classes=10), (28, 28, 1), "LeNet-5"),
    "w3": Workload(lambda: STUDENTS["mlp"](num_classes=10), (28, 28, 1), "MLP 784-500-10"),
    "wide": Workload(_wide, (32, 32, 3), "ResNet-8 64-128-256 (released)"),
}


class Problem(NamedTuple):
    """The two objectives, and the arguments of a hypergradient; these lead with an axis of seeds if there are several.

    N unroll length, B batch, V validation batch.
    """

    inner: InnerLoss
    outer: OuterError
    optimizer: optax.GradientTransformation
    phi: PyTree
    state: StudentState
    batches: Batch  # [N, B, ...]
    validation: Batch  # [V, ...]


def problem(name: str, length: int, seeds: int = 1) -> Problem:
    """A workload, its loss the released DLN; the same arrays in every process."""
    workload, loss, optimizer = WORKLOADS[name], LOSSES["dln"](), optax.sgd(0.1)
    student, lead = workload.student(), () if seeds == 1 else (seeds,)
    batches = images(workload, *lead, length, BATCH)
    validation = images(workload, *lead, VALIDATION, seed=1)
    example = jnp.zeros((BATCH, *workload.shape))

    def start(key: jax.Array) -> tuple[PyTree, StudentState]:
        theta, phi = jax.random.split(key)
        return loss.init(phi), init_state(student.init(theta, example), optimizer)

    keys = jax.random.split(jax.random.key(0), seeds)
    phi, state = start(keys[0]) if seeds == 1 else jax.vmap(start)(keys)
    inner, outer = inner_objective(student, loss), outer_objective(student, TASK)
    return Problem(inner, outer, optimizer, phi, state, batches, validation)


def images(workload: Workload, *lead: int, seed: int = 0) -> Batch:
    """Random images [*lead, H, W, c] and their classes [*lead]."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((*lead, *workload.shape), dtype=np.float32)
    return Batch(jnp.asarray(inputs), jnp.asarray(random.integers(0, 10, lead), jnp.int32))
