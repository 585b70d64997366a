"""Boxes: what the outputs of YOLOv3 mean, which boxes are kept, images of one size, and COCO's average precision.

A box is (x, y, w, h), its centre and its size. Boxes of a network are relative to the square image it was given: all
four of the whole are (0.5, 0.5, 1, 1).

Legend: B batch, H and W height and width in pixels, C classes, n cells of all maps times 3 anchors, K candidates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.types import Array

GREY = 127.5  # of the border around an image; 128 in bytes


class Anchors(NamedTuple):
    """The shapes boxes are predicted from."""

    sizes: tuple[tuple[int, int], ...]  # widths and heights in pixels of the network's input, whatever its size
    masks: tuple[tuple[int, ...], ...]  # for each map, the coarsest first, which of the sizes are its own


ANCHORS = {
    "yolov3": Anchors(
        ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)),
        ((6, 7, 8), (3, 4, 5), (0, 1, 2)),
    ),
    # The published weights were trained with 1, 2, 3 in the second map; with 0, 1, 2 they lose half of their precision.
    "yolov3_tiny": Anchors(((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)), ((3, 4, 5), (1, 2, 3))),
}


class Decoded(NamedTuple):
    """What the outputs of a detector mean, of each anchor of each cell."""

    boxes: Array  # [B, n, 4] relative to the network's input
    objectness: Array  # [B, n] in (0, 1)
    classes: Array  # [B, n, C] in (0, 1), each by itself


class Kept(NamedTuple):
    """The detections of a batch, the best first."""

    boxes: Array  # [B, k, 4] relative to the network's input
    scores: Array  # [B, k], 0 where there is none
    classes: Array  # [B, k] int32


class Detections(NamedTuple):
    """The detections of an image, for `average_precision`."""

    boxes: np.ndarray  # [k, 4] left, top, right, bottom, in pixels
    scores: np.ndarray  # [k]; those of 0 are none
    classes: np.ndarray  # [k] from 0 on


class Truths(NamedTuple):
    """The objects of an image, for `average_precision`."""

    boxes: np.ndarray  # [m, 4] left, top, right, bottom, in pixels
    classes: np.ndarray  # [m] from 0 on
    crowd: np.ndarray | tuple[()] = ()  # [m] whether it is a crowd, which costs and counts nothing; (): none is
    area: np.ndarray | tuple[()] = ()  # [m] pixels of the object, by which it is small or large; (): those of its box


def decode(outputs: Sequence[Array], anchors: Anchors, size: int | tuple[int, int]) -> Decoded:
    """Turn a detector's outputs into boxes and probabilities.

    With s the sigmoid, in the cell of column i and row j of a map of w x h cells, for an anchor of a x b pixels:

        x = (i + s(tx)) / w     y = (j + s(ty)) / h     width = a exp(tw) / W     height = b exp(th) / H

    Args:
      outputs: maps [B, h, w, 3, 5 + C], the coarsest first: tx, ty, tw, th, the logit of objectness, those of classes.
      anchors: of the network, from `ANCHORS`.
      size: pixels of the network's input, one number or (H, W).
    Returns:
      boxes, objectness and classes of all maps, one after the other; in a map by row, column and anchor.
    Raises:
      ValueError: there are not as many maps as masks, or a map has another form.

    Source: Redmon & Farhadi 2018, section 2.1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if len(outputs) != len(anchors.masks):
        raise ValueError(
            f"there are {len(outputs)} maps and anchors of {len(anchors.masks)}: give those of the network."
        )
    parts = []
    for out, mask in zip(outputs, anchors.masks, strict=True):
        if out.ndim != 5 or out.shape[3] != len(mask) or out.shape[4] < 6:
            raise ValueError(f"a map is {list(out.shape)}, expected [B, h, w, {len(mask)}, 5 + C].")
        rows, columns = out.shape[1:3]
        shape = jnp.asarray([anchors.sizes[i] for i in mask], out.dtype)  # [3, 2]
        corner = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1)[:, :, None]  # [h, w, 1, 2]: i, j
        centre = (corner + jax.nn.sigmoid(out[..., :2])) / jnp.asarray([columns, rows], out.dtype)
        extent = shape * jnp.exp(out[..., 2:4]) / jnp.asarray([width, height], out.dtype)
        boxes = jnp.concatenate([centre, extent], -1)
        found = Decoded(boxes, jax.nn.sigmoid(out[..., 4]), jax.nn.sigmoid(out[..., 5:]))
        parts.append(jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[4:]), found))
    return jax.tree.map(lambda *maps: jnp.concatenate(maps, 1), *parts)


