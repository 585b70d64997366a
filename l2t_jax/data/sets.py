"""Data sets as arrays. NumPy only.

Legend: n examples, H and W height and width in pixels, c channels.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

_READ_BATCH = 2000  # records a TFDS read; one at a time is several times slower


class DataError(ValueError):
    """Data that are missing, unreadable or not what their name promises."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set in memory. `mean` and `std` are per channel, in raw pixel units."""

    name: str
    train_images: np.ndarray  # [n, H, W, c] uint8
    train_labels: np.ndarray  # [n] int32
    test_images: np.ndarray  # [n, H, W, c] uint8
    test_labels: np.ndarray  # [n] int32
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool  # whether training images are cropped and flipped at random
    true_labels: np.ndarray | None = None  # [n] int32, where the training labels were corrupted: what they were before
    meta: int = 0  # so many of the last training examples are a clean meta set, never trained on

    @property
    def training(self) -> dict[str, np.ndarray]:
        """The training examples as `Task.gather` reads them."""
        given = {"images": self.train_images, "labels": self.train_labels}
        return given if self.true_labels is None else given | {"true": self.true_labels}

    @property
    def test(self) -> dict[str, np.ndarray]:
        """The test examples as `Task.gather` reads them."""
        return {"images": self.test_images, "labels": self.test_labels}

    @property
    def sha256(self) -> str:
        """The hash of all images and labels, shapes and dtypes included."""
        digest = hashlib.sha256()
        for array in (*self.training.values(), *self.test.values()):
            digest.update(f"{array.shape} {array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(name: str, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Load and check a data set.

    Args:
      name: one of `DATASETS`.
      data_dir: where prepared TFDS data lie; by default the environment's TFDS_DATA_DIR, else
        ~/tensorflow_datasets. "digits" comes with scikit-learn and needs none.
      download: whether to download and prepare data that are missing, which needs TensorFlow and a network.

    Returns:
      The data set, all of it in memory.

    Raises:
      DataError: the name is unknown, or the data are missing, unreadable or not valid.
    """
    if name not in DATASETS:
        raise DataError(f"There is no data set {name!r}: use one of {', '.join(sorted(DATASETS))}.")
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    dataset = DATASETS[name](Path(data_dir or default).expanduser(), download)
    check(dataset)
    return dataset


def check(dataset: Dataset) -> None:
    """Check dtypes, shapes, labels, that every class occurs in training, and the size of a meta set.

    Raises:
      DataError: names the first thing that is wrong.
    """
    classes = dataset.num_classes
    _require(isinstance(classes, int) and classes >= 2, f"{dataset.name}: num_classes={classes}, expected 2 or more.")
    _check_part(f"{dataset.name} train", dataset.train_images, dataset.train_labels, dataset.num_classes)
    _check_part(f"{dataset.name} test", dataset.test_images, dataset.test_labels, dataset.num_classes)
    shape, test_shape = dataset.train_images.shape[1:], dataset.test_images.shape[1:]
    _require(shape == test_shape, f"{dataset.name}: train images are {shape} and test images {test_shape}.")
    absent = np.setdiff1d(np.arange(dataset.num_classes), dataset.train_labels)
    _require(not absent.size, f"{dataset.name}: classes {absent.tolist()} have no training example; all need one.")
    sizes = np.shape(dataset.mean), np.shape(dataset.std)
    _require(
        sizes == ((shape[-1],),) * 2 and bool(np.all(np.isfinite(dataset.mean)) and np.all(_positive(dataset.std))),
        f"{dataset.name}: mean {dataset.mean} and std {dataset.std} must have one finite value for each of "
        f"{shape[-1]} channels, and every std must be positive.",
    )
    n, true = len(dataset.train_labels), dataset.true_labels
    meta = dataset.meta
    _require(
        isinstance(meta, int) and 0 <= meta < n,
        f"{dataset.name}: meta={meta!r}, expected an integer from 0 to {n - 1}.",
    )
    if true is not None:
        _check_part(f"{dataset.name} train, true", dataset.train_images, true, dataset.num_classes)


def _check_part(part: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    for what, array in (("images", images), ("labels", labels)):
        _require(isinstance(array, np.ndarray), f"{part}: {what} are a {type(array).__name__}, expected a NumPy array.")
    found = f"{images.dtype} {images.shape}"
    _require(
        images.dtype == np.uint8 and images.ndim == 4 and images.size > 0,
        f"{part}: images are {found}, expected non-empty uint8 [n, H, W, c].",
    )
    found = f"{labels.dtype} {labels.shape}"
    _require(labels.dtype == np.int32 and labels.ndim == 1, f"{part}: labels are {found}, expected int32 [n].")
    _require(len(images) == len(labels), f"{part}: {len(images)} images have {len(labels)} labels.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{part}: label {labels[wrong[0]]} at index {wrong[0]} is outside 0..{num_classes - 1} "
            f"({wrong.size} such labels): correct the labels or num_classes."
        )


def _positive(std: tuple[float, ...]) -> np.ndarray:
    return np.isfinite(std) & (np.asarray(std) > 0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> Dataset:
    """Put a part of the training examples in the place of the test set: what settings are chosen by.

    Args:
      dataset: whose test set will not be there, so that nothing can read it.
      share: of the training examples of each class, rounded to whole examples; 0 changes nothing.
      seed: of the draw; equal seeds hold out the same examples.
    Returns:
      the data set, its name and the order of the remaining training examples as they were.
    Raises:
      DataError: the share is none, or a class would have no example in one of the parts.
    """
    _require(isinstance(seed, (int, np.integer)) and seed >= 0, f"seed={seed!r} is not an integer of at least 0.")
    _require(0 <= share < 1, f"{dataset.name}: the share to hold out is {share}, expected at least 0 and less than 1.")
    if share == 0:
        return dataset
    labels = dataset.train_labels
    held = np.zeros(len(labels), bool)
    order = np.random.default_rng((seed, 3)).permutation(len(labels))
    for label in range(dataset.num_classes):
        members = order[labels[order] == label]
        count = round(share * len(members))
        _require(
            0 < count < len(members),
            f"{dataset.name}: holding out {share:g} of the {len(members)} examples of class {label} leaves one part "
            "without any: choose another share.",
        )
        held[members[:count]] = True
    images = dataset.train_images
    return dataclasses.replace(
        dataset,
        train_images=images[~held],
        train_labels=labels[~held],
        test_images=images[held],
        test_labels=labels[held],
    )


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
    train_images = images[~test]
    mean, std = (float(train_images.mean()),), (float(train_images.std()),)
    return Dataset("digits", train_images, labels[~test], images[test], labels[test], 10, mean, std, augment=False)


def load_tfds(
    data_dir: Path,
    download: bool,
    *,
    name: str,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: bool,
) -> Dataset:
    """Load the splits "train" and "test" of a prepared TFDS image data set; needs no TensorFlow.

    Args:
      data_dir: holds `name`/version/dataset_info.json and array_record files.
      download: whether to prepare what is missing.
      name: TFDS name.
      num_classes: C.
      mean: per channel, in raw pixel units.
      std: per channel, in raw pixel units.
      augment: whether training images are to be cropped and flipped.

    Raises:
      DataError: the data are missing or unreadable.
    """
    directory = _prepared(data_dir, name)
    if directory is None and download:
        _download(data_dir, name)
        directory = _prepared(data_dir, name)
    if directory is None:
        raise DataError(
            f"{name} is not in {data_dir / name} (no version has a dataset_info.json): point --data_dir=DIR (or "
            "TFDS_DATA_DIR) at prepared array_record data, or run once with --download, which needs "
            "TensorFlow for preparing (pip install tensorflow)."
        )
    return Dataset(name, *_read(directory, "train"), *_read(directory, "test"), num_classes, mean, std, augment)


def _prepared(data_dir: Path, name: str) -> Path | None:
    """The newest version of a data set, sought without TFDS: its errors mislead where data are missing."""
    found = [p.parent for p in (data_dir / name).glob("*/dataset_info.json")]
    versions = [p for p in found if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _read(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, H, W, c] uint8 and labels [n] int32 of a split, in TFDS's order."""
    stored = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    _require(
        stored == "array_record",
        f"{directory} is prepared as {stored}, expected array_record: remove it and run with --download.",
    )
    import tensorflow_datasets as tfds  # seconds to import

    try:
        source = tfds.builder_from_directory(directory).as_data_source(split)
        blocks = [range(i, min(i + _READ_BATCH, len(source))) for i in range(0, len(source), _READ_BATCH)]
        images, labels = zip(*(_stack(source.__getitems__(block)) for block in blocks), strict=True)
    except Exception as error:
        raise DataError(
            f"Split {split!r} of {directory} could not be read ({_reason(error)}): check that all of its "
            "array_record files are there, or remove the directory and run with --download."
        ) from error
    return np.concatenate(images), np.concatenate(labels)


def _stack(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records], np.int32)


def _download(data_dir: Path, name: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        # Asked for first: TFDS finds out only after the download.
        raise DataError(f"Preparing {name} needs TensorFlow, which is not installed: pip install tensorflow.")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        # A folder of its own: archives of MNIST and Fashion-MNIST have the same names.
        builder.download_and_prepare(download_dir=data_dir / "downloads" / name)
    except Exception as error:
        raise DataError(
            f"{name} could not be downloaded and prepared in {data_dir} ({_reason(error)}): check the "
            "network and TensorFlow, or point --data_dir=DIR at prepared data."
        ) from error


def _reason(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _tfds(
    name: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...], augment: bool
) -> Callable[[Path, bool], Dataset]:
    return partial(load_tfds, name=name, num_classes=num_classes, mean=mean, std=std, augment=augment)


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
}
