"""Two sets that are drawn here, always the same, so that nothing need be downloaded to try masks and boxes.

Circles, squares and triangles on a ground with a texture and noise. Their colours are drawn at random, so that only the
form tells the class. NumPy only.

Legend: n examples, H and W height and width in pixels.
"""

from typing import NamedTuple

import numpy as np

from l2t_jax.data.annotated import Annotated
from l2t_jax.data.images import objects
from l2t_jax.data.masks import IGNORED
from l2t_jax.data.order import require_counts
from l2t_jax.data.sets import DataError

FORMS = ("circle", "square", "triangle")
_SIDES = (96, 129)  # of images of masks: the least and the largest
_BOXED_SIDES = (96, 128)
_RADII, _BOXED_RADII = (0.16, 0.28), (0.12, 0.24)  # of the shorter side
_TURN = 0.35  # the most that a form is turned by, radians
_CONTRAST = 70.0  # the least difference in brightness of a form and its ground, of 255
_NOISE = 12.0  # standard deviation of each pixel
_BORDER = 1.0  # pixels on either side of a form's edge that do not count, as in VOC
_TRIES = 20  # places tried for a form until it touches no other


class _Form(NamedTuple):
    """A form in an image."""

    rows: slice  # of the image, where it may be
    columns: slice
    depth: np.ndarray  # how far each pixel there is inside, in pixels; negative outside
    kind: int  # of `FORMS`


def drawn_masks(n_train: int = 400, n_test: int = 100, seed: int = 0) -> Annotated:
    """Images of 96 to 129 pixels with one to three forms, and masks: 0 background, 1 to 3 `FORMS`, 255 their edges.

    Args:
      n_train: training examples.
      n_test: test examples.
      seed: equal seeds draw equal sets; an example does not depend on how many there are.
    Returns:
      leaves "image" [n] of [H, W, 3] uint8 and "mask" [n] of [H, W] uint8.
    Raises:
      DataError: a number is no integer, or no example would be there.
    """
    require_counts(DataError, n_train=(n_train, 1), n_test=(n_test, 1), seed=(seed, 0))
    parts = []
    for part, n in enumerate((n_train, n_test)):
        drawn = [_draw(np.random.default_rng((seed, 0, part, i)), _SIDES, _RADII, 3) for i in range(n)]
        masks = [_mask(image.shape[:2], forms) for image, forms in drawn]
        parts.append({"image": objects(image for image, _ in drawn), "mask": objects(masks)})
    return Annotated(parts[0], parts[1], ("background", *FORMS), {"train": {}, "test": {}})


def drawn_boxes(n_train: int = 400, n_test: int = 100, seed: int = 0) -> Annotated:
    """Images of 96 to 128 pixels with one to four forms that do not touch, and their boxes.

    Args:
      n_train: training examples.
      n_test: test examples.
      seed: equal seeds draw equal sets; an example does not depend on how many there are.
    Returns:
      leaves as of `Annotated`: the boxes are those of the forms' pixels, the areas their number; none is a crowd.
    Raises:
      DataError: a number is no integer, or no example would be there.
    """
    require_counts(DataError, n_train=(n_train, 1), n_test=(n_test, 1), seed=(seed, 0))
    parts = []
    for part, n in enumerate((n_train, n_test)):
        drawn = [_draw(np.random.default_rng((seed, 1, part, i)), _BOXED_SIDES, _BOXED_RADII, 4) for i in range(n)]
        told = [[_box(form, image.shape[:2]) for form in forms] for image, forms in drawn]
        kinds = [np.array([form.kind for form in forms], np.int32) for _, forms in drawn]
        parts.append(
            {
                "image": objects(image for image, _ in drawn),
                "boxes": objects(np.array([box for box, _ in each], np.float32) for each in told),
                "classes": objects(kinds),
                "crowd": objects(np.zeros(len(each), bool) for each in told),
                "area": objects(np.array([area for _, area in each], np.float32) for each in told),
                "id": np.arange(n, dtype=np.int64),
            }
        )
    return Annotated(parts[0], parts[1], FORMS, {"train": {}, "test": {}})