def iou(a: Array, b: Array) -> Array:
    """The intersection of two boxes over their union.

    Args:
      a, b: [..., 4] x, y, w, h, of shapes that broadcast.
    Returns:
      [...] in [0, 1]; 0 where both are empty.
    """
    low = jnp.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = jnp.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    inner = jnp.maximum(high - low, 0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return jnp.where(union > 0, inner / jnp.where(union > 0, union, 1), 0)


def suppress(
    found: Decoded, *, threshold: float = 0.005, overlap: float = 0.45, candidates: int = 1000, keep: int = 100
) -> Kept:
    """Keep the best boxes of each class that do not overlap a better one of it.

    The score of a box and a class is objectness times the class. Of the pairs above the threshold the best candidates
    are taken; from the best down, one is dropped where a kept one of its class overlaps it; the best of all classes
    stay. A box may stay in several classes.

    Args:
      found: boxes [B, n, 4], objectness [B, n], classes [B, n, C].
      threshold: scores up to it count as none.
      overlap: intersection over union above which the worse box is dropped.
      candidates: K, of each image.
      keep: k, of each image; both are at most n C.
    Returns:
      boxes [B, k, 4], scores [B, k] and classes [B, k], by falling score, which is 0 where there are fewer.

    Source: greedy suppression as in darknet, which has no limit of candidates. The numbers are those it evaluates COCO
    with. Greedy means that a box stays if no better one that stays overlaps it. From all staying, this is repeated
    until nothing changes: after as many steps as the longest chain of boxes that drop each other, and not after K.
    """
    pairs = found.classes.shape[1] * found.classes.shape[2]
    candidates = min(candidates, pairs)
    keep = min(keep, candidates)

    def one(boxes: Array, objectness: Array, classes: Array) -> Kept:
        scores = objectness[:, None] * classes
        best, place = jax.lax.top_k(jnp.where(scores > threshold, scores, 0).reshape(-1), candidates)
        cell, kind = place // classes.shape[1], (place % classes.shape[1]).astype(jnp.int32)
        taken = boxes[cell]
        better = jnp.triu(jnp.ones((candidates, candidates), bool), 1)  # i before j
        same = (kind[:, None] == kind) & (best > 0)[:, None]
        drops = better & same & (iou(taken[:, None], taken) > overlap)  # [K, K]: i drops j if i stays

        def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
            _, stays = state
            return stays, ~(drops & stays[:, None]).any(0)

        start = jnp.ones(candidates, bool)
        _, stays = jax.lax.while_loop(lambda s: (s[0] != s[1]).any(), again, again((start, start)))
        last, order = jax.lax.top_k(jnp.where(stays, best, 0), keep)
        return Kept(taken[order], last, kind[order])

    return jax.vmap(one)(*found)


class Placed(NamedTuple):
    """Where an image lies in the square it was fitted into, in pixels."""

    height: int
    width: int
    top: int
    left: int


def placed(height: int, width: int, size: int) -> Placed:
    """Where `letterbox` puts an image of this height and width in a square of `size` pixels.

    Raises:
      ValueError: a number is below 1.
    """
    if min(height, width, size) < 1:
        raise ValueError(f"an image of {height} x {width} in a square of {size}: all must be at least 1.")
    high, wide = (size, width * size // height) if height > width else (height * size // width, size)
    high, wide = max(high, 1), max(wide, 1)
    return Placed(high, wide, (size - high) // 2, (size - wide) // 2)


def letterbox(image: np.ndarray, size: int, *, whole: bool = True) -> np.ndarray:
    """Fit an image into a square, its shape kept, between borders of grey.

    Args:
      image: [H, W, 3] uint8.
      size: of the square, a multiple of 32 for YOLOv3.
      whole: round to bytes, a quarter of the memory.
    Returns:
      [size, size, 3] uint8, or float32 in [0, 255] that is not rounded.
    Raises:
      ValueError: the image is none, or empty.

    Source: darknet, whose lengths are cut to whole pixels and whose bilinear scale is (in - 1) / (out - 1), so that
    corners stay corners. It rounds nothing. Bytes move a few boxes by little, which 281 images of 80 classes show: tiny
    has an AP of 0.198 with bytes, 0.203 with bytes that are cut, 0.201 with neither, and an AP50 of 0.402 to 0.404.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3].")
    place = placed(image.shape[0], image.shape[1], size)
    pixels = _resized(_resized(image.astype(np.float32), place.width, 1), place.height, 0)
    square = np.full((size, size, 3), GREY, np.float32)
    rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
    square[rows, columns] = pixels
    return np.rint(square).astype(np.uint8) if whole else square


def _resized(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Interpolate along an axis, the first and the last pixel kept."""
    old = image.shape[axis]
    at = np.arange(length, dtype=np.float32) * np.float32((old - 1) / max(length - 1, 1))
    low = np.minimum(at.astype(int), old - 1)
    part = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    before, after = (np.take(image, i, axis) for i in (low, np.minimum(low + 1, old - 1)))
    return (1 - part) * before + part * after


def unletterbox(boxes: np.ndarray, height: int, width: int, size: int) -> np.ndarray:
    """Move boxes from a `letterbox` back to its image, and cut them at the image's borders.

    Args:
      boxes: [..., 4] x, y, w, h relative to the square.
      height, width: of the image.
      size: of the square.
    Returns:
      [..., 4] left, top, right, bottom, in pixels of the image.
    """
    place = placed(height, width, size)
    scale = np.array([place.width / width, place.height / height])
    shift = np.array([place.left, place.top])
    boxes = np.asarray(boxes) * size
    centre, half = (boxes[..., :2] - shift) / scale, boxes[..., 2:] / scale / 2
    return np.concatenate([centre - half, centre + half], -1).clip(0, [width, height, width, height])


# What COCO reports, in its order.
NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def average_precision(detections: Sequence[Detections], truths: Sequence[Truths], num_classes: int) -> dict[str, float]:
    """COCO's average precision and recall of boxes.

    AP is the mean over classes that occur and over the overlaps 0.50, 0.55, ..., 0.95 of the precision, averaged over
    101 recalls; AP50 and AP75 are of one overlap. AR is the recall of at most 1, 10 or 100 detections of an image.
    A detection in a crowd counts neither way.

    Args:
      detections: of each image; of a class in an image the 100 best count.
      truths: of the same images.
      num_classes: C.
    Returns:
      `NAMES` -> value in [0, 1]; NaN where no object is of that size.
    Raises:
      ImportError: faster-coco-eval is not installed.
      ValueError: the images are not as many, a class is outside 0..C-1, or lengths differ.

    Source: Lin et al. 2014, by the package faster-coco-eval, whose 12 numbers are those of COCO's own.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError(
            "average precision needs faster-coco-eval, which is not installed: pip install faster-coco-eval."
        ) from error
    if len(detections) != len(truths) or not truths:
        raise ValueError(f"detections are of {len(detections)} images and truths of {len(truths)}: expected the same.")
    objects: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, (true, guess) in enumerate(zip(truths, detections, strict=True)):
        for j, row in enumerate(_annotations(i, true, num_classes)):
            area = float(true.area[j]) if len(true.area) else row["bbox"][2] * row["bbox"][3]
            crowd = int(true.crowd[j]) if len(true.crowd) else 0
            # Numbers from 1 on: the evaluation takes an object with the number 0 for none.
            objects.append({**row, "id": len(objects) + 1, "iscrowd": crowd, "area": area})
        for row, score in zip(_annotations(i, guess, num_classes), guess.scores, strict=True):
            if score > 0:
                found.append({**row, "score": float(score)})
    if not objects:
        return dict.fromkeys(NAMES, float("nan"))
    whole = COCO(
        {
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": objects,
            "categories": [{"id": c} for c in range(num_classes)],
        }
    )
    evaluation = COCOeval_faster(whole, whole.loadRes(found), "bbox", print_function=_quiet, extra_calc=False)
    evaluation.print_function = _quiet
    evaluation.run()
    return {
        name: float("nan") if value < 0 else float(value) for name, value in zip(NAMES, evaluation.stats, strict=False)
    }


def _quiet(*args: object) -> None:
    """The evaluation tells of its progress."""


def _annotations(image: int, of: Detections | Truths, num_classes: int) -> list[dict[str, Any]]:
    boxes, classes = np.asarray(of.boxes, np.float64).reshape(-1, 4), np.asarray(of.classes).astype(int)
    lengths = {name: len(field) for name, field in zip(of._fields, of, strict=True)}
    if any(n != len(boxes) and not (name in ("crowd", "area") and n == 0) for name, n in lengths.items()):
        told = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise ValueError(f"image {image} has {told}: expected one of each for every box.")
    if ((classes < 0) | (classes >= num_classes)).any():
        raise ValueError(f"image {image} has class {classes.min()} or {classes.max()}, outside 0..{num_classes - 1}.")
    sized = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    return [{"image_id": image, "category_id": int(c), "bbox": box} for c, box in zip(classes, sized, strict=True)]
