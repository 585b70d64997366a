"""Tasks: gathering, augmentation, and exact means over a set."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from altered import altered

from l2t_jax.data import DataError, Dataset
from l2t_jax.students import STUDENTS
from l2t_jax.tasks import TASKS, evaluate, measure_all
from l2t_jax.tasks.classification import Classes, classification, crop_and_flip
from l2t_jax.types import Student, Task

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (37, 6, 5, 3)).astype(np.uint8)  # no zeros: those are padding
LABELS = RNG.integers(0, 4, 37).astype(np.int32)
MEAN, STD = (100.0, 120.0, 80.0), (50.0, 60.0, 70.0)
PART = {"inputs": IMAGES, "labels": LABELS}
DATASET = Dataset("made", PART, PART, Classes(4, MEAN, STD, augment=True))
DATA = {"inputs": jnp.asarray(IMAGES), "labels": jnp.asarray(LABELS)}


@pytest.fixture(scope="module")
def task() -> Task:
    return classification(DATASET)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("x64", [False, True])
def test_gather_normalises_each_channel(task: Task, shape: tuple[int, ...], x64: bool) -> None:
    indices = RNG.integers(0, 37, shape)
    with jax.enable_x64(x64):
        batch = jax.jit(task.gather)(DATA, indices, None)
    assert batch.inputs.dtype == jnp.float32 and batch.targets.dtype == jnp.int32
    np.testing.assert_allclose(batch.inputs, (IMAGES[indices] - np.array(MEAN)) / np.array(STD), atol=1e-6)
    np.testing.assert_array_equal(batch.targets, LABELS[indices])


def test_error_and_accuracy_are_unreduced(task: Task) -> None:
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 1.0]])
    expected = [-np.log(np.exp(z[y]) / np.exp(z).sum()) for z, y in zip(np.asarray(logits), (1, 1), strict=True)]
    np.testing.assert_allclose(task.error(logits, jnp.array([1, 1])), expected, rtol=1e-6)
    assert task.metrics(logits, jnp.array([1, 1]))["accuracy"].tolist() == [0.0, 1.0]


def all_crops(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Every image that padding by 4, cropping and mirroring can make, and how."""
    h, w, _ = image.shape
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = {}
    for i in range(9):
        for j in range(9):
            crop = padded[i : i + h, j : j + w]
            crops[crop.tobytes()] = (i, j, False)
            crops[crop[:, ::-1].tobytes()] = (i, j, True)
    return crops


def test_every_crop_is_one_of_the_padded_image_and_all_occur() -> None:
    image = IMAGES[0]
    crops = all_crops(image)
    assert len(crops) == 2 * 9 * 9
    many = jnp.broadcast_to(image, (3, 700, *image.shape))
    made = np.asarray(jax.jit(crop_and_flip)(many, jax.random.split(jax.random.key(1), (3, 700))))
    assert made.shape == many.shape and made.dtype == np.uint8
    found = [crops[one.tobytes()] for one in made.reshape(-1, *image.shape)]  # KeyError: not a crop
    assert len(set(found)) > 155  # 2100 draws of 162, each missed with probability 2e-6
    assert 0.4 < np.mean([flip for _, _, flip in found]) < 0.6


def test_augmentation_depends_on_the_key_and_on_nothing_else(task: Task) -> None:
    gather, indices = jax.jit(task.gather), np.arange(12).reshape(3, 4)
    one, same, other = (gather(DATA, indices, jax.random.split(jax.random.key(k), (3, 4))).inputs for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    plain = gather(DATA, indices, None).inputs
    assert (one != plain).mean() > 0.5


def test_padding_is_black_before_normalisation(task: Task) -> None:
    inputs = np.asarray(jax.jit(task.gather)(DATA, np.zeros(50, int), jax.random.split(jax.random.key(0), 50)).inputs)
    raw = np.rint(inputs * STD + MEAN).astype(np.uint8)
    crops = all_crops(IMAGES[0])
    assert all(one.tobytes() in crops for one in raw)
    np.testing.assert_allclose(
        inputs[(raw == 0).all(-1)], np.broadcast_to(-np.array(MEAN) / STD, ((raw == 0).all(-1).sum(), 3)), rtol=1e-5
    )


def test_data_that_ask_for_no_augmentation_get_none() -> None:
    task = classification(altered(DATASET, augment=False))
    plain, keyed = (
        task.gather(DATA, np.arange(5), key).inputs for key in (None, jax.random.split(jax.random.key(0), 5))
    )
    np.testing.assert_array_equal(plain, keyed)


@pytest.fixture(scope="module")
def linear() -> tuple[Student, dict]:
    student = STUDENTS["mlp"](num_classes=4, width=3)
    params = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 6, 5, 3)))["params"]
    drawn = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), params)
    return student, {"params": drawn, "batch_stats": {}}


@pytest.mark.parametrize("batch_size", [37, 10, 36, 1, 1000])
def test_evaluation_is_exact_for_any_batch_size(task: Task, linear: tuple[Student, dict], batch_size: int) -> None:
    student, variables = linear
    batch = task.gather(DATA, np.arange(37), None)
    outputs, _ = student.apply(variables, batch.inputs, False)
    results = evaluate(student, variables, DATA, task, batch_size)
    np.testing.assert_allclose(results["accuracy"], (np.argmax(outputs, -1) == LABELS).mean(), rtol=1e-6)
    np.testing.assert_allclose(results["error"], task.error(outputs, LABELS).mean(), rtol=1e-5)
    assert set(results) == {
        "accuracy",
        "error",
        "balanced accuracy",
        *(f"accuracy of {label}" for label in set(LABELS)),
    }


def test_evaluation_uses_running_statistics_and_no_augmentation(task: Task) -> None:
    seen = []

    def apply(variables: dict, inputs: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        seen.append(train)
        return inputs.sum((1, 2, 3))[:, None] * variables["params"], variables["batch_stats"]

    results = evaluate(Student(lambda key, x: {}, apply), {"params": jnp.ones(4), "batch_stats": {}}, DATA, task, 8)
    np.testing.assert_allclose(results["error"], np.log(4), rtol=1e-5)
    assert seen and not any(seen)


def test_evaluation_maps_over_students(task: Task, linear: tuple[Student, dict]) -> None:
    student, variables = linear
    both = jax.tree.map(lambda a: jnp.stack([a, -a]), variables)
    results = jax.vmap(lambda v: measure_all(student, v, DATA, task, 10))(both)
    single = partial(evaluate, student, data=DATA, task=task, batch_size=10)
    one = [single(jax.tree.map(lambda a, i=i: a[i], both))["error"] for i in (0, 1)]
    np.testing.assert_allclose(results["error"].mean(1), one, rtol=1e-5)
    assert abs(one[0] - one[1]) > 1e-3


@pytest.mark.parametrize(
    ("task", "missing"),
    [("segmentation", "mask"), ("detection", "boxes"), ("translation", "target"), ("translation", "source")],
)
def test_data_without_a_field_of_the_task(task: str, missing: str) -> None:
    fields = {"image", "mask", "boxes", "classes", "crowd", "area", "source", "target"}
    whole = {field: np.zeros(2) for field in fields}
    part = {field: x for field, x in whole.items() if field != missing}
    with pytest.raises(DataError, match=f"^made test: there is no {missing}.$"):
        TASKS[task].check(Dataset("made", whole, part))
    with pytest.raises(DataError, match="made: info must be `"):
        TASKS[task].check(Dataset("made", whole, whole))