def _draw(
    rng: np.random.Generator, sides: tuple[int, int], radii: tuple[float, float], most: int
) -> tuple[np.ndarray, list[_Form]]:
    """An image [H, W, 3] uint8 and its forms, which do not touch."""
    height, width = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
    ground = rng.uniform(40, 215, 3)
    canvas = _ground(rng, height, width, ground)
    free = np.ones((height, width), bool)
    forms: list[_Form] = []
    for _ in range(int(rng.integers(1, most + 1))):
        form = _place(rng, free, radii)
        if form is None:
            break  # the image is full
        forms.append(form)
        free[form.rows, form.columns] &= form.depth < -2 * _BORDER
        share = np.clip(form.depth + 0.5, 0, 1)[..., None].astype(np.float32)  # soft edges
        patch = canvas[form.rows, form.columns]
        patch += share * (_colour(rng, ground).astype(np.float32) - patch)
    canvas += _NOISE * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(np.rint(canvas, out=canvas), 0, 255).astype(np.uint8), forms


def _ground(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """Waves of two directions over one colour, [H, W, 3] float32."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    angle, length = rng.uniform(0, np.pi), rng.uniform(6, 25)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * np.float32(2 * np.pi / length) + rng.uniform(0, 6))
    slope = (x / width - 0.5) * rng.uniform(-1, 1) + (y / height - 0.5) * rng.uniform(-1, 1)
    shade = wave * rng.uniform(5, 15) + slope * 30
    return (colour + shade[..., None]).astype(np.float32)


def _colour(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A colour whose brightness is far from the ground's."""
    colour = rng.uniform(0, 255, 3)
    difference = colour.mean() - ground.mean()
    if abs(difference) < _CONTRAST:
        side = 1 if ground.mean() < 128 else -1  # where there is room
        colour += side * _CONTRAST - difference
    return np.clip(colour, 0, 255)


def _place(rng: np.random.Generator, free: np.ndarray, radii: tuple[float, float]) -> _Form | None:
    """A form where nothing is yet, all of it inside; None where none was found."""
    height, width = free.shape
    for _ in range(_TRIES):
        radius = rng.uniform(*radii) * min(height, width)
        reach = radius + 2
        at_y, at_x = rng.uniform(reach, height - reach), rng.uniform(reach, width - reach)
        kind, turn = int(rng.integers(len(FORMS))), rng.uniform(-_TURN, _TURN)
        rows = slice(int(at_y - reach), int(at_y + reach) + 1)
        columns = slice(int(at_x - reach), int(at_x + reach) + 1)
        depth = _depth(kind, rows, columns, at_y, at_x, radius, turn)
        if free[rows, columns][depth > -2 * _BORDER].all():
            return _Form(rows, columns, depth, kind)
    return None


def _depth(kind: int, rows: slice, columns: slice, at_y: float, at_x: float, radius: float, turn: float) -> np.ndarray:
    """How far pixels are inside a form that fits a circle of this radius."""
    y = (np.arange(rows.start, rows.stop) + 0.5 - at_y)[:, None]
    x = np.arange(columns.start, columns.stop) + 0.5 - at_x
    if FORMS[kind] == "circle":
        return 0.85 * radius - np.hypot(x, y)
    # The distance to each side: all are as far from the centre.
    count = 4 if FORMS[kind] == "square" else 3
    angles = turn + np.pi / 2 + np.arange(count) * 2 * np.pi / count
    sides = [np.cos(angle) * x + np.sin(angle) * y for angle in angles]
    return radius * np.cos(np.pi / count) - np.max(sides, axis=0)


def _mask(shape: tuple[int, ...], forms: list[_Form]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for form in forms:
        patch = mask[form.rows, form.columns]
        patch[form.depth > 0] = form.kind + 1
        patch[np.abs(form.depth) < _BORDER] = IGNORED
    return mask


def _box(form: _Form, shape: tuple[int, ...]) -> tuple[tuple[float, float, float, float], int]:
    """The box of a form's pixels, as parts of the image, and their number."""
    inside = form.depth > 0
    ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, bottom = form.rows.start + ys[0], form.rows.start + ys[-1] + 1
    left, right = form.columns.start + xs[0], form.columns.start + xs[-1] + 1
    height, width = shape
    box = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    return box, int(inside.sum())
