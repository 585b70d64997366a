"""Classification: cross entropy as the outer error, accuracy as the metric. Of images, or of any features.

Legend: B batch, C classes, n examples, H and W height and width in pixels, c channels or features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import DataError, Dataset, read_tfds, require
from l2t_jax.data.augment import resized_crop
from l2t_jax.data.images import ELEMENTS, Stored, decode, named, objects
from l2t_jax.data.tfds import labels_of, open_tfds
from l2t_jax.losses import check_classes
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.tasks.evaluation import measure_errors
from l2t_jax.tasks.reading import Seeds
from l2t_jax.tasks.spec import TaskSpec
from l2t_jax.types import Array, Batch, Key, PyTree, Student, Task, means

_PADDING = 4  # pixels on each side before the random crop
IMAGENET_CLASSES = 1000
SCORED = 100  # images of a larger set that are scored at once


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is known of a set of examples in classes. `mean` and `std` are of the last axis of inputs, in raw units."""

    num_classes: int  # C
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False  # whether training images are cropped and flipped at random
    crop: int = 0  # side in pixels of the squares that are cut from images of any size; 0: images are read as they are
    names: tuple[str | int, ...] = ()  # of the classes, as labels have them; (): 0, 1, ...


def classification(dataset: Dataset, *, crop: int = 0) -> Task:
    """Build the task of a data set.

    error(z, y) = -log softmax(z)_y and accuracy = [argmax z = y], for each example;
    an input is (value - mean) / std, per channel or feature.

    Images that are objects [n] (files, or places in a prepared set) are read on the host, while the device computes.

    Args:
      dataset: gives its `Classes`; its images are not kept.
      crop: side in pixels of the squares that are cut from images: in training of a random part, mirrored at random, as
        Szegedy et al. 2015; else the middle. 0: what suits the data set.

    Returns:
      A task whose `gather(data, indices, keys)` reads {"inputs": uint8 or float32 [n, ..., c], "labels": int32 [n]}
      (and, where labels are wrong and the right ones are known, "true": int32 [n]; where examples count more or less
      than others, "weight": float32 [n]) at indices of any shape [...] into a batch of inputs [..., ..., c] float32,
      targets [...] int32 and, if given, weights and true targets [...]. With keys [...], and where the data set asks
      for it, every image is cropped and flipped at random, as in He et al. 2016. Its error and metrics raise a
      ValueError where outputs and targets are none of classes (`losses.check_classes`).

    Raises:
      ValueError: the crop is negative, or inputs are no images of 8 bits.
    """
    info = dataset.info
    read = _reader(dataset, crop)
    mean, std = np.asarray(info.mean, np.float32), np.asarray(info.std, np.float32)

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        inputs = data["inputs"][indices]
        if keys is not None and draws:
            inputs = crop_and_flip(inputs, keys)
        true, weight = (data[leaf][indices] if leaf in data else () for leaf in ("true", "weight"))
        return Batch((inputs.astype(jnp.float32) - mean) / std, data["labels"][indices], weight=weight, true=true)

    draws = info.augment and not crop  # what the host reads by a crop has been altered there
    task = Task(cross_entropy, _metrics, gather, outputs=info.num_classes, draws=draws, read=read)
    if read is not None:
        task = task._replace(scored_at_once=SCORED)

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        return {**measure_errors(task, student, variables, batch), "class": batch.targets}

    names = [str(name) for name in info.names or range(info.num_classes)]
    return task._replace(measure=measure, score=partial(_score, names))


def _reader(dataset: Dataset, crop: int) -> Callable[[PyTree, np.ndarray, Seeds], PyTree] | None:
    """The `Task.read` of a set of images; None where they lie in memory as a student sees them.

    Images that are cropped, or are objects, get three channels.
    """
    inputs, name = dataset.train["inputs"], dataset.name
    if crop < 0:
        raise ValueError(f"crop={crop} is negative: give a number of pixels, or 0 for what suits the data set.")
    if crop and inputs.dtype != object and (inputs.dtype != np.uint8 or inputs.ndim != 4):
        raise ValueError(f"crop={crop} is of images of 8 bits, and inputs are {inputs.dtype} {list(inputs.shape[1:])}.")
    side = crop or dataset.info.crop
    if inputs.dtype != object and not side:
        return None

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        images: list[np.ndarray] = []
        for place, i in enumerate(indices):
            element = examples["inputs"][i]
            try:
                image = decode(element, f"{name}, example {i}")
            except DataError as error:
                skip = ", or give --skip_broken" if isinstance(element, Path) else ""
                raise DataError(f"{str(error).rstrip('.')}: mend it{skip}.") from error
            if side:
                image = resized_crop(image, side, None if seeds is None else np.random.default_rng(seeds[place]))
            elif images and image.shape != images[0].shape:
                told = [named(examples["inputs"][j], f"{name}, example {j}") for j in (indices[0], i)]
                raise DataError(
                    f"{told[1]} is {image.shape[0]}x{image.shape[1]} and {told[0]} {images[0].shape[0]}x"
                    f"{images[0].shape[1]}: cut squares from them by --crop=SIDE."
                )
            images.append(image)
        return {**{leaf: x[indices] for leaf, x in examples.items()}, "inputs": np.stack(images)}

    return read


