"""The sets that are drawn: always the same, and their masks and boxes are of what is seen."""

import numpy as np
import pytest
from lines import said_in_a_line

from l2t_jax.data import Dataset
from l2t_jax.data.drawn import FORMS, drawn_boxes, drawn_masks
from l2t_jax.data.masks import read_pair


@pytest.fixture(scope="module")
def masks():
    return drawn_masks(60, 20)


@pytest.fixture(scope="module")
def boxes():
    return drawn_boxes(60, 20)


@pytest.mark.versions
def test_they_are_always_the_same(masks, boxes):
    of = lambda found: Dataset("drawn", found.train, found.test).sha256  # noqa: E731
    for draw, found in ((drawn_masks, masks), (drawn_boxes, boxes)):
        assert of(draw(60, 20)) == of(found) != of(draw(60, 20, seed=1))
        fewer = draw(7, 3)
        for part, whole in zip(fewer[:2], found[:2], strict=True):
            for one, same in zip(part["image"], whole["image"], strict=False):
                np.testing.assert_array_equal(one, same)
        trained = {image.tobytes() for image in found.train["image"]}
        assert not trained & {image.tobytes() for image in found.test["image"]}


def test_masks(masks):
    assert masks.names == ("background", *FORMS)
    sizes, shares = set(), np.zeros(256)
    for image, mask in zip(masks.train["image"], masks.train["mask"], strict=True):
        read_pair(image, mask, 4)
        assert min(mask.shape) >= 96 and max(mask.shape) <= 129
        sizes.add(mask.shape)
        shares += np.bincount(mask.ravel(), minlength=256) / mask.size / 60
    assert len(sizes) > 40 and (shares[1:4] > 0.02).all() and 0.01 < shares[255] < 0.1 and 0.5 < shares[0] < 0.9


def test_colours_do_not_tell_the_class(masks):
    """The mean colours of the forms are alike, within what so few forms let expect."""
    means = {kind: [] for kind in (1, 2, 3)}
    for image, mask in zip(masks.train["image"], masks.train["mask"], strict=True):
        for kind in means:
            if (mask == kind).any():
                means[kind].append(image[mask == kind].mean(0))
    every = np.concatenate(list(means.values()))
    for own in means.values():
        distance = np.abs(np.mean(own, 0) - every.mean(0))
        assert (distance < 4 * every.std(0) / np.sqrt(len(own))).all() and len(own) > 15


def test_boxes(boxes):
    assert boxes.names == FORMS
    numbers = []
    for part in boxes[:2]:
        for image, each, kinds, area in zip(*(part[k] for k in ("image", "boxes", "classes", "area")), strict=True):
            height, width = image.shape[:2]
            assert min(height, width) >= 96 and max(height, width) <= 128
            numbers.append(len(each))
            low, high = each[:, :2] - each[:, 2:] / 2, each[:, :2] + each[:, 2:] / 2
            assert low.min() >= 0 and high.max() <= 1 and kinds.min() >= 0 and kinds.max() <= 2
            pixels = each[:, 2] * width * each[:, 3] * height
            fill = {0: (0.74, 0.83), 1: (0.5, 1.01), 2: (0.35, 0.55)}  # a circle's is pi / 4
            for kind, share in zip(kinds, area / pixels, strict=True):
                assert fill[kind][0] < share < fill[kind][1]
    assert set(numbers) == {1, 2, 3, 4}


def test_a_box_is_of_what_is_seen(boxes):
    """Within its box a form differs from the ground around it."""
    for i in range(20):
        image = boxes.train["image"][i].astype(float).mean(-1)
        height, width = image.shape
        for x, y in boxes.train["boxes"][i][:, :2] * [width, height]:
            middle = image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean()
            assert abs(middle - np.median(image)) > 25


@pytest.mark.parametrize("draw", [drawn_masks, drawn_boxes])
def test_bad_numbers(draw):
    said_in_a_line(lambda: draw(0), "n_train=0 is not a positive integer")
    said_in_a_line(lambda: draw(5, 2.5), "n_test=2.5 is not a positive integer")
    said_in_a_line(lambda: draw(5, 2, -1), "seed=-1 is not an integer of at least 0")
