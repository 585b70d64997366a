"""Metric learning: embeddings in which examples of a class are near each other, scored by recall on other classes.

Legend: B batch, D dimension of the embedding, C classes, n examples, m test examples, H and W height and width in
pixels, c channels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from l2t_jax.data import DataError, Dataset, require
from l2t_jax.data.augment import resized_crop
from l2t_jax.data.images import Stored, decode, objects
from l2t_jax.data.tfds import open_tfds
from l2t_jax.losses import embeddings as losses
from l2t_jax.losses.embeddings import READS, nca_values, on_sphere, pairs_of
from l2t_jax.tasks import classification, own
from l2t_jax.tasks.reading import Seeds
from l2t_jax.tasks.spec import TaskSpec
from l2t_jax.types import Array, Batch, Errors, Key, Metric, PyTree, Read, Student, Task

RECALLS = (1, 10, 100, 1000)
MANY = 2**24  # pairs of examples whose distances are computed at once
TAUGHT = tuple(losses.SIGNALS)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What is known of a set of examples in classes of which some train and the others test."""

    mean: tuple[float, ...]  # of the last axis of inputs, in raw units
    std: tuple[float, ...]
    augment: bool = False  # whether training images are cropped and mirrored at random
    side: int = 0  # of images that are read on the host, in pixels; 0: they are in memory, all of one size
    names: tuple[str | int, ...] = ()  # of the training classes
    tested: tuple[str | int, ...] = ()  # of the test classes, whose labels go on from there
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # part -> what -> how many


def metric_learning(
    dataset: Dataset,
    *,
    embedding: int = 32,
    per_class: int = 5,
    side: int = 0,
    loss: str = "triplet_mixture",
    validate: str = "examples",
    axis_name: str | None = None,
) -> Task:
    """Build the task of a set whose training and test classes are disjoint.

    A student's outputs are divided by their norm: the embedding. A loss is given all embeddings of a batch, that of all
    devices where a batch is divided. error = NCA, - log sum_p exp(-9 d_ap^2) / sum_{j != a} exp(-9 d_aj^2): a smooth
    form of what recall@1 counts, over the anchors that have a positive and a negative. A student is scored by recall@k,
    the share of test examples that have one of their class among the k nearest others of the test set.

    Args:
      dataset: gives its `Embedded`; {"inputs", "labels"} in memory, or {"image", "labels"} read on the host.
      embedding: D, dimension of the embedding: what the student puts out.
      per_class: examples of a class that stand together in a batch, as far as the classes have so many.
      side: images are resized to so many pixels; 0: what suits the data set.
      loss: triplet_mixture, margin_mixture or focal_triplet, what L2T-DLN and ALA teach.
      validate: examples, the validation part has other examples of the training classes; or classes, it has other
        classes, the same ones throughout a run.
      axis_name: mapped axis over which batches are divided, if any.
    Raises:
      ValueError: a knob is out of range.
      DataError: examples have weights, which pairs of them have not.
    Source: Wu et al. 2017 for classes that are disjoint, five of a class in a batch, and the score. The error is ours:
    a hypergradient needs one that is smooth, and ALA's reward is the recall itself.
    """
    info: Embedded = dataset.info
    if embedding < 1:
        raise ValueError(f"embedding={embedding} is no dimension: give at least 1.")
    if per_class < 2:
        raise ValueError(f"per_class={per_class}: a positive needs a second example of its class: give at least 2.")
    if side < 0:
        raise ValueError(f"side={side} is no size of an image in pixels: give a positive one, or 0.")
    if loss not in TAUGHT:
        raise ValueError(f"loss={loss} cannot be taught here: choose one of {', '.join(TAUGHT)}.")
    if validate not in ("examples", "classes"):
        raise ValueError(f"validate={validate}: choose examples or classes.")
    require("weight" not in dataset.train, f"{dataset.name}: examples have weights, and pairs of them have none.")
    mean, std = np.asarray(info.mean, np.float32), np.asarray(info.std, np.float32)
    stored = "image" in dataset.train
    side = side or info.side

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        images = []
        for place, i in enumerate(indices):
            image = decode(examples["image"][i], f"{dataset.name}, example {i}")
            images.append(resized_crop(image, side, None if seeds is None else np.random.default_rng(seeds[place])))
        return {"inputs": np.stack(images), "labels": examples["labels"][indices]}

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        inputs = data["inputs"][indices]
        if keys is not None and info.augment and not stored:
            inputs = classification.crop_and_flip(inputs, keys)
        inputs = inputs.astype(jnp.float32)
        if side and inputs.ndim >= 4 and inputs.shape[-3:-1] != (side, side):
            inputs = jax.image.resize(inputs, (*inputs.shape[:-3], side, side, inputs.shape[-1]), "linear")
        return Batch((inputs - mean) / std, data["labels"][indices])

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        outputs, _ = student.apply(variables, batch.inputs, False)
        return {"embedding": on_sphere(outputs), "label": batch.targets}

    return Task(
        error=partial(error, axis_name=axis_name),
        metrics=partial(_metrics, axis_name=axis_name),
        gather=gather,
        views=((READS, partial(view, axis_name=axis_name)),),
        measure=measure,
        score=_score,
        metric=Metric("recall@1", "%"),
        outputs=embedding,
        draws=info.augment and not stored,
        read=read if stored else None,
        together=per_class,
        apart=validate == "classes",
        loss=loss,
    )