def _score(names: Sequence[str], measured: PyTree) -> dict[str, float]:
    """Means over the examples; and the accuracy of each class that occurs, and the mean of these."""
    right, classes = np.asarray(measured["accuracy"], np.float64), np.asarray(measured["class"])
    of_class = {name: float(right[classes == i].mean()) for i, name in enumerate(names) if (classes == i).any()}
    return {
        **means({name: value for name, value in measured.items() if name != "class"}),
        "balanced accuracy": float(np.mean(list(of_class.values()))),
        **{f"accuracy of {name}": value for name, value in of_class.items()},
    }


def _metrics(outputs: Array, targets: Array) -> dict[str, Array]:
    check_classes(outputs, targets)
    return {"accuracy": (outputs.argmax(-1) == targets).astype(outputs.dtype)}


def crop_and_flip(images: Array, keys: Key) -> Array:
    """Pad each image by 4 pixels, crop it back at a random place, and mirror every second one on average.

    Args:
      images: [..., H, W, c], raw pixels.
      keys: [...], one for each image, so that how a batch is divided over devices changes nothing.

    Returns:
      Images of the same shape and dtype.

    Source: He et al. 2016, section 4.2. Whether the padding is black or the mean colour is not stated: raw
    pixels of 0 here, before normalisation, as in torchvision's RandomCrop.
    """
    chex.assert_shape(keys, images.shape[:-3])
    shape = images.shape[-3:]  # H, W, c

    def one(image: Array, key: Key) -> Array:
        corner_key, flip_key = jax.random.split(key)
        row, column = jax.random.randint(corner_key, (2,), 0, 2 * _PADDING + 1)
        padded = jnp.pad(image, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
        cropped = jax.lax.dynamic_slice(padded, (row, column, 0), shape)
        return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)

    return jax.vmap(one)(images.reshape(-1, *shape), keys.reshape(-1)).reshape(images.shape)


def check(dataset: Dataset) -> None:
    """Check dtypes, shapes, labels, and that every class occurs in training.

    Raises:
      DataError: names the first thing that is wrong.
    """
    name, info = dataset.name, dataset.info
    require(isinstance(info, Classes), f"{name}: info is a {type(info).__name__}, expected an Classes.")
    classes = info.num_classes
    require(isinstance(classes, int) and classes >= 2, f"{name}: num_classes={classes}, expected 2 or more.")
    _check_part(f"{name} train", dataset.train, classes)
    _check_part(f"{name} test", dataset.test, classes)
    shape, test_shape = (_shape(part["inputs"]) for part in (dataset.train, dataset.test))
    require(shape == test_shape, f"{name}: train inputs are {shape} and test inputs {test_shape}.")
    require(info.crop >= 0, f"{name}: crop={info.crop}, expected a number of pixels, or 0.")
    require(not info.augment or len(shape) == 3, f"{name}: inputs are {shape}: only images [H, W, c] can be cropped.")
    absent = np.setdiff1d(np.arange(classes), dataset.train["labels"])
    require(not absent.size, f"{name}: classes {absent.tolist()} have no training example; all need one.")
    sizes = np.shape(info.mean), np.shape(info.std)
    require(
        sizes == ((shape[-1],),) * 2 and bool(np.all(np.isfinite(info.mean)) and np.all(_positive(info.std))),
        f"{name}: mean {info.mean} and std {info.std} must have one finite value for each of {shape[-1]} channels or "
        "features, and every std must be positive.",
    )


def _shape(inputs: np.ndarray) -> tuple[int | str, ...]:
    """Of an input; of images that are read when they are needed only the channels are known."""
    return ("any", "any", 3) if inputs.dtype == object else inputs.shape[1:]


