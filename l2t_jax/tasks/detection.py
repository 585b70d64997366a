"""Detection: boxes and classes, by YOLOv3. Its loss is a sum of three terms, and how much each counts is taught.

Legend: B batch, C classes, S side of the network's square in pixels, A anchors of a map, T boxes of an image, M maps,
h and w height and width of a map in cells, Q cells and anchors of all maps, K detections of an image.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import Dataset, images
from l2t_jax.data.annotated import Annotated
from l2t_jax.data.augment import place_boxed
from l2t_jax.data.boxes import read_boxes_tfds, read_coco
from l2t_jax.data.drawn import drawn_boxes
from l2t_jax.tasks.boxes import (
    ANCHORS,
    Anchors,
    Detections,
    Truths,
    average_precision,
    decode,
    iou,
    letterbox,
    placed,
    suppress,
    unletterbox,
)
from l2t_jax.tasks.reading import Seeds
from l2t_jax.tasks.spec import Panel, TaskSpec, has
from l2t_jax.types import Array, Batch, Key, Metric, PyTree, Read, Student, Task

_STRIDE = 32  # pixels of a cell of the coarsest map
SHOWN = 0.3  # score from which a box is drawn
IGNORE = 0.7  # a prediction that overlaps a true box by more is no mistake where it is not that box's own


@dataclasses.dataclass(frozen=True)
class Boxes:
    """What is known of a set of images with boxes."""

    names: tuple[str, ...]  # of the classes
    size: int  # side S of the square that images are letterboxed to, in pixels; a multiple of 32
    # part -> why boxes were cut or left out -> how many
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def detection(dataset: Dataset, *, size: int = 0) -> Task:
    """Build the task of a set of images with boxes.

    error = l_cls + l_conf + l_loc of each image, see `terms`; what a loss may read, the view "terms", is the three.

    Training images are cropped or extended, mirrored and recoloured at random, as darknet does. A student is scored on
    letterboxed images: AP50 is COCO's average precision at an overlap of 0.5, AP the mean of those from 0.5 to 0.95.

    Args:
      dataset: gives its `Boxes`; {"image", "boxes", "classes", "crowd", "area", "id"}: read on the host.
      size: S, side of the square that images are letterboxed to, a multiple of 32; 0: what suits the data set.
    Raises:
      ValueError: a size that is none.
    Source: Redmon & Farhadi 2018 and darknet's code; L2T-DLN (NeurIPS 2023), 5.2, whose own terms are not published.
    """
    info: Boxes = dataset.info
    size = size or info.size
    if size < 32 or size % 32:
        near = max(32, size // 32 * 32)
        raise ValueError(f"size={size}: the coarsest cells are of 32 pixels: use {near} or {near + 32}.")

    def where(i: int) -> str:
        return f"{dataset.name}, example {i}"

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        if seeds is None:
            return _stack([_tested(examples, i, size, where(i)) for i in indices])
        drawn = [np.random.default_rng(seed) for seed in seeds]
        return _stack([_trained(examples, i, size, rng, where(i)) for i, rng in zip(indices, drawn, strict=True)])

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        targets = {name: leaf[indices] for name, leaf in data.items() if name != "image"}
        return Batch(data["image"][indices].astype(jnp.float32) / 255, targets)

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        outputs: Any = student.apply(variables, batch.inputs, False)[0]  # maps
        found = suppress(decode(outputs, anchors_of(outputs), size))
        return {"found": found._asdict(), "truth": batch.targets, "shape": batch.targets["shape"]}

    return Task(
        error=lambda outputs, targets: jnp.sum(terms(outputs, targets), -1),
        metrics=_metrics,
        gather=gather,
        views=(("terms", lambda outputs, targets: Read(terms(outputs, targets), targets)),),
        measure=measure,
        score=partial(_score, len(info.names), size),
        metric=Metric("AP50", "%"),
        outputs=len(info.names),
        read=read,
        scored_at_once=8,
    )


# The loss


def terms(outputs: tuple[Array, ...], targets: dict[str, Array]) -> Array:
    """The terms (l_cls, l_conf, l_loc) of YOLOv3's loss of each image [B, 3], sums over the cells of all maps.

    Each true box belongs to the anchor that it overlaps best by shape, in the cell of its centre, in every map that has
    this anchor; of several boxes at one place the last one has it, and the classes of all are right there.
      l_conf = sum BCE(o, 1 at these places, 0 at others), without the others whose predicted box overlaps a true one by
               more than 0.7;
      l_cls  = sum BCE(c, classes) at these places;
      l_loc  = sum (2 - w h) [BCE(tx, x) + BCE(ty, y) + ((tw - w')^2 + (th - h')^2) / 2], x and y within the cell,
               w' = log(w S / anchor), h' likewise, w and h being parts of the square.
    BCE is of logits. The derivative is what darknet adds to its outputs.

    Args:
      outputs: M maps [B, h, w, A, 5 + C], coarsest first: tx, ty, tw, th, o, c of each anchor.
      targets: boxes [B, T, 4], x, y of the centre, width, height, in parts of the square; classes [B, T], -1: no box.
    Source: darknet's yolo layer; what is derived there is written as a loss here.
    """
    anchors, size = anchors_of(outputs), _STRIDE * outputs[0].shape[1]
    found = decode([jax.lax.stop_gradient(x) for x in outputs], anchors, size).boxes
    predicted = jnp.split(found, np.cumsum([np.prod(x.shape[1:4]) for x in outputs])[:-1], axis=1)
    boxes, classes = targets["boxes"].astype(found.dtype), targets["classes"]
    shapes = np.asarray(anchors.sizes, np.float64) / size

    def one(maps: list[Array], seen: list[Array], boxes: Array, classes: Array) -> Array:
        common = jnp.minimum(boxes[:, None, 2:], shapes).prod(-1)  # [T, anchors]
        best = jnp.argmax(common / (boxes[:, 2:].prod(-1)[:, None] + shapes.prod(-1) - common), axis=-1)  # [T]
        of_maps = [
            _terms_of_map(x, p, shapes, mask, best, boxes, classes)
            for x, p, mask in zip(maps, seen, anchors.masks, strict=True)
        ]
        return sum(of_maps[1:], of_maps[0])

    return jax.vmap(one)(list(outputs), predicted, boxes, classes)


def anchors_of(outputs: tuple[Array, ...]) -> Anchors:
    """The anchors of a network, by how many maps it puts out.

    Raises:
      ValueError: it puts out something else, as a classifier does.
    """
    maps = outputs if isinstance(outputs, (tuple, list)) and all(jnp.ndim(x) == 5 for x in outputs) else ()
    of_so_many = {len(anchors.masks): anchors for anchors in ANCHORS.values()}
    if len(maps) not in of_so_many:
        told = ", ".join(str(list(jnp.shape(x))) for x in jax.tree.leaves(outputs))
        raise ValueError(f"its students put out 2 or 3 maps [B, h, w, 3, 5 + C], and this one {told}.")
    return of_so_many[len(maps)]


def _terms_of_map(
    outputs: Array,
    predicted: Array,
    shapes: np.ndarray,
    mask: tuple[int, ...],
    best: Array,
    boxes: Array,
    classes: Array,
) -> Array:
    """The terms of one map of one image [3].

    Args:
      outputs: [h, w, A, 5 + C].
      predicted: [h w A, 4], the boxes that they mean.
      shapes: of all anchors of the network, in parts of the square.
      mask: which of them are those of the map.
      best: [T] which of them is each true box's.
      boxes, classes: [T, 4] and [T].
    """
    h, w, each, channels = outputs.shape
    flat = outputs.reshape(-1, channels)  # [Q, 5 + C]
    slot = jnp.full(len(shapes), -1).at[jnp.array(mask)].set(jnp.arange(each))[best]  # [T]
    here = (classes >= 0) & (slot >= 0)
    grid = jnp.array([w, h])
    cell = jnp.clip(jnp.floor(boxes[:, :2] * grid), 0, grid - 1)  # [T, 2] column, row
    place = ((cell[:, 1] * w + cell[:, 0]) * each).astype(jnp.int32) + slot
    place = jnp.where(here, place, len(flat))  # beyond the end: nowhere

    order = jnp.arange(len(boxes))
    last = jnp.full(len(flat), -1).at[place].max(order, mode="drop")  # [Q] the box that has the place
    owns = here & (last.at[place].get(mode="fill", fill_value=-1) == order)  # [T]
    mine = flat.at[place].get(mode="fill", fill_value=0)  # [T, 5 + C]

    together = (place[:, None] == place[None, :]) & here  # [T, T]
    kinds = jax.nn.one_hot(classes, channels - 5, dtype=flat.dtype)  # [T, C]
    right = jnp.minimum(together.astype(flat.dtype) @ kinds, 1)
    l_cls = jnp.sum(jnp.where(owns[:, None], _bce(mine[:, 5:], right), 0))

    extent = jnp.where(owns[:, None], boxes[:, 2:], 1)
    wanted = jnp.log(extent / jnp.asarray(shapes, flat.dtype)[best])
    squares = jnp.sum((mine[:, 2:4] - wanted) ** 2, -1) / 2
    centre = jnp.sum(_bce(mine[:, :2], boxes[:, :2] * grid - cell), -1)
    l_loc = jnp.sum(jnp.where(owns, (2 - boxes[:, 2:].prod(-1)) * (centre + squares), 0))

    overlap = jnp.where(classes >= 0, iou(predicted[:, None, :], boxes), 0)  # [Q, T]
    counts = (last >= 0) | (jnp.max(overlap, axis=-1) <= IGNORE)
    l_conf = jnp.sum(jnp.where(counts, _bce(flat[:, 4], (last >= 0).astype(flat.dtype)), 0))
    return jnp.stack([l_cls, l_conf, l_loc])


def _bce(logits: Array, targets: Array) -> Array:
    return optax.sigmoid_binary_cross_entropy(logits, targets)


def _metrics(outputs: tuple[Array, ...], targets: dict[str, Array]) -> dict[str, Array]:
    found = terms(outputs, targets)
    return {name: found[:, i] for i, name in enumerate(("class_term", "confidence_term", "location_term"))}


# Examples


def _trained(examples: PyTree, i: int, size: int, rng: np.random.Generator, where: str) -> dict[str, np.ndarray]:
    """A training example, at random; boxes of crowds are not trained on."""
    single = ~examples["crowd"][i]
    boxes, classes = examples["boxes"][i][single], examples["classes"][i][single]
    image, boxes, classes = place_boxed(images.decode(examples["image"][i], where), boxes, classes, size, rng)
    return {"image": image, "boxes": boxes, "classes": classes}


def _tested(examples: PyTree, i: int, size: int, where: str) -> dict[str, np.ndarray]:
    """An example as it is scored: letterboxed; its true boxes as parts of the image itself."""
    image = images.decode(examples["image"][i], where)
    places = max(1, max(len(boxes) for boxes in examples["boxes"]))
    pad = lambda x, fill: np.concatenate([x, np.full((places - len(x), *x.shape[1:]), fill, x.dtype)])  # noqa: E731
    fields = {"boxes": 0, "classes": -1, "crowd": False, "area": 0}
    padded = {name: pad(examples[name][i], fill) for name, fill in fields.items()}
    # Not rounded to bytes: that alone costs a third of a point of AP.
    return {"image": letterbox(image, size, whole=False), "shape": np.array(image.shape[:2], np.int32), **padded}


def _stack(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


# Scoring


def _score(classes: int, size: int, measured: PyTree) -> dict[str, float]:
    """AP50 and the other numbers of COCO, of the whole set; those of a size that has no object are left out."""
    found, truths = [], []
    for i in range(len(measured["shape"])):
        one = jax.tree.map(lambda x, i=i: np.asarray(x[i]), measured)
        found.append(detections(one, size))
        there = one["truth"]["classes"] >= 0
        truths.append(
            Truths(
                corners(one["truth"]["boxes"], one["shape"])[there],
                *(one["truth"][name][there] for name in ("classes", "crowd", "area")),
            )
        )
    return {name: value for name, value in average_precision(found, truths, classes).items() if np.isfinite(value)}


def detections(measured: PyTree, size: int) -> Detections:
    """What was found in an image, in its own pixels."""
    height, width = map(int, measured["shape"])
    boxes = unletterbox(measured["found"]["boxes"], height, width, size)
    return Detections(boxes, measured["found"]["scores"], measured["found"]["classes"])


def corners(boxes: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Boxes [k, 4] of centres and sizes, parts of an image [H, W], as left, top, right, bottom in its pixels."""
    height, width = shape
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    return np.concatenate([low, high], 1) * np.array([width, height, width, height])


