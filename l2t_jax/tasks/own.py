"""A user's own data as a data set in classes: arrays, an .npz, a .csv, a folder of images.

Legend: n training examples, F features, H and W height and width in pixels, c channels, C classes.
"""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from l2t_jax.data import DataError, Dataset, hold_out, require
from l2t_jax.data.augment import resized_crop
from l2t_jax.data.files import column_of, image_files, in_a_line, number_in, read_arrays, read_csv, read_images
from l2t_jax.data.images import decode, objects, size_of
from l2t_jax.data.noise import balanced
from l2t_jax.tasks.classification import Classes, check

logger = logging.getLogger(__name__)

LARGE = 2**30  # bytes of images, of which a folder's are no longer held in memory
SIDE, SAMPLE = 224, 100  # of the squares that are cut from images of any size, at most; images that are looked at first
HELD_OUT, FEWEST = 0.2, 3  # of the examples of each class, where no test set is given; how many each must have then
# Names of the arrays of an .npz: training inputs and labels, test inputs and labels.
ARRAYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", "x_test", "y_test"),
    ("X", "y", "X_test", "y_test"),
    ("inputs", "labels", "test_inputs", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
    ("data", "target", "test_data", "test_target"),
)
LABEL, FILE, SPLIT, TRUE = ("label", "class", "target", "y"), ("file", "path", "image", "filename"), "split", "true"


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    clean: tuple[Any, Any] | Sequence[int] | np.ndarray | None = None,
    true: Any = None,
    weight: Any = None,
    name: str = "arrays",
) -> Dataset:
    """A data set of your own arrays.

    Classes are the labels that occur in training, in order; whatever they are called, a student is trained with their
    places 0 to C - 1. Images are uint8 or floats, [n, H, W] or [n, H, W, c]; features [n, F] any numbers. Both are
    normalised by the mean and the standard deviation of the training examples, per channel or feature.

    Args:
      x: inputs [n, F], [n, H, W] or [n, H, W, c]; or images that are read when they are needed, as
        `data.images.objects` makes an array of them: files (`pathlib.Path`), or the bytes of files.
      y: labels [n]: numbers or names.
      test: inputs and labels to test on, once; by default a fifth of each class, always the same.
      clean: (inputs, labels) known to be right, or which of the training examples are (indices, or bools [n]): they
        measure the validation error and are not trained on. By default the examples are divided.
      true: right labels [n], where they are known: only for records.
      weight: how much each example counts [n], at least 0; by default all alike.
      name: of the data set.
    Raises:
      DataError: one line says what does not fit.
    """
    inputs, labels = {}, {}
    inputs["train"], labels["train"] = _pair(name, "", (x, y))
    if test is not None:
        inputs["test"], labels["test"] = _pair(name, "test ", test)
    if isinstance(clean, tuple):
        inputs["clean"], labels["clean"] = _pair(name, "clean ", clean)
    for part, array in inputs.items():
        kinds = [f"{given.dtype} {given.shape[1:]}" for given in (array, inputs["train"])]
        require(kinds[0] == kinds[1], f"{name}: {part} inputs are {kinds[0]} and the training inputs {kinds[1]}.")
    count = len(labels["train"])
    if true is not None:
        labels["true"] = _labels(true, f"{name}: true labels")
        require(len(labels["true"]) == count, f"{name}: {len(labels['true'])} true labels beside {count} labels.")
    values, places = _encoded(name, labels)
    train = {"inputs": inputs["train"], "labels": places["train"]}
    train |= {} if true is None else {"true": places["true"]}
    train |= {} if weight is None else {"weight": _weights(name, weight, count)}
    if "clean" in inputs:
        ones = np.ones(len(inputs["clean"]), np.float32)
        extra = {"inputs": inputs["clean"], "labels": places["clean"], "true": places["clean"], "weight": ones}
        train = {leaf: np.concatenate([train[leaf], extra[leaf]]) for leaf in train}
    meta = len(labels.get("clean", ()))
    if test is None:
        few = [value for value, size in zip(values, np.bincount(places["train"]), strict=False) if size < FEWEST]
        told = f"class {', '.join(few[:3])} has fewer than {FEWEST} examples"
        require(not few, f"{name}: {told}: give a test set, or leave it out.")
        nothing = {leaf: train[leaf][:1] for leaf in ("inputs", "labels")}
        dataset = hold_out(Dataset(name, train, nothing, meta=meta), HELD_OUT, strata=train["labels"])
    else:
        dataset = Dataset(name, train, {"inputs": inputs["test"], "labels": places["test"]}, meta=meta)
    numbers = labels["train"].dtype.kind in "iu"
    names = tuple(int(value) if numbers else value for value in values)
    names = () if names == tuple(range(len(values))) else names
    crop = _crop(dataset.train["inputs"])
    info = Classes(len(values), *moments(_sample(dataset.train["inputs"], crop)), names=names, crop=crop)
    dataset = dataclasses.replace(dataset, info=info)
    if clean is not None and not isinstance(clean, tuple):
        dataset = with_clean(dataset, np.asarray(clean))
    check(dataset)
    return dataset


