"""Detection: boxes and classes, by YOLOv3. Its loss is a sum of three terms, and how much each counts is taught.

Legend: B batch, C classes, S side of the network's square in pixels, A anchors of a map, T boxes of an image, M maps,
h and w height and width of a map in cells, Q cells and anchors of all maps, K detections of an image.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax.data import Dataset
from l2t_jax.data.augment import jittered, letterboxed
from l2t_jax.data.images import decode
from l2t_jax.tasks.boxes import ANCHORS, decode_boxes, iou, suppress
from l2t_jax.tasks.reading import Seeds
from l2t_jax.types import Array, Batch, Key, Metric, PyTree, Read, Student, Task

MOST = 90  # boxes of a training image
IGNORE = 0.7  # a prediction that overlaps a true box by more is no mistake where it is not that box's own


@dataclasses.dataclass(frozen=True)
class Boxes:
    """What is known of a set of images with boxes."""

    names: tuple[str, ...]  # of the classes
    size: int  # side S of the square that images are letterboxed to, in pixels; a multiple of 32
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of boxes that were clipped or left out, and why


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

    def read(examples: PyTree, indices: np.ndarray, seeds: Seeds) -> PyTree:
        if seeds is None:
            return _stack([_tested(examples, i, size) for i in indices])
        return _stack(
            [_trained(examples, i, size, np.random.default_rng(s)) for i, s in zip(indices, seeds, strict=True)]
        )

    def gather(data: PyTree, indices: Array, keys: Key | None) -> Batch:
        targets = {name: leaf[indices] for name, leaf in data.items() if name != "image"}
        return Batch(data["image"][indices].astype(jnp.float32) / 255, targets)

    def measure(student: Student, variables: dict[str, PyTree], batch: Batch) -> PyTree:
        outputs, _ = student.apply(variables, batch.inputs, False)
        found = suppress(*decode_boxes(outputs, ANCHORS[len(outputs)], size))
        return {"found": found._asdict(), "truth": batch.targets}

    return Task(
        error=lambda outputs, targets: jnp.sum(terms(outputs, targets), -1),
        metrics=_metrics,
        gather=gather,
        views=(("terms", lambda outputs, targets: Read(terms(outputs, targets), targets)),),
        measure=measure,
        score=partial(_score, info.names, size),
        metric=Metric("AP50", "%"),
        outputs=len(info.names),
        read=read,
        scored_at_once=8,
    )


# The loss


def terms(outputs: tuple[Array, ...], targets: dict[str, Array]) -> Array:
    """The terms (l_cls, l_conf, l_loc) of YOLOv3's loss of each image [B, 3], sums over its cells.

    Each true box belongs to the anchor, of all maps, that it overlaps best by shape, in the cell of its centre; of
    several that fall on the same the last one has it, and the classes of all are right there.
      l_conf = sum BCE(o, 1 at these places, 0 at others), without those whose predicted box overlaps a true one by
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
    return jax.vmap(partial(_terms_of_one, ANCHORS[len(outputs)]))(outputs, targets["boxes"], targets["classes"])