def illustrate(info: Boxes, task: Task, student: Student, variables: PyTree, block: PyTree) -> list[Panel]:
    """The boxes that a student finds in images that were read, with scores above `SHOWN`, or the true ones."""
    batch = task.gather(block, jnp.arange(len(block["image"])), None)
    size = block["image"].shape[1]
    assert task.measure is not None
    measured = None
    if variables is not None:
        measure = jax.jit(task.measure, static_argnums=0)
        measured = jax.device_get(measure(student, variables, batch))
    panels = []
    for i, image in enumerate(block["image"]):
        shape = block["shape"][i]
        if measured is None:
            there = block["classes"][i] >= 0
            boxes, kinds = corners(block["boxes"][i], shape)[there], block["classes"][i][there]
            labels = [info.names[kind] for kind in kinds]
        else:
            found = detections(jax.tree.map(lambda x, i=i: x[i], measured), size)
            seen = found.scores > SHOWN
            boxes, kinds = found.boxes[seen], found.classes[seen]
            labels = [f"{info.names[kind]} {score:.2f}" for kind, score in zip(kinds, found.scores[seen], strict=True)]
        place = placed(int(shape[0]), int(shape[1]), size)
        window = image[place.top : place.top + place.height, place.left : place.left + place.width]
        scale = np.array([place.width / shape[1], place.height / shape[0]] * 2)
        panels.append(Panel(np.rint(window).astype(np.uint8), boxes=boxes * scale, labels=tuple(labels)))
    return panels


