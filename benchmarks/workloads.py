"""What the benchmarks run: four students, the images they see, and the hypergradient's arguments made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import Dataset
from l2t_jax.data.order import Plan
from l2t_jax.losses import LOSSES
from l2t_jax.methods.l2t_dln import STAGES, l2t_dln
from l2t_jax.runs.parallel import Dispatch
from l2t_jax.students import STUDENTS
from l2t_jax.students.precision import in_bfloat16
from l2t_jax.tasks.classification import Classes, classification
from l2t_jax.teachers import TEACHERS
from l2t_jax.types import Batch, How, Method, MethodState, PyTree, Student, StudentState, Task, Teacher
from l2t_jax.unroll import InnerLoss, OuterError, init_state, inner_objective, outer_objective

BATCH, VALIDATION, EXAMPLES = 25, 100, 10_000
TASK = Task(optax.softmax_cross_entropy_with_integer_labels, lambda outputs, targets: {}, lambda data, *_: data)


class Workload(NamedTuple):
    """A student and the images it sees; random pixels, since no figure depends on what they show."""

    student: Callable[[str | None], Student]  # of the mapped axis over which batches are divided, if any
    shape: tuple[int, int, int]
    describe: str


def _resnet8(**options: Any) -> Callable[[str | None], Student]:
    return lambda axis_name: STUDENTS["resnet8"](num_classes=10, shortcut="b", axis_name=axis_name, **options)


WORKLOADS = {
    "w1": Workload(_resnet8(), (32, 32, 3), "ResNet-8 16-32-64"),
    "w2": Workload(lambda _: STUDENTS["lenet"](num_classes=10), (28, 28, 1), "LeNet-5"),
    "w3": Workload(lambda _: STUDENTS["mlp"](num_classes=10), (28, 28, 1), "MLP 784-500-10"),
    "wide": Workload(_resnet8(width=64, head_grid=2), (32, 32, 3), "ResNet-8 64-128-256 (released)"),
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


def problem(name: str, length: int, seeds: int = 1, compute_dtype: str = "float32") -> Problem:
    """A workload, its loss the released DLN; the same arrays in every process."""
    workload, loss, optimizer = WORKLOADS[name], LOSSES["dln"](), optax.sgd(0.1)
    student, lead = workload.student(None), () if seeds == 1 else (seeds,)
    student = in_bfloat16(student) if compute_dtype == "bfloat16" else student
    batches = images(workload, *lead, length, BATCH)
    validation = images(workload, *lead, VALIDATION, seed=1)
    example = jnp.zeros((BATCH, *workload.shape))

    def start(key: jax.Array) -> tuple[PyTree, StudentState]:
        theta, phi = jax.random.split(key)
        return loss.init(phi), init_state(student.init(theta, example), optimizer)

    keys = jax.random.split(jax.random.key(0), seeds)
    phi, state = start(keys[0]) if seeds == 1 else jax.vmap(start)(keys)
    inner, outer = inner_objective(student, TASK, loss), outer_objective(student, TASK)
    return Problem(inner, outer, optimizer, phi, state, batches, validation)


class Teaching(NamedTuple):
    """L2T-DLN on a workload, as in training: uint8 images of 10 000 examples, cropped and flipped where coloured."""

    method: Method
    task: Task
    data: dict[str, np.ndarray]
    plan: Plan

    def dispatch(self, seed: int) -> Dispatch:
        """The input of all rounds of a seed."""
        rounds = np.arange(self.plan.rounds, dtype=np.int32)
        orders = [self.plan.indices(seed, int(r)) for r in rounds]
        train, validation = (np.stack([order[i] for order in orders]) for i in (0, 1))
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return Dispatch(train, validation, rounds, np.zeros(len(rounds), bool), np.int32(len(rounds)), key)

    def state(self, seed: int) -> MethodState:
        """The beginning."""
        shape = self.data["inputs"].shape[1:]
        return self.method.init(jax.random.key(seed), jnp.zeros((2, *shape)))


def teaching(
    name: str,
    length: int,
    rounds: int,
    *,
    teacher: Teacher | None = None,
    second_stage: str = "continue",
    axis_name: str | None = None,
    batch: int = BATCH,
    validation: int = VALIDATION,
    **how: Unpack[How],
) -> Teaching:
    """Rounds of L2T-DLN on a workload; the same arrays in every process."""
    workload, random = WORKLOADS[name], np.random.default_rng(0)
    channels = workload.shape[-1]
    images = random.integers(0, 256, (EXAMPLES, *workload.shape), np.uint8)
    labels = random.integers(0, 10, EXAMPLES, np.int32)
    half = (127.5,) * channels
    data = {"inputs": images, "labels": labels}
    task = classification(Dataset("random", data, data, Classes(10, half, half, augment=channels == 3)))
    method = l2t_dln(
        workload.student(axis_name),
        task,
        LOSSES["dln"](),
        teacher or TEACHERS["lstm"](1e-3),
        optax.sgd(0.1),
        optax.adam(1e-3),
        second_stage=second_stage,
        axis_name=axis_name,
        **how,
    )
    plan = Plan(rounds, length, batch, validation, 0.5, EXAMPLES, STAGES[second_stage])
    return Teaching(method, task, data, plan)


def images(workload: Workload, *lead: int, seed: int = 0) -> Batch:
    """Random images [*lead, H, W, c] and their classes [*lead]."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((*lead, *workload.shape), dtype=np.float32)
    return Batch(jnp.asarray(inputs), jnp.asarray(random.integers(0, 10, lead), jnp.int32))