def _terms_of_one(anchors: tuple[np.ndarray, ...], outputs: tuple[Array, ...], boxes: Array, classes: Array) -> Array:
    """Of maps [h, w, A, 5 + C], boxes [T, 4] and classes [T] of one image: [3]."""
    size = 32 * outputs[0].shape[0]
    each = [anchors[m].shape[0] for m in range(len(outputs))]
    sides = np.concatenate(anchors).astype(np.float32) / size  # [sum A, 2] of all maps
    flat = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in outputs])  # [Q, 5 + C]
    there = classes >= 0  # [T]
    xy, wh = boxes[:, :2].astype(flat.dtype), boxes[:, 2:].astype(flat.dtype)

    # Which anchor of which map, and where: a place among Q.
    common = jnp.minimum(wh[:, None, :], sides).prod(-1)  # [T, sum A]
    shape = common / (wh.prod(-1)[:, None] + sides.prod(-1) - common)
    best = jnp.argmax(shape, axis=-1)  # [T]
    place, cell, first, begin = jnp.zeros(len(boxes), jnp.int32), jnp.zeros_like(xy), 0, 0
    for m, x in enumerate(outputs):
        h, w = x.shape[:2]
        at = jnp.clip(jnp.floor(xy * jnp.array([w, h])), 0, jnp.array([w - 1, h - 1]))  # [T, 2] column, row
        mine = (best >= first) & (best < first + each[m])
        here = begin + ((at[:, 1] * w + at[:, 0]) * each[m]).astype(jnp.int32) + (best - first)
        place = jnp.where(mine, here, place)
        cell = jnp.where(mine[:, None], xy * jnp.array([w, h]) - at, cell)
        first, begin = first + each[m], begin + h * w * each[m]
    place = jnp.where(there, place, len(flat))  # beyond the end: nowhere

    # The last box of a place has it.
    order = jnp.arange(len(boxes))
    last = jnp.full(len(flat), -1).at[place].max(order, mode="drop")  # [Q]
    owns = there & (last.at[place].get(mode="fill", fill_value=-1) == order)  # [T]
    seen = flat.at[place].get(mode="fill", fill_value=0)  # [T, 5 + C]

    shares = (place[:, None] == place[None, :]) & there[:, None] & there[None, :]  # [T, T]
    kinds = jax.nn.one_hot(jnp.where(there, classes, -1), flat.shape[-1] - 5, dtype=flat.dtype)  # [T, C]
    right = jnp.minimum(shares.astype(flat.dtype) @ kinds, 1)
    l_cls = jnp.sum(jnp.where(owns[:, None], _bce(seen[:, 5:], right), 0))

    safe = jnp.where(owns[:, None], wh, 1.0)
    wanted = jnp.log(safe / jnp.asarray(sides)[best])
    squares = jnp.sum((seen[:, 2:4] - wanted) ** 2, -1) / 2
    l_loc = jnp.sum(jnp.where(owns, (2 - wh.prod(-1)) * (jnp.sum(_bce(seen[:, :2], cell), -1) + squares), 0))

    predicted = decode_boxes(tuple(x[None] for x in jax.lax.stop_gradient(outputs)), anchors, size)[0][0]  # [Q, 4]
    overlap = jnp.where(there, iou(predicted[:, None, :], boxes[None].astype(flat.dtype)), 0)  # [Q, T]
    counts = (last >= 0) | (jnp.max(overlap, axis=-1) <= IGNORE)
    l_conf = jnp.sum(jnp.where(counts, _bce(flat[:, 4], (last >= 0).astype(flat.dtype)), 0))
    return jnp.stack([l_cls, l_conf, l_loc])


def _bce(logits: Array, targets: Array) -> Array:
    return optax.sigmoid_binary_cross_entropy(logits, targets)


def _metrics(outputs: tuple[Array, ...], targets: dict[str, Array]) -> dict[str, Array]:
    found = terms(outputs, targets)
    return {name: found[:, i] for i, name in enumerate(("class_term", "confidence_term", "location_term"))}


# Examples


def _trained(examples: PyTree, i: int, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A training example, at random; boxes of crowds are not trained on."""
    single = ~examples["crowd"][i]
    image, boxes, classes = jittered(
        decode(examples["image"][i]), examples["boxes"][i][single], examples["classes"][i][single], size, rng, MOST
    )
    return {"image": image, "boxes": boxes, "classes": classes}


def _tested(examples: PyTree, i: int, size: int) -> dict[str, np.ndarray]:
    """An example as it is scored: letterboxed, its true boxes in the pixels of the image itself."""
    image = decode(examples["image"][i])
    places = max(1, max(len(boxes) for boxes in examples["boxes"]))
    pad = lambda x, fill: np.concatenate([x, np.full((places - len(x), *x.shape[1:]), fill, x.dtype)])  # noqa: E731
    return {
        "image": letterboxed(image, size),
        "boxes": pad(examples["boxes"][i], 0),
        "classes": pad(examples["classes"][i], -1),
        "crowd": pad(examples["crowd"][i], False),
        "area": pad(examples["area"][i], 0),
        "shape": np.array(image.shape[:2], np.int32),
    }


def _stack(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


# Scoring