# Data


def _dataset(name: str, found: Annotated, size: int) -> Dataset:
    return Dataset(name, found.train, found.test, Boxes(found.names, size, found.counts))


def _tfds(name: str) -> Callable[[Path, bool], Dataset]:
    return lambda data_dir, download: _dataset(name, read_boxes_tfds(data_dir, download, name), 416)


def open_path(path: Path) -> Dataset:
    """A folder laid out as COCO is: annotations/instances_train*.json and instances_val*.json, and the images.

    Raises:
      DataError: see `read_coco`.
    """
    return _dataset(str(path), read_coco(path), 416)


DETECTION = TaskSpec(
    build=detection,
    datasets={
        "shapes": lambda data_dir, download: _dataset("shapes", drawn_boxes(), 128),
        "coco/2014": _tfds("coco/2014"),
        "coco/2017": _tfds("coco/2017"),
        "coco_mini": _tfds("coco_mini"),
    },
    open=open_path,
    check=has(Boxes, "image", "boxes", "classes", "crowd", "area"),
    classes=False,
    loss="linear_dln",
    baseline="sum_of_terms",
    defaults={"dataset": "shapes", "student": "yolov3_tiny"},
    student_knobs={"width": 8},
    settings={"unroll_length": 2, "batch_size": 2, "validation_batch_size": 8, "epochs": 8},
    illustrate=illustrate,
)