def with_class_weight(dataset: Dataset, weight: str) -> Dataset:
    """Let the examples of each class count as much as those of any other, or as is said.

    Args:
      dataset: of classes.
      weight: "balanced": n / (C n_c) for an example of class c, of which there are n_c; or a number for each class,
        comma separated.
    Raises:
      DataError: it is neither.
    """
    labels, classes = dataset.train["labels"], dataset.info.num_classes
    if weight == "balanced":
        each = len(labels) / (classes * np.bincount(labels, minlength=classes))
    else:
        try:
            each = np.array([float(part) for part in weight.split(",")])
        except ValueError:
            each = np.array([])
        good = len(each) == classes and bool(np.all(np.isfinite(each)) and np.all(each >= 0) and each.any())
        require(good, f"{dataset.name}: class_weight={weight!r} is none: give balanced, or {classes} numbers >= 0.")
    whole = each[labels] * dataset.train.get("weight", 1.0)
    return dataclasses.replace(dataset, train={**dataset.train, "weight": whole.astype(np.float32)})


def with_labels(dataset: Dataset, labels: Any) -> Dataset:
    """Other labels in place of a set's own, which are then the true ones.

    Args:
      dataset: of classes.
      labels: [n], an entry for each training example of the set as it was loaded: places 0 to C - 1 of the classes, or
        their names.
    Raises:
      DataError: there are more or fewer, or one is none of the classes.
    """
    given, classes, index = _labels(labels, f"{dataset.name}: labels"), dataset.info.num_classes, dataset.index
    assert index is not None
    whole = int(index.max()) + 1
    require(len(given) >= whole, f"{dataset.name}: {len(given)} labels for {whole} training examples: give all.")
    names = [str(name) for name in dataset.info.names] or [str(place) for place in range(classes)]
    places = {name: place for place, name in enumerate(names)}
    texts = [str(value) for value in given]
    unknown = [(place, text) for place, text in enumerate(texts) if text not in places]
    if unknown and dataset.info.names and all(text in map(str, range(classes)) for text in texts):
        places, unknown = {str(place): place for place in range(classes)}, []
    if unknown:
        where, text = unknown[0]
        raise DataError(
            f"{dataset.name}: label {text!r} at index {where} is none of its classes ({len(unknown)} such): "
            f"{', '.join(names[:10])}{', ...' if classes > 10 else ''}."
        )
    own = dataset.train.get("true", dataset.train["labels"])
    encoded = np.array([places[text] for text in texts], np.int32)[index]
    return dataclasses.replace(dataset, train={**dataset.train, "labels": encoded, "true": own})


def drawn_clean(dataset: Dataset, count: int) -> np.ndarray:
    """Which training examples are taken for known to be right, where all true labels are: as many of each class.

    Args:
      dataset: whose "true" labels differ from those that it is given.
      count: of examples, within one the same of each class; always the same ones.
    Returns:
      indices [count] of the set as it was loaded, for `with_clean`.
    Raises:
      DataError: true labels are not known; there are fewer examples than classes, or a class has too few.
    """
    require("true" in dataset.train, f"{dataset.name}: true labels are not known: give a file that names the clean.")
    require(count > 0, f"{dataset.name}: none would be clean: leave it out, or ask for one of each class at least.")
    assert dataset.index is not None
    order = np.random.default_rng((0, 5)).permutation(dataset.examples)
    apart = balanced(dataset.train["true"][order], count, dataset.info.num_classes)
    chosen: np.ndarray = np.sort(dataset.index[order[apart]])
    return chosen


