"""Augmentation moves pixels, masks and boxes together; without randomness everything is where it must be."""

import numpy as np
import pytest
from lines import said_in_a_line
from PIL import Image

from l2t_jax.data.augment import (
    crop_masked,
    filled,
    move_boxes,
    pad_to_canvas,
    place_boxed,
    recolour,
)

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (40, 56, 3)).astype(np.uint8)
MASK = RANDOM.integers(0, 5, (40, 56)).astype(np.uint8)
MEAN = [124, 116, 104]


class Fixed:
    """A generator that gives what the test says, in turn."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, *bounds):
        return self.values.pop(0)

    def random(self):
        return self.values.pop(0)

    def permutation(self, n):
        return np.arange(n)


# Masks


@pytest.mark.versions
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_of_the_original_size_is_exact(mirrored):
    """The square's top and left are 3 and 5; a mirrored square is the square, mirrored."""
    pixels, labels = crop_masked(IMAGE, MASK, 32, Fixed(1.0, 5.5 / 25, 3.5 / 9, 0.2 if mirrored else 0.7))
    turn = slice(None, None, -1 if mirrored else 1)
    np.testing.assert_array_equal(pixels, IMAGE[3:35, 5:37][:, turn])
    np.testing.assert_array_equal(labels, MASK[3:35, 5:37][:, turn])


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_smaller_is_in_the_middle(mirrored):
    pixels, labels = crop_masked(IMAGE, MASK, 64, Fixed(1.0, 0.3, 0.9, 0.2 if mirrored else 0.7))
    turn = slice(None, None, -1 if mirrored else 1)
    np.testing.assert_array_equal(pixels[12:52, 4:60], IMAGE[:, turn])
    np.testing.assert_array_equal(labels[12:52, 4:60], MASK[:, turn])
    around = np.ones((64, 64), bool)
    around[12:52, 4:60] = False
    assert (pixels[around] == MEAN).all() and (labels[around] == 255).all()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaled_pixels_are_means_or_copies(factor):
    pixels, labels = crop_masked(IMAGE, MASK, 24, Fixed(factor, 0.0, 0.0, 0.7))
    if factor == 2:
        np.testing.assert_array_equal(labels, MASK.repeat(2, 0).repeat(2, 1)[:24, :24])
        inner = IMAGE.astype(float)
        expected = (9 * inner[:-1, :-1] + 3 * inner[1:, :-1] + 3 * inner[:-1, 1:] + inner[1:, 1:]) / 16
        np.testing.assert_allclose(pixels[1::2, 1::2], expected[:12, :12], atol=1)
    else:  # 20 x 28: two rows above and below
        expected = IMAGE.reshape(20, 2, 28, 2, 3).mean((1, 3))[:, :24]
        np.testing.assert_allclose(pixels[2:22], expected, atol=1)
        assert (pixels[:2] == MEAN).all() and (labels[22:] == 255).all()


