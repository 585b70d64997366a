"""Boxes: decoding, suppression and letterbox against loops, and COCO's precision against its own code."""

import builtins
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax.tasks.boxes import (
    ANCHORS,
    NAMES,
    Decoded,
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


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    centre, extent = rng.random((*shape, 2)), rng.random((*shape, 2)) * 0.5 + 0.05
    return np.concatenate([centre, extent], -1).astype(np.float32)


def naive_iou(a: np.ndarray, b: np.ndarray) -> float:
    w, h = (
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    )
    inner = max(w, 0) * max(h, 0)
    return inner / (a[2] * a[3] + b[2] * b[3] - inner)


# Decoding


@pytest.mark.versions
@pytest.mark.parametrize("name", ANCHORS)
def test_decoding_is_that_of_a_loop(name: str) -> None:
    rng, anchors = np.random.default_rng(0), ANCHORS[name]
    height, width = 64, 96
    strides = (32, 16, 8)[: len(anchors.masks)]
    maps = [rng.normal(size=(2, height // s, width // s, 3, 7)).astype(np.float32) for s in strides]
    found = jax.jit(partial(decode, anchors=anchors, size=(height, width)))(maps)
    place = 0
    for out, mask in zip(maps, anchors.masks, strict=True):
        for row in range(out.shape[1]):
            for column in range(out.shape[2]):
                for k, anchor in enumerate(mask):
                    x, y, w, h, *logits = out[1, row, column, k].astype(float)
                    a, b = anchors.sizes[anchor]
                    s = [1 / (1 + np.exp(-v)) for v in (x, y, *logits)]
                    box = (column + s[0]) / out.shape[2], (row + s[1]) / out.shape[1]
                    box += a * np.exp(w) / width, b * np.exp(h) / height
                    np.testing.assert_allclose(found.boxes[1, place], box, rtol=1e-5)
                    np.testing.assert_allclose(found.objectness[1, place], s[2], rtol=1e-5)
                    np.testing.assert_allclose(found.classes[1, place], s[3:], rtol=1e-5)
                    place += 1
    assert found.objectness.shape == (2, place) and found.classes.shape == (2, place, 2)


def test_anchors_are_shared_out_as_the_weights_have_them() -> None:
    assert ANCHORS["yolov3"].masks == ((6, 7, 8), (3, 4, 5), (0, 1, 2))
    assert ANCHORS["yolov3_tiny"].masks == ((3, 4, 5), (1, 2, 3))


def test_outputs_that_do_not_fit_the_anchors() -> None:
    out = jnp.zeros((1, 2, 2, 3, 7))
    with pytest.raises(ValueError, match="there are 1 maps and anchors of 2"):
        decode((out,), ANCHORS["yolov3_tiny"], 64)
    with pytest.raises(ValueError, match="expected \\[B, h, w, 3"):
        decode((out, out[:, :, :, 0]), ANCHORS["yolov3_tiny"], 64)


def test_iou_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 20), random_boxes(rng, 30)
    expected = [[naive_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(iou(a[:, None], b), expected, rtol=1e-4, atol=1e-6)
    assert iou(jnp.zeros(4), jnp.zeros(4)) == 0 and iou(a[0], a[0]) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(iou(jnp.array([0.5, 0.5, 1, 1]), jnp.array([0.5, 0.25, 1, 0.5])), 0.5)
    gradient = jax.grad(lambda x: iou(x, jnp.zeros(4)))(jnp.zeros(4))
    assert np.isfinite(gradient).all()


# Suppression


def naive_suppress(boxes, objectness, classes, threshold, overlap, candidates, keep):  # type: ignore[no-untyped-def]
    pairs = [(objectness[i] * classes[i, c], i, c) for i in range(len(boxes)) for c in range(classes.shape[1])]
    pairs = sorted((p for p in pairs if p[0] > threshold), key=lambda p: -p[0])[:candidates]
    kept: list[tuple] = []
    for score, i, c in pairs:
        if all(d != c or naive_iou(boxes[i], boxes[j]) <= overlap for _, j, d in kept):
            kept.append((score, i, c))
    return kept[:keep]


@pytest.mark.versions
@pytest.mark.parametrize("keep, candidates", [(100, 1000), (7, 1000), (100, 60)])
def test_suppression_is_that_of_a_loop(keep: int, candidates: int) -> None:
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 2, 120)
    objectness, classes = rng.random((2, 120), np.float32), rng.random((2, 120, 3), np.float32) ** 3
    found = Decoded(jnp.asarray(boxes), jnp.asarray(objectness), jnp.asarray(classes))
    options = {"threshold": 0.1, "overlap": 0.3, "candidates": candidates, "keep": keep}
    ours = jax.jit(partial(suppress, **options))(found)
    assert ours.scores.shape == (2, min(keep, candidates)) and ours.classes.dtype == jnp.int32
    for b in range(2):
        expected = naive_suppress(boxes[b], objectness[b], classes[b], **options)
        count = int((ours.scores[b] > 0).sum())
        assert count == len(expected) > 5
        np.testing.assert_allclose(ours.scores[b, :count], [s for s, _, _ in expected], rtol=1e-6)
        np.testing.assert_array_equal(ours.classes[b, :count], [c for _, _, c in expected])
        np.testing.assert_array_equal(ours.boxes[b, :count], [boxes[b, i] for _, i, _ in expected])
        assert not ours.scores[b, count:].any()


def test_a_dropped_box_drops_no_other() -> None:
    """Of a row of boxes each overlaps its neighbours alone: every second one stays."""
    x = np.arange(6) * 0.05 + 0.2
    boxes = np.stack([x, np.full(6, 0.5), np.full(6, 0.15), np.full(6, 0.2)], -1).astype(np.float32)
    scores = np.linspace(0.9, 0.4, 6, dtype=np.float32)
    found = Decoded(jnp.asarray(boxes)[None], jnp.asarray(scores)[None], jnp.ones((1, 6, 1)))
    kept = suppress(found, overlap=0.45)
    np.testing.assert_allclose(kept.scores[0], [0.9, 0.7, 0.5, 0, 0, 0], rtol=1e-6)


def test_nothing_above_the_threshold() -> None:
    found = Decoded(jnp.ones((1, 4, 4)), jnp.full((1, 4), 0.01), jnp.full((1, 4, 2), 0.5))
    assert not suppress(found).scores.any() and suppress(found).scores.shape == (1, 8)


# Images


def naive_letterbox(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    wide, high = (size, height * size // width) if size / width < size / height else (width * size // height, size)
    out = np.full((size, size, 3), 127.5)
    for row in range(high):
        for column in range(wide):
            y = row * (height - 1) / (high - 1) if high > 1 else 0
            x = column * (width - 1) / (wide - 1) if wide > 1 else 0
            i, j = int(y + 1e-9), int(x + 1e-9)
            k, m = min(i + 1, height - 1), min(j + 1, width - 1)
            top = (1 - (x - j)) * image[i, j] + (x - j) * image[i, m]
            low = (1 - (x - j)) * image[k, j] + (x - j) * image[k, m]
            out[(size - high) // 2 + row, (size - wide) // 2 + column] = (1 - (y - i)) * top + (y - i) * low
    return out


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (20, 20), (64, 50), (1, 1), (1, 9)])
def test_letterbox_is_that_of_a_loop(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = naive_letterbox(image, 32)
    np.testing.assert_allclose(letterbox(image, 32, whole=False), expected, atol=2e-3)
    ours = letterbox(image, 32)
    assert ours.dtype == np.uint8 and ours.shape == (32, 32, 3)
    assert np.abs(ours - expected).max() <= 0.502


def test_an_image_of_the_right_size_stays() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(letterbox(image, 32), image)
    assert placed(375, 500, 416) == (312, 416, 52, 0) and placed(333, 500, 416) == (277, 416, 69, 0)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (7, 9)])
def test_boxes_move_with_their_image(height: int, width: int) -> None:
    whole = np.array([0, 0, width, height], float)
    place = placed(height, width, 416)
    corner, extent = np.array([place.left, place.top]), np.array([place.width, place.height])
    image = np.concatenate([corner + extent / 2, extent]) / 416  # all of it, in parts of the square
    np.testing.assert_allclose(unletterbox(image, height, width, 416), whole, atol=1e-9)
    low = np.random.default_rng(0).random((5, 2)) / 2  # of boxes a third as large as the image, in parts of it
    boxes = np.concatenate([corner + (low + 1 / 6) * extent, np.tile(extent / 3, (5, 1))], -1) / 416
    expected = np.concatenate([low, low + 1 / 3], -1) * [width, height, width, height]
    np.testing.assert_allclose(unletterbox(boxes, height, width, 416), expected, atol=1e-9)
    outside = unletterbox(np.array([[0.5, 0.5, 3, 3]]), height, width, 416)
    np.testing.assert_allclose(outside[0], whole)


def test_images_that_are_none() -> None:
    for image in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            letterbox(image, 32)
    with pytest.raises(ValueError, match="at least 1"):
        placed(3, 4, 0)


# Precision


def some(boxes: list, *rest: list) -> tuple[np.ndarray, ...]:
    return np.array(boxes, float).reshape(-1, 4), *(np.array(x) for x in rest)


@pytest.mark.versions
def test_precision_by_hand() -> None:
    truths = [Truths(*some([[0, 0, 50, 50], [100, 0, 150, 50]], [0, 0]))]
    perfect = [Detections(*some(truths[0].boxes.tolist(), [0.9, 0.8], [0, 0]))]
    result = average_precision(perfect, truths, 3)
    assert tuple(result) == NAMES and result["AP"] == result["AP50"] == result["AR100"] == pytest.approx(1)
    assert np.isnan(result["AP_small"]) and result["AP_medium"] == pytest.approx(1)
    # The second at an overlap of 0.6 counts at 0.50, 0.55 and 0.60; one of two found is a precision of 1 up to recall
    # 0.5, 51 of 101 recalls.
    near = [Detections(*some([[0, 0, 50, 50], [100, 0, 150, 30.1]], [0.9, 0.8], [0, 0]))]
    result = average_precision(near, truths, 3)
    assert result["AP50"] == pytest.approx(1) and result["AP75"] == pytest.approx(51 / 101)
    assert result["AP"] == pytest.approx((3 + 7 * 51 / 101) / 10)
    none = average_precision([Detections(*some([], [], []))], truths, 3)
    assert none["AP"] == 0 and none["AR100"] == 0
    absent = [Detections(*some(truths[0].boxes.tolist(), [0.0, 0.0], [0, 0]))]
    assert average_precision(absent, truths, 3)["AP"] == 0  # a score of 0 is no detection
    wrong = [Detections(*some(truths[0].boxes.tolist(), [0.9, 0.8], [1, 1]))]
    assert average_precision(wrong, truths, 3)["AP"] == 0
    assert np.isnan(average_precision(perfect, [Truths(*some([], []))], 3)["AP"])


def test_crowds_and_areas_count_as_in_coco() -> None:
    boxes = [[0, 0, 50, 50], [100, 0, 200, 100]]
    found = [Detections(*some([boxes[0], [110, 10, 150, 50]], [0.5, 0.9], [0, 0]))]
    counted = average_precision(found, [Truths(*some(boxes, [0, 0]))], 1)
    crowd = average_precision(found, [Truths(*some(boxes, [0, 0], [0, 1]))], 1)
    assert counted["AP"] < 0.5 and crowd["AP"] == pytest.approx(1)
    small = average_precision(found, [Truths(*some(boxes, [0, 0], [0, 1], [100, 100]))], 1)
    assert small["AP_small"] == pytest.approx(1) and np.isnan(small["AP_medium"])


def made_up(images: int = 30, classes: int = 4) -> tuple[list[Detections], list[Truths]]:
    rng = np.random.default_rng(0)
    detections, truths = [], []
    for _ in range(images):
        m = int(rng.integers(0, 6))
        low = rng.random((m, 2)) * 200
        boxes = np.concatenate([low, low + 5 + rng.random((m, 2)) * 240], -1)
        kinds = rng.integers(0, classes, m)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 0.7
        truths.append(Truths(boxes, kinds, rng.random(m) < 0.2, area))
        moved = np.repeat(boxes, 3, 0) + rng.normal(size=(3 * m, 4)) * 4
        guessed = np.where(rng.random(3 * m) < 0.8, np.repeat(kinds, 3), rng.integers(0, classes, 3 * m))
        detections.append(Detections(moved, rng.random(3 * m), guessed))
    return detections, truths


def test_precision_is_that_of_cocos_own_evaluation(capsys: pytest.CaptureFixture) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    detections, truths = made_up()
    ours = average_precision(detections, truths, 4)
    assert capsys.readouterr().out == ""
    whole, objects, found = coco.COCO(), [], []
    for i, (d, t) in enumerate(zip(detections, truths, strict=True)):
        for box, kind, crowd, area in zip(*t, strict=True):
            sized = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            row = {"id": len(objects) + 1, "image_id": i, "category_id": int(kind), "bbox": sized}
            objects.append({**row, "iscrowd": int(crowd), "area": float(area)})
        for box, score, kind in zip(*d, strict=True):
            sized = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            found.append({"image_id": i, "category_id": int(kind), "bbox": sized, "score": float(score)})
    kinds = [{"id": c} for c in range(4)]
    whole.dataset = {"images": [{"id": i} for i in range(len(truths))], "annotations": objects, "categories": kinds}
    whole.createIndex()
    evaluation = COCOeval(whole, whole.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.1 < ours["AP"] < 0.9
    assert min(evaluation.stats) > 0
    np.testing.assert_allclose([ours[name] for name in NAMES], evaluation.stats, atol=1e-6)


def test_precision_of_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    truths = [Truths(*some([[0, 0, 5, 5]], [0]))]
    plain = __import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        with pytest.raises(ImportError, match="pip install faster-coco-eval"):
            average_precision([], [], 1)
    with pytest.raises(ValueError, match="0 images and truths of 1"):
        average_precision([], truths, 1)
    with pytest.raises(ValueError, match=r"outside 0\.\.0"):
        average_precision([Detections(*some([[0, 0, 5, 5]], [0.5], [1]))], truths, 1)
    with pytest.raises(ValueError, match="image 0 has 1 boxes, 2 scores, 1 classes"):
        average_precision([Detections(*some([[0, 0, 5, 5]], [0.5, 0.5], [0]))], truths, 1)