def _check_part(part: str, examples: dict[str, np.ndarray], num_classes: int) -> None:
    missing = {"inputs", "labels"} - set(examples)
    require(not missing, f"{part}: there are no {', '.join(sorted(missing))}.")
    inputs = examples["inputs"]
    if inputs.dtype == object and inputs.ndim == 1:
        wrong_kind = [i for i, element in enumerate(inputs) if not isinstance(element, ELEMENTS)]
        require(not wrong_kind, f"{part}: the input at index {wrong_kind[:1]} is no image: expected files or bytes.")
    else:
        require(
            inputs.dtype in (np.uint8, np.float32) and inputs.ndim >= 2,
            f"{part}: inputs are {inputs.dtype} {inputs.shape}, expected uint8 or float32 [n, ..., c].",
        )
        finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
        require(
            bool(finite.all()),
            f"{part}: the input at index {np.argmin(finite)} is not finite ({np.sum(~finite)} such): leave it out.",
        )
    if (weight := examples.get("weight")) is not None:
        good = weight.dtype == np.float32 and weight.ndim == 1 and np.all(np.isfinite(weight)) and np.all(weight >= 0)
        require(bool(good and weight.any()), f"{part}: weights are none: expected float32 [n], at least 0, not all 0.")
    for field in ("labels", "true"):
        if field not in examples:
            continue
        labels, what = examples[field], "label" if field == "labels" else "true label"
        found = f"{labels.dtype} {labels.shape}"
        require(labels.dtype == np.int32 and labels.ndim == 1, f"{part}: {what}s are {found}, expected int32 [n].")
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if wrong.size:
            raise DataError(
                f"{part}: {what} {labels[wrong[0]]} at index {wrong[0]} is outside 0..{num_classes - 1} "
                f"({wrong.size} such labels): correct the labels or num_classes."
            )


def _positive(std: tuple[float, ...]) -> np.ndarray:
    return np.isfinite(std) & (np.asarray(std) > 0)


def load_digits(data_dir: Path, download: bool) -> Dataset:
    """Load the 1797 digits of 8x8 pixels, values 0..16, of scikit-learn; both arguments are unused.

    The split is ours, for there is no official one, and always the same: the examples are shuffled with
    seed 0, sorted stably by class, and every fifth is a test example, so that every class gives a fifth of
    its examples, within one. 1437 train, 360 test, each in scikit-learn's order.

    Source: Alpaydin & Kaynak 1998 (UCI Optical Recognition of Handwritten Digits, its test part).
    """
    from sklearn.datasets import load_digits as sklearn_digits  # slow to import

    images, labels = sklearn_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.zeros(len(labels), bool)
    test[order[np.argsort(labels[order], kind="stable")][::5]] = True
    train_inputs = images[~test]
    mean, std = (float(train_inputs.mean()),), (float(train_inputs.std()),)
    train, held = ({"inputs": images[part], "labels": labels[part]} for part in (~test, test))
    return Dataset("digits", train, held, Classes(10, mean, std, augment=False))


def _tfds(
    name: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...], augment: bool
) -> Callable[[Path, bool], Dataset]:
    def load(data_dir: Path, download: bool) -> Dataset:
        train, test = read_tfds(data_dir, download, name, ("train", "test"), _stack)
        return Dataset(name, train, test, Classes(num_classes, mean, std, augment))

    return load


def load_imagenet(data_dir: Path, download: bool) -> Dataset:
    """Open ImageNet as TFDS prepares it; its images are read when they are needed."""
    name, mean, std = "imagenet2012", _raw(0.485, 0.456, 0.406), _raw(0.229, 0.224, 0.225)
    found = open_tfds(data_dir, download, name)
    train, test = (
        {"inputs": objects(Stored(records, i, "image") for i in range(len(records))), "labels": labels_of(records)}
        for records in found
    )
    names = found[0].classes("label")
    return Dataset(name, train, test, Classes(IMAGENET_CLASSES, mean, std, crop=224, names=names))


def _stack(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    labels = np.array([record["label"] for record in records], np.int32)
    return {"inputs": np.stack([record["image"] for record in records]), "labels": labels}


def _raw(*values: float) -> tuple[float, ...]:
    """From the customary scale of 0..1 to that of the pixels."""
    return tuple(255 * v for v in values)


# CIFAR-10's mean and std are those of the released code of L2T-DLN, the others the customary ones. All are of the
# whole training set, not of the training part an epoch draws.
DATASETS: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": load_digits,
    "mnist": _tfds("mnist", 10, _raw(0.1307), _raw(0.3081), augment=False),
    "fashion_mnist": _tfds("fashion_mnist", 10, _raw(0.2860), _raw(0.3530), augment=False),
    "cifar10": _tfds("cifar10", 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), augment=True),
    "cifar100": _tfds("cifar100", 100, _raw(0.5071, 0.4865, 0.4409), _raw(0.2673, 0.2564, 0.2762), augment=True),
    "imagenet2012": load_imagenet,
}

CLASSIFICATION = TaskSpec(
    build=classification,
    datasets=DATASETS,
    check=check,
    strata=lambda dataset: dataset.train["labels"],
    defaults={"dataset": "digits", "student": "mlp"},
)