def view(outputs: Array, targets: Array, *, axis_name: str | None = None) -> Read:
    """The view "embeddings": those of the whole batch, gathered from all devices, on each of them.

    All devices so compute the same values, whose mean over devices is the value; each device's gradient is D times the
    part of it that goes through its own examples, and their mean over D devices the gradient.
    """
    return losses.embeddings(*_whole(outputs, targets, axis_name))


def error(outputs: Array, targets: Array, *, axis_name: str | None = None) -> Errors:
    """The NCA loss of each example of the whole batch; 0 and of weight 0 for one that forms no triplet."""
    read = view(outputs, targets, axis_name=axis_name)
    return Errors(nca_values(pairs_of(read.outputs, read.targets)), read.weight)


def _metrics(outputs: Array, targets: Array, *, axis_name: str | None = None) -> dict[str, Array]:
    """Whether the nearest other example of the batch is of the same class; a tie is none."""
    read = view(outputs, targets, axis_name=axis_name)
    pairs = pairs_of(read.outputs, read.targets)
    nearest = lambda kind: jnp.min(jnp.where(kind > 0, pairs.distances, jnp.inf), axis=1)  # noqa: E731
    return {"recall@1": (nearest(pairs.same) < nearest(pairs.other)).astype(outputs.dtype)}


def _whole(outputs: Array, targets: Array, axis_name: str | None) -> tuple[Array, Array]:
    if axis_name is None:
        return outputs, targets
    outputs, targets = (lax.all_gather(x, axis_name, tiled=True) for x in (outputs, targets))
    return outputs, targets


# Scoring