def with_clean(dataset: Dataset, which: np.ndarray) -> Dataset:
    """Keep the examples that are known to be right apart, to measure the validation error.

    Where true labels are known they take the place of those that were given, of these examples.

    Args:
      dataset: without a meta set.
      which: indices of training examples of the set as it was loaded, or bools, one for each.
    Raises:
      DataError: they are none, not there or given twice, or a class has none among them or no other example.
    """
    name, index = dataset.name, dataset.index
    assert index is not None
    require(dataset.meta == 0, f"{name}: {dataset.meta} clean examples are apart already.")
    require(
        which.ndim == 1 and which.size > 0, f"{name}: clean examples are {list(which.shape)}: expected indices [k]."
    )
    if which.dtype == bool:
        require(
            len(which) > index.max(), f"{name}: {len(which)} marks of clean examples for {index.max() + 1} examples."
        )
        which = np.flatnonzero(which)
    require(which.dtype.kind in "iu", f"{name}: clean examples are {which.dtype}: expected whole numbers, or bools.")
    require(len(np.unique(which)) == len(which), f"{name}: a clean example is named twice.")
    outside = which[(which < 0) | (which > index.max())]
    require(not outside.size, f"{name}: clean example {outside[:1]} is outside 0..{index.max()} ({outside.size} such).")
    apart = np.isin(index, which)
    labels, classes = dataset.train["labels"], dataset.info.num_classes
    if "true" in dataset.train:
        labels = np.where(apart, dataset.train["true"], labels)
        dataset = dataclasses.replace(dataset, train={**dataset.train, "labels": labels})
    for what, part in (("clean", labels[apart]), ("other", labels[~apart])):
        gone = np.setdiff1d(np.arange(classes), part)
        require(not gone.size, f"{name}: class {_name(dataset, gone)} has no {what} example, and each needs one.")
    order = np.concatenate([np.flatnonzero(~apart), np.flatnonzero(apart)])
    return dataset.take(order, meta=int(apart.sum()))


def open_path(path: Path, *, skip_broken: bool = False) -> Dataset:
    """The data set that a path names: a folder of images, an .npz or a .csv.

    Args:
      path: of it.
      skip_broken: leave out images that cannot be read, and say which; all are read for it.

    Raises:
      DataError: it is none of these, is not there, or cannot be read.
    """
    require(path.exists(), f"{path} is not there: give a folder of images in class folders, an .npz or a .csv.")
    if path.is_dir():
        return from_folder(path, skip_broken=skip_broken)
    require(path.suffix in (".npz", ".csv"), f"{path} is none of a folder, an .npz and a .csv.")
    return from_npz(path) if path.suffix == ".npz" else from_csv(path, skip_broken=skip_broken)


def from_npz(path: str | Path) -> Dataset:
    """A data set of the arrays of an .npz: x and y, and x_test and y_test where there are any (`ARRAYS` has all names).

    "true" [n] are right labels, where they are known, and "clean" says which examples are known to be right.

    Raises:
      DataError: the file cannot be read, or lacks them; see `from_arrays`.
    """
    path = Path(path)
    arrays = read_arrays(path)
    found = next((names for names in ARRAYS if set(names[:2]) <= arrays.keys()), None)
    require(found is not None, f"{path} holds {', '.join(arrays) or 'nothing'}: expected x and y, x_test and y_test.")
    assert found is not None
    x, y, x_test, y_test = found
    test = (arrays[x_test], arrays[y_test]) if {x_test, y_test} <= arrays.keys() else None
    extras = {"clean": arrays.get("clean"), "true": arrays.get("true")}
    return from_arrays(arrays[x], arrays[y], test=test, name=path.stem, **extras)


def from_csv(path: str | Path, *, skip_broken: bool = False) -> Dataset:
    """A data set of a table with a head: a column "label", and either one "file" of image files or columns of numbers.

    A column "split" says train or test, and a column "true" what the right label is, where there are any.

    Args:
      path: of the table.
      skip_broken: as of `from_folder`.
    Raises:
      DataError: the file cannot be read, a column is missing, or a cell is none of what it should be; see
        `from_arrays`.
    """
    path = Path(path)
    heads, rows = read_csv(path)
    every, label = rows, column_of(path, heads, LABEL)
    require(label is not None, f"{path} has the columns {', '.join(heads)}: expected one called label.")
    assert label is not None
    file, rest = column_of(path, heads, FILE), {SPLIT, TRUE, label}
    kept = np.ones(len(rows), bool)
    if file is not None:
        files = [path.parent / row[file] for row in rows]
        kept = _readable(files) if skip_broken else kept
        rows = [row for row, good in zip(rows, kept, strict=True) if good]
        x = _images([name for name, good in zip(files, kept, strict=True) if good])
    else:
        features = [head for head in heads if head not in rest]
        require(bool(features), f"{path} has no column of features, and none called file.")
        x = np.array([[number_in(path, row, head, line) for head in features] for line, row in enumerate(rows, 2)])
    y = np.array([row[label] for row in rows])
    true = np.array([row[TRUE] for row in rows]) if TRUE in heads else None
    split_of_all = np.array([row[SPLIT].lower() if SPLIT in heads else "train" for row in every])
    split = split_of_all[kept]
    strange = [word for word in dict.fromkeys(split) if word not in ("train", "test")]
    require(not strange, f"{path}: split {strange[:1]} must be train or test.")
    train, held = split == "train", split == "test"
    test = (x[held], y[held]) if held.any() else None
    dataset = from_arrays(x[train], y[train], test=test, true=None if true is None else true[train], name=path.stem)
    return _as_listed(dataset, kept[split_of_all == "train"])


