"""Segmentation: the class of every pixel. Rows are pixels, so every loss of classes can be taught here.

Legend: B batch, C classes, H and W height and width in pixels, R rows, n images.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import Dataset
from l2t_jax.data.annotated import Annotated
from l2t_jax.data.augment import crop_masked, pad_to_canvas
from l2t_jax.data.drawn import drawn_masks
from l2t_jax.data.images import size_of
from l2t_jax.data.masks import IGNORED, read_masks_tfds, read_pair, read_voc
from l2t_jax.losses.cross_entropy import cross_entropy
from l2t_jax.students.layers import resize_aligned
from l2t_jax.tasks.reading import Seeds
from l2t_jax.tasks.spec import Panel, TaskSpec, has
from l2t_jax.types import Array, Batch, Errors, Key, Metric, PyTree, Read, Segmented, Student, Task

AUXILIARY = 0.4  # weight of the second head's loss
STRIDE = 2 / 3  # from window to window, in windows
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's pixels, per channel


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What is known of a set of images with a class for each pixel."""

    names: tuple[str, ...]  # of the classes; 0 is the ground
    crop: int  # side of the squares that a student is trained on, in pixels; (crop - 1) % 8 == 0
    window: int = 0  # at least, of the squares in which larger images are scored
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    # part -> what was found in it -> how many
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def segmentation(dataset: Dataset, *, crop: int = 0, window: int = 0, scales: str = "1", mirror: bool = False) -> Task:
    """Build the task of a set of masked images.

    error = mean CE(p, y) + 0.4 mean CE(aux, y) over the pixels that are labelled; a student's loss is the same of any
    loss of classes: mean l(p, y) + 0.4 mean l(aux, y). Pixels of label 255 neither count nor move anything.

    Training images are scaled by 0.5 to 2, mirrored and cropped at random. A student is scored on images as large as
    they are, padded to one canvas; where that is larger than a window, by windows two thirds of their size apart,
    whose probabilities are averaged. mIoU is the mean over classes of intersection over union, both added up
    over the whole set; a class that neither occurs nor is predicted does not count.

    Args:
      dataset: gives its `Pixels`; {"image", "mask"}: images of any sizes, read on the host.
      crop: side of training images in pixels, (crop - 1) % 8 == 0; 0: what suits the data set.
      window: side of the windows in which larger images are scored, likewise; 0: what suits the data set,
        and no less than a crop.
      scales: of images when a student is scored, their probabilities averaged, e.g. 0.5+0.75+1+1.25+1.5.
      mirror: score on mirrored images too, their probabilities averaged.
    Raises:
      ValueError: a crop or scales that are none.
    Source: Zhao et al. 2017 (PSPNet) and its released code; L2T-DLN 5.2. The paper writes one DLN: both terms have it.
    """
    info: Pixels = dataset.info
    crop = crop or info.crop
    window = window or max(crop, info.window)
    for name, side in (("crop", crop), ("window", window)):
        if side < 17 or (side - 1) % 8:
            near = max(17, (side - 1) // 8 * 8 + 1)
            raise ValueError(
                f"{name}={side}: students halve images three times, keeping corners: use {near} or {near + 8}."
            )
    factors = _scales(scales)
    mean, std = np.asarray(info.mean, np.float32), np.asarray(info.std, np.float32)
    names = len(info.names)
    canvas = _canvas(dataset.test, window)

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        found = []
        for place, i in enumerate(indices):
            where = f"{dataset.name}, example {i}"
            image, mask = read_pair(examples["image"][i], examples["mask"][i], names, where)
            if seeds is None:
                largest = tuple(max(a, b) for a, b in zip(canvas, image.shape[:2], strict=True))
                found.append(pad_to_canvas(image, mask, largest))
            else:
                found.append(crop_masked(image, mask, crop, np.random.default_rng(seeds[place])))
        return {"image": np.stack([image for image, _ in found]), "mask": np.stack([mask for _, mask in found])}

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        return Batch((data["image"][indices].astype(jnp.float32) - mean) / std, data["mask"][indices].astype(jnp.int32))

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        chances = predict(student, variables, batch.inputs, window, factors, mirror)
        return {"confusion": confusion(chances.argmax(-1), batch.targets, names)}

    return Task(
        error=error,
        metrics=_metrics,
        gather=gather,
        views=(("rows", pixels),),
        measure=measure,
        score=partial(_score, info.names),
        metric=Metric("mIoU", "%"),
        outputs=names,
        read=read,
        scored_at_once=4,
    )


def pixels(outputs: Segmented, targets: Array) -> Read:
    """The view "rows": each pixel of the first head and, in training, again of the second with weight 0.4.

    Args:
      outputs: logits [B, H, W, C], and of the second head.
      targets: classes [B, H, W], 255 where they do not count.
    Returns:
      logits [R, C], classes [R], weights [R]; the mean over rows times `scale` is the sum of the heads' means.
    Raises:
      ValueError: these are the outputs of another kind of student.
    """
    if not isinstance(outputs, Segmented):
        told = ", ".join(str(list(jnp.shape(x))) for x in jax.tree.leaves(outputs))
        raise ValueError(f"its students put out a `Segmented`, logits [B, H, W, C], and this one {told}.")
    heads = [outputs.logits, *([] if isinstance(outputs.auxiliary, tuple) else [outputs.auxiliary])]
    images, classes = targets.shape[0], outputs.logits.shape[-1]
    counted = (targets != IGNORED).reshape(images, -1)
    labels = jnp.where(counted, targets.reshape(images, -1), 0)
    weights = (1.0, AUXILIARY)[: len(heads)]
    # Logits that do not count may be anything, NaN too, whose derivative would be NaN even of weight 0.
    logits = [jnp.where(counted[..., None], head.reshape(images, -1, classes), 0) for head in heads]
    return Read(
        jnp.concatenate(logits, axis=1).reshape(-1, classes),
        jnp.concatenate([labels] * len(heads), axis=1).ravel(),
        jnp.concatenate([weight * counted.astype(heads[0].dtype) for weight in weights], axis=1).ravel(),
        sum(weights),
    )


def error(outputs: Segmented, targets: Array) -> Errors:
    """CE(p, y) + 0.4 CE(aux, y), of each pixel and head [R]; see `pixels`."""
    read = pixels(outputs, targets)
    return Errors(read.scale * cross_entropy(read.outputs, read.targets), read.weight)


def _metrics(outputs: Segmented, targets: Array) -> dict[str, Array]:
    counted = targets != IGNORED
    right = counted & (outputs.logits.argmax(-1) == targets)
    share = jnp.sum(right, (1, 2)) / jnp.maximum(jnp.sum(counted, (1, 2)), 1)
    return {"pixel_accuracy": share.astype(outputs.logits.dtype)}


# Scoring


def predict(
    student: Student,
    variables: dict[str, PyTree],
    images: Array,
    window: int,
    scales: tuple[float, ...] = (1.0,),
    mirror: bool = False,
) -> Array:
    """The probabilities of the classes of each pixel [B, H, W, C], means over scales, mirrors and windows.

    Args:
      student, variables: see `Student`; running statistics are used.
      images: [B, H, W, 3], normalised.
      window: side of a window.
      scales: sizes of the images.
      mirror: whether mirrored images are looked at too.
    """

    def seen(images: Array) -> Array:
        outputs: Any = student.apply(variables, images, False)[0]  # a `Segmented`
        return jax.nn.softmax(outputs.logits)

    height, width = images.shape[1:3]
    total: Array | float = 0.0
    for scale in scales:
        size = [_on_grid(scale * side) for side in (height, width)]
        scaled = images if scale == 1 else resize_aligned(images, (size[0], size[1]))
        for flip in (False, True)[: 1 + mirror]:
            chances = _windows(seen, scaled[:, :, ::-1] if flip else scaled, window)
            chances = chances[:, :, ::-1] if flip else chances
            total = total + (chances if scale == 1 else resize_aligned(chances, (height, width)))
    return jnp.asarray(total / (len(scales) * (1 + mirror)))


def _windows(seen: Callable[[Array], Array], images: Array, side: int) -> Array:
    """Probabilities of images, in windows that overlap where an image is larger than one."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (0, max(0, side - height)), (0, max(0, side - width)), (0, 0)))
    places = [(top, left) for top in _begins(padded.shape[1], side) for left in _begins(padded.shape[2], side)]
    if len(places) == 1:
        return seen(padded)[:, :height, :width]
    starts = jnp.array(places)
    cut = lambda at: jax.lax.dynamic_slice(padded, (0, at[0], at[1], 0), (len(padded), side, side, 3))  # noqa: E731
    chances = jax.lax.map(lambda at: seen(cut(at)), starts)  # [windows, B, side, side, C]
    total: Array | None = None
    count = np.zeros(padded.shape[1:3], np.float32)
    for window, (top, left) in enumerate(places):
        if total is None:
            total = jnp.zeros((*padded.shape[:3], chances.shape[-1]), chances.dtype)
        total = total.at[:, top : top + side, left : left + side].add(chances[window])
        count[top : top + side, left : left + side] += 1
    assert total is not None
    return (total / count[..., None])[:, :height, :width]


def _begins(length: int, side: int) -> Iterator[int]:
    """Where windows begin along a length; the last one ends with it."""
    stride = int(np.ceil(STRIDE * side))
    yield from sorted({min(begin, length - side) for begin in range(0, length - side + stride, stride)})


def confusion(predicted: Array, targets: Array, classes: int) -> Array:
    """How many pixels of each class [B, C, C, int32], true by predicted, are predicted as what; 255 is left out."""
    counted = targets != IGNORED
    place = jnp.where(counted, targets * classes + predicted, 0)
    images = jnp.arange(len(targets))[:, None, None]
    counts = jnp.zeros((len(targets), classes * classes), jnp.int32).at[images, place].add(counted.astype(jnp.int32))
    return counts.reshape(-1, classes, classes)


def _score(names: tuple[str, ...], measured: PyTree) -> dict[str, float]:
    """mIoU and the share of pixels that are right, and the IoU of each class, of the whole set."""
    counts = np.asarray(measured["confusion"]).sum(0, dtype=np.int64)
    both, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    each = both[union > 0] / union[union > 0]
    return {
        "mIoU": float(each.mean()) if len(each) else 0.0,
        "pixel accuracy": float(both.sum() / max(counts.sum(), 1)),
        **{f"IoU of {name}": float(both[i] / union[i]) for i, name in enumerate(names) if union[i]},
    }


def illustrate(
    info: Pixels, task: Task, student: Student, variables: dict[str, PyTree] | None, block: PyTree
) -> list[Panel]:
    """The maps that a student draws of images that were read, or without variables the true ones."""
    batch = task.gather(block, jnp.arange(len(block["image"])), None)
    maps, targets = np.asarray(batch.targets), block["mask"]
    if variables is not None:
        outputs, _ = jax.jit(student.apply, static_argnums=2)(variables, batch.inputs, False)
        maps = np.asarray(outputs.logits.argmax(-1))
    # Padding belongs to no image.
    sizes = [
        tuple(np.argwhere(mask != IGNORED).max(0) + 1) if (mask != IGNORED).any() else mask.shape for mask in targets
    ]
    return [
        Panel(image[:h, :w], classes=found[:h, :w])
        for image, found, (h, w) in zip(block["image"], maps, sizes, strict=True)
    ]


# Data


def _scales(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split("+"))
    except ValueError:
        found = ()
    if not found or not all(0 < scale < np.inf for scale in found):
        raise ValueError(f"scales={text!r} are none: give positive numbers joined by +, e.g. 0.75+1+1.25.")
    return found


def _on_grid(side: float) -> int:
    """The length nearest above of the form 8 k + 1."""
    return int(np.ceil((side - 1) / 8)) * 8 + 1


def _canvas(part: PyTree, window: int) -> tuple[int, int]:
    """A size that holds every image of a part, and a window."""
    sizes = np.array([size_of(image) for image in part["image"]])
    height, width = (max(window, _on_grid(side)) for side in sizes.max(0))
    return height, width


def _dataset(name: str, found: Annotated, crop: int, window: int = 0) -> Dataset:
    return Dataset(name, found.train, found.test, Pixels(found.names, crop, window, counts=found.counts))


def _tfds(name: str, crop: int, window: int = 0) -> Callable[[Path, bool], Dataset]:
    return lambda data_dir, download: _dataset(name, read_masks_tfds(data_dir, download, name), crop, window)


def open_path(path: Path) -> Dataset:
    """A folder laid out as VOC is: JPEGImages, SegmentationClass, ImageSets/Segmentation.

    Raises:
      DataError: see `read_voc`.
    """
    return _dataset(str(path), read_voc(path), 473)


SEGMENTATION = TaskSpec(
    build=segmentation,
    datasets={
        "shapes": lambda data_dir, download: _dataset("shapes", drawn_masks(), 65, 129),
        "voc/2012": _tfds("voc/2012", 473),
        "coco_voc_seg_mini": _tfds("coco_voc_seg_mini", 193, 321),
    },
    open=open_path,
    check=has(Pixels, "image", "mask"),
    defaults={"dataset": "shapes", "student": "pspnet_small"},
    settings={"unroll_length": 2, "batch_size": 2, "validation_batch_size": 8, "epochs": 4},
    illustrate=illustrate,
)