def recalls(embeddings: np.ndarray, labels: np.ndarray, ranks: tuple[int, ...] = RECALLS) -> dict[str, float]:
    """recall@k: the share of examples that have one of their class among the k nearest others; those left out that all
    others are among.

    Args:
      embeddings: [m, D], on the unit sphere; each is a query to all the others.
      labels: [m].
      ranks: k.
    Returns:
      {"recall@k": share}; a wrong one as near as the nearest right one comes before it, so an embedding that puts all
      examples in one place has a recall of 0.
    """
    count = len(labels)
    order = np.argsort(labels, kind="stable")
    points, classes = np.asarray(embeddings, np.float32)[order], np.asarray(labels)[order]
    before = np.empty(count, np.int64)  # wrong ones that come before the nearest right one
    rows = max(1, MANY // count)
    for begin in range(0, count, rows):
        queries = np.arange(begin, min(begin + rows, count))
        likeness = points[queries] @ points.T
        same = classes[queries][:, None] == classes[None]
        right = same.copy()
        right[np.arange(len(queries)), queries] = False
        best = np.where(right, likeness, -np.inf).max(1, keepdims=True)
        before[queries] = (~same & (likeness >= best)).sum(1)
    return {f"recall@{k}": float(np.mean(before < k)) for k in ranks if k < count - 1 or k == 1}


def _score(measured: PyTree) -> dict[str, float]:
    return recalls(measured["embedding"], measured["label"])


# Data


def divide(dataset: Dataset, augment: bool = False) -> Dataset:
    """Divide the classes of a classification set: the first half trains, the others, from both its parts, test.

    Args:
      dataset: of `classification`.
      augment: whether training images are cropped and mirrored at random.
    Raises:
      DataError: there are fewer than four classes.
    """
    require(
        dataset.train["inputs"].dtype != object,
        f"{dataset.name}: images have several sizes, or are too many for memory: give this task images of one size.",
    )
    whole = {name: np.concatenate([dataset.train[name], dataset.test[name]]) for name in ("inputs", "labels")}
    return _divided(dataset.name, whole, dataset.info.names or tuple(range(dataset.info.num_classes)), augment)


def _divided(name: str, whole: dict[str, np.ndarray], names: tuple[str | int, ...], augment: bool = False) -> Dataset:
    require(
        len(names) >= 4,
        f"{name}: there {'are' if len(names) > 1 else 'is'} {len(names)} class{'es' if len(names) > 1 else ''}: "
        "expected at least 4, of which one half trains and the other tests.",
    )
    half = -(-len(names) // 2)
    first = whole["labels"] < half
    train, test = ({leaf: x[part] for leaf, x in whole.items()} for part in (first, ~first))
    return _dataset(name, train, test, names[:half], names[half:], augment)


def _dataset(
    name: str,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    names: tuple[str | int, ...],
    tested: tuple[str | int, ...],
    augment: bool = False,
) -> Dataset:
    info = Embedded(*own.moments(train["inputs"]), augment=augment, names=names, tested=tested)
    return Dataset(name, train, test, info)


def open_path(path: Path) -> Dataset:
    """A folder of class folders, or with such folders in train/ and test/; or an .npz or a .csv of `own`.

    Of a folder without train/ and test/ the first half of its classes trains, in the order of their names.

    Raises:
      DataError: there is none, an image cannot be read, images differ in size, or there are too few classes.
    """
    require(path.exists(), f"{path} is not there: give a folder of class folders, an .npz or a .csv.")
    if not path.is_dir():
        return divide(own.open_path(path))
    parts = [(path / word) for word in ("train", "test")]
    if not all(part.is_dir() for part in parts):
        files, labels = own.image_files(path)
        classes, of = np.unique(labels, return_inverse=True)
        whole = {"inputs": own.read_images(files), "labels": of.astype(np.int32)}
        return _divided(str(path), whole, tuple(classes.tolist()))
    found = [own.image_files(part) for part in parts]
    names = [tuple(np.unique(labels).tolist()) for _, labels in found]
    both = sorted(set(names[0]) & set(names[1]))
    require(not both, f"{path}: class {both[0] if both else ''} is in train and in test: expected other classes there.")
    inputs = own.read_images([*found[0][0], *found[1][0]])
    every = names[0] + names[1]
    places = [np.array([every.index(label) for label in labels], np.int32) for _, labels in found]
    count = len(places[0])
    train, test = ({"inputs": x, "labels": y} for x, y in zip((inputs[:count], inputs[count:]), places, strict=True))
    return _dataset(str(path), train, test, names[0], names[1])


def check(dataset: Dataset) -> None:
    """Check that both parts have examples of two or more classes, two of each, and share no class.

    Raises:
      DataError: names what is wrong.
    """
    require(isinstance(dataset.info, Embedded), f"{dataset.name}: info must be `Embedded`.")
    named = (*dataset.info.names, *dataset.info.tested)
    seen = []
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        require(
            "labels" in examples and ("inputs" in examples or "image" in examples),
            f"{dataset.name} {part}: expected labels, and inputs or images.",
        )
        classes, counts = np.unique(examples["labels"], return_counts=True)
        require(
            len(classes) >= 2,
            f"{dataset.name} {part}: there is one class: expected two or more, or nothing is to be told apart.",
        )
        alone = classes[counts < 2]
        called = str(named[alone[0]] if alone.size and alone[0] < len(named) else alone[:1])
        require(
            not alone.size,
            f"{dataset.name} {part}: class {called} has one example ({alone.size} such): "
            "a positive needs a second one: leave the class out.",
        )
        seen.append(set(classes.tolist()))
    both = sorted(seen[0] & seen[1])
    require(not both, f"{dataset.name}: class {both[:1]} trains and tests: expected other classes to test on.")


def _classified(name: str) -> Callable[[Path, bool], Dataset]:
    """A set of `classification` with its classes divided."""

    def load(data_dir: Path, download: bool) -> Dataset:
        dataset = classification.DATASETS[name](data_dir, download)
        return divide(dataset, dataset.info.augment)

    return load


def stanford_online_products(data_dir: Path, download: bool) -> Dataset:
    """Load Stanford Online Products from TFDS: 59 551 training images of 11 318 products, 60 502 of 11 316 others.

    Images are read when they are asked for, and are of several sizes.

    Raises:
      DataError: it is not there, or has other fields.
    """
    name = "stanford_online_products"
    parts: list[dict[str, np.ndarray]] = []
    classes: list[tuple[int, ...]] = []
    for records in open_tfds(data_dir, download, name):
        missing = {"image", "class_id"} - set(records.fields)
        if missing:
            raise DataError(f"{records.name} has {', '.join(records.fields)}: expected image and class_id.")
        labels = np.array([record["class_id"] for record in records], np.int64)
        names, places = np.unique(labels, return_inverse=True)
        images = objects(Stored(records, i, "image") for i in range(len(records)))
        parts.append({"image": images, "labels": places.astype(np.int32)})
        classes.append(tuple(names.tolist()))
    parts[1]["labels"] += np.int32(len(classes[0]))
    info = Embedded(MEAN, STD, augment=True, side=SIDE, names=classes[0], tested=classes[1])
    return Dataset(name, parts[0], parts[1], info)


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's pixels, per channel
SIDE = 224  # of images of Stanford Online Products, in pixels

METRIC_LEARNING = TaskSpec(
    build=metric_learning,
    datasets={
        **{name: _classified(name) for name in classification.DATASETS},
        "stanford_online_products": stanford_online_products,
    },
    open=open_path,
    check=check,
    strata=lambda dataset: dataset.train["labels"],
    classes=False,
    loss="triplet_mixture",
    baseline="triplet",
    defaults={"dataset": "digits", "student": "mlp"},
    # Losses of so few parameters are moved by steps of Adam, on which the LSTM learns; alone it moved them by 1e-3.
    settings={"batch_size": 50, "unroll_length": 5, "base": "adam", "dln_lr": 0.05},
)