def from_folder(path: str | Path, *, size: tuple[int, int] | None = None, skip_broken: bool = False) -> Dataset:
    """A data set of images in class folders, or in train/ and test/ with class folders in each.

    A class is the folder that holds the images, wherever it lies below.

    Args:
      path: of the folder.
      size: height and width that all images are resized to. By default images of one size are as they are; images of
        several sizes, or of more than a GiB, are read when they are needed, and of several sizes squares are cut.
      skip_broken: leave out images that cannot be read, and say which; all are read for it. The others keep their
        places in `Dataset.index`, by which a file of labels names them.
    Raises:
      DataError: there is no image, a class has none, or one cannot be read; see `from_arrays`.
    """
    path = Path(path)
    require(path.is_dir(), f"{path} is no folder.")
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / word for word in ("test", "val", "valid") if train != path and (path / word).is_dir()), None)
    files, labels = image_files(train)
    held, held_labels = ([], labels[:0]) if test is None else image_files(test)
    both, kept = [*files, *held], np.ones(len(files) + len(held), bool)
    if skip_broken:
        kept = _readable(both)
        both = [file for file, good in zip(both, kept, strict=True) if good]
    images, of_train = _images(both, size), kept[: len(files)]
    count = int(of_train.sum())
    pair = None if test is None else (images[count:], held_labels[kept[len(files) :]])
    dataset = from_arrays(images[:count], labels[of_train], test=pair, name=path.name)
    return _as_listed(dataset, of_train)


def _readable(files: Sequence[Path]) -> np.ndarray:
    """Which files [n] are images that can be read; the others are named."""

    def fault(file: Path) -> str:
        try:
            decode(file)
        except DataError as error:
            return str(error).rstrip(".")
        return ""

    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        faults = list(pool.map(fault, files))
    if broken := [told for told in faults if told]:
        more = ", ..." if len(broken) > 3 else ""
        logger.warning("%d of %d images are left out: %s%s", len(broken), len(files), ", ".join(broken[:3]), more)
    good = np.array([not told for told in faults])
    require(bool(good.any()), f"none of {len(files)} images can be read: {faults[0]}.")
    return good


def _as_listed(dataset: Dataset, kept: np.ndarray) -> Dataset:
    """The data set of the training examples [n] that were kept, each with its place among all."""
    return dataclasses.replace(dataset, index=np.flatnonzero(kept)[dataset.index])


def _images(files: Sequence[Path], size: tuple[int, int] | None = None) -> np.ndarray:
    """Images as arrays [n, H, W, c] where they have one size and fit, else as objects [n]."""
    if size is None:
        height, width = size_of(files[0])
        if len(files) * height * width * 3 > LARGE or any(size_of(file) != (height, width) for file in files):
            return objects(files)
    return read_images(files, size)


def _crop(inputs: np.ndarray) -> int:
    """The side of the squares that are cut from images; 0 where a sample of them has one size."""
    if inputs.dtype != object:
        return 0
    sizes = {size_of(image) for image in _some(inputs)}
    return 0 if len(sizes) == 1 else min(SIDE, *(side for size in sizes for side in size))


def _sample(inputs: np.ndarray, crop: int) -> np.ndarray:
    """Inputs whose moments are those of the set: all that are in memory, some of those that are read."""
    if inputs.dtype != object:
        return inputs
    images = [decode(image) for image in _some(inputs)]
    return np.stack([resized_crop(image, crop, None) if crop else image for image in images])


def _some(inputs: np.ndarray) -> np.ndarray:
    return inputs[np.linspace(0, len(inputs) - 1, min(SAMPLE, len(inputs))).astype(int)]


