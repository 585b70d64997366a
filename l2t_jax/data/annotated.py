"""What a reader of annotated images gives: two parts, the names of the classes, and what was left out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from l2t_jax.data.images import Element
from l2t_jax.data.sets import DataError, require


class Annotated(NamedTuple):
    """Images with masks or boxes. All leaves are arrays of objects [n], but for "id", int64 [n].

    Of masks: "image" and "mask". Of boxes: "image", "boxes" float32 [k, 4], the centre's x and y, width and height as
    parts of the image's; "classes" int32 [k]; "crowd" bool [k]; "area" float32 [k] in squared pixels of the original
    image; "id".
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    names: tuple[str, ...]  # of the classes 0 to C - 1
    counts: dict[str, dict[str, int]]  # part -> what was changed or left out, and how often


def check_same(train: Sequence[str], test: Sequence[str], what: str) -> None:
    """Check that both parts call their classes alike.

    Raises:
      DataError: they do not: names the first class that differs.
    """
    require(len(train) == len(test), f"{what}: {len(train)} classes in training and {len(test)} in testing.")
    for place, (one, other) in enumerate(zip(train, test, strict=True)):
        require(one == other, f"{what}: class {place} is {one!r} in training and {other!r} in testing.")


def ends(images: Sequence[Element] | np.ndarray) -> list[int]:
    """The places of what is tried at once when a set is opened: its first and its last image."""
    if not len(images):
        raise DataError("there is no image.")
    return sorted({0, len(images) - 1})