def test_the_same_seed_crops_the_same():
    one, again, other = (crop_masked(IMAGE, MASK, 33, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one[0], again[0])
    np.testing.assert_array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("seed", range(20))
def test_image_and_mask_stay_together(seed):
    """A mask as its own image: what is filled is filled in both, and classes lie where their colours do."""
    blocks = np.kron(np.arange(12).reshape(3, 4), np.ones((30, 25))).astype(np.uint8)
    pixels, labels = crop_masked(np.stack([blocks * 20] * 3, -1), blocks, 65, np.random.default_rng(seed))
    filled_in = (pixels == MEAN).all(-1)
    np.testing.assert_array_equal(filled_in, labels == 255)
    same = np.abs(pixels[..., 0].astype(int) - labels.astype(int) * 20) < 2
    assert (same | filled_in).mean() > 0.85 and same.any()


def test_a_canvas():
    pixels, labels = pad_to_canvas(IMAGE, MASK, (50, 60), (1, 2, 3))
    np.testing.assert_array_equal(pixels[:40, :56], IMAGE)
    np.testing.assert_array_equal(labels[:40, :56], MASK)
    assert (pixels[40:] == [1, 2, 3]).all() and (labels[:, 56:] == 255).all() and labels.shape == (50, 60)
    said_in_a_line(lambda: pad_to_canvas(IMAGE, MASK, (50, 55)), "40x56 does not fit a canvas of 50x55")
    said_in_a_line(lambda: pad_to_canvas(IMAGE, MASK[1:], (50, 60)), r"\[40, 56, 3\] has a mask \[39, 56\]")
    said_in_a_line(lambda: crop_masked(IMAGE[..., 0], MASK, 9, RANDOM), r"\[40, 56\] has a mask \[40, 56\]")


# Boxes


def marked(boxes, height=60, width=80):
    """A white image with a dark block in each box, given in pixels as left, top, right, bottom."""
    image = np.full((height, width, 3), 250, np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = 10
    corners = np.array(boxes, float) / [width, height, width, height]
    return image, np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1).astype(
        np.float32
    )


def found(image):
    """Left, top, right, bottom of what is dark."""
    dark = image.max(-1) < 100
    ys, xs = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def corners(box, size):
    return np.array([box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2]) * size


@pytest.mark.parametrize("mirrored", [False, True])
def test_marks_and_boxes_move_alike_exactly(mirrored):
    """80 x 60 in a square of 80, by 4 down: no pixel is mixed."""
    image, boxes = marked([(10, 20, 25, 50)])
    # aspect 1 and 1, scale 1, place, mirror, colours as they are
    values = (0.0, 0.0, 1.0, 0.0, 0.2, 0.2 if mirrored else 0.7, 0.0, 1.0, 0.7, 1.0, 0.7)
    pixels, moved, classes = place_boxed(image, boxes, np.array([3]), 80, Fixed(*values))
    left, right = (55, 70) if mirrored else (10, 25)
    np.testing.assert_array_equal(found(pixels), [left, 24, right, 54])
    np.testing.assert_allclose(corners(moved[0], 80), [left, 24, right, 54], atol=1e-4)
    assert classes[0] == 3 and (classes[1:] == -1).all() and (moved[1:] == 0).all()
    assert moved.shape == (90, 4) and moved.dtype == np.float32 and classes.dtype == np.int32
    assert (pixels[:4] == 128).all() and (pixels[64:] == 128).all()
    np.testing.assert_allclose(pixels[4:64], image[:, :: -1 if mirrored else 1], atol=2)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_boxes_are_where_their_marks_are(seed, scale):
    rng = np.random.default_rng(seed)
    image, boxes = marked([(24, 20, 50, 40)])
    options = {"hue": 0.0, "saturation": 1.0, "exposure": 1.0}
    pixels, moved, classes = place_boxed(image, boxes, np.array([1]), 104, rng, scale=scale, **options)
    if classes[0] == 1:
        np.testing.assert_allclose(found(pixels), corners(moved[0], 104), atol=2)
    else:
        assert not (pixels.max(-1) < 60).any()


def test_boxes_are_cut_and_dropped():
    boxes = np.float32([[0.1, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.95, 0.5, 0.1, 0.1], [0.25, 0.5, 0.0004, 0.5]])
    moved, kept = move_boxes(boxes, (-0.3, 0.0, 2.0, 1.0), False)
    np.testing.assert_allclose(moved[:2], [[0.05, 0.5, 0.1, 0.2], [0.7, 0.5, 0.4, 0.2]], atol=1e-6)
    assert kept.tolist() == [True, True, False, False]
    mirrored, _ = move_boxes(boxes, (-0.3, 0.0, 2.0, 1.0), True)
    np.testing.assert_allclose(mirrored[:2, 0], 1 - moved[:2, 0], atol=1e-6)
    empty, none = move_boxes(np.zeros((0, 4), np.float32), (0, 0, 1, 1), True)
    assert empty.shape == (0, 4) and none.shape == (0,)


def test_at_most_so_many_boxes_and_their_order_is_random():
    boxes = np.float32(np.stack([np.linspace(0.1, 0.9, 120)] * 2 + [np.full(120, 0.05)] * 2, 1))
    _, moved, classes = place_boxed(IMAGE, boxes, np.arange(120), 64, np.random.default_rng(0))
    assert moved.shape == (90, 4) and (classes >= 0).all() and len(set(classes.tolist())) == 90
    assert classes.tolist() != sorted(classes.tolist()) and max(classes) > 100
    fixed, kinds = filled(boxes[:2], np.array([4, 5]), 3)
    np.testing.assert_array_equal(fixed, [*boxes[:2], [0, 0, 0, 0]])
    assert kinds.tolist() == [4, 5, -1]


def test_an_image_without_boxes():
    _, moved, classes = place_boxed(IMAGE, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 64, RANDOM)
    assert (moved == 0).all() and (classes == -1).all()


def test_the_same_seed_places_the_same():
    boxes, kinds = np.float32([[0.5, 0.5, 0.3, 0.3]]), np.array([2])
    one, again, other = (place_boxed(IMAGE, boxes, kinds, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], other[0]) and not np.array_equal(one[1], other[1])


def test_the_place_is_drawn_as_darknet_draws_it():
    """The longer side fills the square, and the aspect is within the jitter."""
    aspects = []
    white = np.full((60, 60, 3), 255, np.uint8)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        pixels, _, _ = place_boxed(white, np.zeros((0, 4)), np.zeros(0, int), 96, rng, exposure=1.0)
        filled_in = pixels.min(-1) > 250
        height, width = filled_in.any(1).sum(), filled_in.any(0).sum()
        assert max(height, width) >= 95
        aspects.append(width / height)
    assert 0.53 < min(aspects) < 0.65 and 1.5 < max(aspects) < 1.88
    assert np.median(aspects) == pytest.approx(1, abs=0.06)


def test_colours():
    np.testing.assert_allclose(recolour(IMAGE, 0.0, 1.0, 1.0), IMAGE, atol=7)  # Pillow's 255 hues
    assert np.abs(recolour(IMAGE, 0.0, 1.0, 1.0).astype(int) - IMAGE).mean() < 1.5
    red = np.full((2, 2, 3), (200, 40, 40), np.uint8)
    np.testing.assert_allclose(recolour(red, 1 / 3, 1.0, 1.0)[0, 0], [40, 200, 40], atol=4)
    np.testing.assert_allclose(recolour(red, -1 / 3, 1.0, 1.0)[0, 0], [40, 40, 200], atol=4)
    np.testing.assert_allclose(recolour(red, 0.0, 0.5, 1.0)[0, 0], [200, 120, 120], atol=2)
    np.testing.assert_allclose(recolour(red, 0.0, 1.0, 1.5)[0, 0], [255, 60, 60], atol=2)
    np.testing.assert_allclose(recolour(red, 0.0, 1.0, 1 / 1.5)[0, 0], [133, 27, 27], atol=2)
    grey = np.full((2, 2, 3), 128, np.uint8)
    np.testing.assert_array_equal(recolour(grey, 0.3, 1.5, 1.0), grey)


def test_read_only_images_do():
    """What Pillow gives cannot be written to."""
    pixels = np.asarray(Image.fromarray(IMAGE))
    pixels.flags.writeable = False
    crop_masked(pixels, MASK, 16, RANDOM)
    place_boxed(pixels, np.zeros((0, 4)), np.zeros(0, int), 16, RANDOM)