def as_inputs(x: Any, what: str) -> np.ndarray:
    """Inputs as data sets hold them: uint8 as it is, all else in single precision; images with an axis of channels.

    Args:
      x: features [n, F], or images [n, H, W] or [n, H, W, c].
      what: what to call them.
    Raises:
      DataError: they are none of these, ragged, not numbers or not finite.
    """
    if isinstance(x, np.ndarray) and x.dtype == object and all(isinstance(each, (bytes, Path)) for each in x.ravel()):
        return x
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise DataError(f"{what} are ragged ({in_a_line(error)}): expected one shape for all examples.") from error
    require(array.dtype.kind in "buif", f"{what} are {array.dtype}: expected numbers.")
    require(array.size > 0, f"{what} are {list(array.shape)}: there is no example.")
    require(
        2 <= array.ndim <= 4,
        f"{what} are {list(array.shape)}: expected features [n, F] or images [n, H, W] or [n, H, W, c].",
    )
    if array.dtype.kind == "f":
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        wrong = int(np.sum(~finite))
        require(not wrong, f"{what}: the one at index {np.argmin(finite)} is not finite ({wrong} such): leave it out.")
    array = array[..., None] if array.ndim == 3 else array
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _labels(y: Any, what: str) -> np.ndarray:
    """Numbers or names [n]."""
    try:
        array = np.asarray(y)
    except ValueError as error:
        raise DataError(f"{what} are ragged ({in_a_line(error)}): expected one label for each example.") from error
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    require(array.ndim == 1, f"{what} are {list(array.shape)}: expected one label for each example, [n].")
    if array.dtype.kind == "f":
        require(
            bool(np.all(np.isfinite(array) & (array == np.floor(array)))),
            f"{what} are {array.dtype}, not all whole numbers: name the classes.",
        )
        array = array.astype(np.int64)
    if array.dtype.kind == "O":
        require(all(isinstance(value, str) for value in array), f"{what} are neither numbers nor names.")
        array = array.astype(str)
    require(array.dtype.kind in "buiUS", f"{what} are {array.dtype}: expected whole numbers or names.")
    if array.dtype.kind in "US":
        array = np.char.strip(array.astype(str))
        require(bool(np.all(array != "")), f"{what}: one is empty.")
    return array


def _weights(name: str, weight: Any, count: int) -> np.ndarray:
    array = np.asarray(weight)
    good, found = array.dtype.kind in "buif" and array.shape == (count,), f"{array.dtype} {list(array.shape)}"
    require(good, f"{name}: weights are {found}: expected a number for each of {count} examples.")
    return array.astype(np.float32)


def _encoded(name: str, parts: dict[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes, which are those of the training labels, and the place of each label among them."""
    own = np.concatenate([parts["train"].astype(str), parts.get("clean", parts["train"][:0]).astype(str)])
    values = sorted(set(own.tolist()), key=_order)
    require(len(values) > 1, f"{name}: all labels are {values[0]}: expected two classes or more.")
    places = {value: place for place, value in enumerate(values)}
    encoded = {}
    for part, labels in parts.items():
        words = labels.astype(str).tolist()
        unknown = [(where, word) for where, word in enumerate(words) if word not in places]
        if unknown:
            where, word = unknown[0]
            raise DataError(
                f"{name}: the {part} label {word!r} at index {where} has no training example ({len(unknown)} such)."
            )
        encoded[part] = np.array([places[word] for word in words], np.int32)
    return values, encoded


def _order(word: str) -> tuple[int, float, str]:
    """Numbers by value, then names."""
    try:
        return 0, float(word), ""
    except ValueError:
        return 1, 0.0, word


def moments(inputs: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the last axis; 1 where nothing varies."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    mean, std = flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
    return tuple(map(float, mean)), tuple(map(float, np.where(std > 0, std, 1.0)))


def _pair(name: str, what: str, pair: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a part, as many of each."""
    require(len(pair) == 2, f"{name}: {what.strip()} has {len(pair)} parts, expected (inputs, labels), or indices.")
    x, y = as_inputs(pair[0], f"{name}: {what}inputs"), _labels(pair[1], f"{name}: {what}labels")
    require(len(x) == len(y), f"{name}: {len(x)} {what}inputs have {len(y)} {what}labels.")
    return x, y


def _name(dataset: Dataset, classes: np.ndarray) -> str:
    names = dataset.info.names
    return str(names[classes[0]] if names and classes.size else classes[0] if classes.size else "")
