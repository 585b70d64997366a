"""Images of several sizes: an array of objects [n], of which each is decoded when it is read. NumPy and Pillow only.

Legend: n examples, H and W height and width in pixels.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from l2t_jax.data.files import in_a_line
from l2t_jax.data.sets import DataError, require

_WIDE = ("I", "F")  # modes of more than 8 bits, which Pillow would cut off at 255 without a word


class Source(Protocol):
    """A set whose records are read one by one."""

    @property
    def name(self) -> str:
        """What errors and hashes call it."""

    def __len__(self) -> int: ...

    def read(self, index: int, field: str) -> Any:
        """A field of a record: an image encoded, or as an array."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An image in a prepared set, read when it is asked for."""

    source: Source
    index: int
    field: str

    @property
    def place(self) -> str:
        """Where it lies, in words."""
        return f"{self.source.name} of {len(self.source)}, {self.field} {self.index}"


Element = np.ndarray | bytes | Path | Stored
ELEMENTS = (np.ndarray, bytes, Path, Stored)


def objects(elements: Iterable[Any]) -> np.ndarray:
    """An array of objects [n] of n elements, which NumPy would else stack where they are arrays of one shape."""
    given = list(elements)
    array = np.empty(len(given), object)
    for i, element in enumerate(given):
        array[i] = element
    return array


def decode(element: Element, where: str = "") -> np.ndarray:
    """The pixels of an image as they are stored: a rotation in its EXIF data is not applied, as boxes know of none.

    Args:
      element: an array [H, W], [H, W, 1] or [H, W, 3] uint8, an encoded image, a file, or a place in a prepared set.
      where: what to call an array or bytes in an error.
    Returns:
      [H, W, 3] uint8, red, green, blue. Grey, palette and CMYK images are converted; transparency is left out.
    Raises:
      DataError: it is missing, broken, or of more than 8 bits.
    """
    found = _loaded(element)
    if isinstance(found, np.ndarray):
        found = _checked(found, element, where, (1, 3))
        return np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found
    return _opened(found, element, where, _colours)


def decode_mask(element: Element, where: str = "") -> np.ndarray:
    """The classes of an image's pixels: places in the palette of a palette image, else its grey values.

    Args:
      element: as in `decode`; arrays have no colours.
      where: what to call an array or bytes in an error.
    Returns:
      [H, W] uint8.
    Raises:
      DataError: it is missing or broken, or has colours in place of classes.
    """
    found = _loaded(element)
    if isinstance(found, np.ndarray):
        return _checked(found, element, where, (1,))[..., 0]
    return _opened(found, element, where, _classes)


def size_of(element: Element, where: str = "") -> tuple[int, int]:
    """H and W of an image. Of an encoded one only the head is read.

    Raises:
      DataError: it is missing, or no image.
    """
    found = _loaded(element)
    if isinstance(found, np.ndarray):
        height, width, _ = _checked(found, element, where, (1, 3)).shape
        return height, width
    return _opened(found, element, where, lambda image: (image.height, image.width))


def named(element: Element, where: str = "") -> str:
    """What an error calls an element."""
    if isinstance(element, Path):
        return str(element)
    return element.place if isinstance(element, Stored) else where or "an image"


def _loaded(element: Element) -> np.ndarray | bytes | Path:
    return element.source.read(element.index, element.field) if isinstance(element, Stored) else element


def _checked(array: np.ndarray, element: Element, where: str, channels: tuple[int, ...]) -> np.ndarray:
    """[H, W, c] of an array that is an image of so many channels."""
    whole = array[..., None] if array.ndim == 2 else array
    require(
        whole.dtype == np.uint8 and whole.ndim == 3 and whole.shape[-1] in channels and whole.size > 0,
        f"{named(element, where)} is {array.dtype} {list(array.shape)}: expected uint8 [H, W] or [H, W, c] with c = "
        f"{' or '.join(map(str, channels))}.",
    )
    return whole


def _opened(found: bytes | Path, element: Element, where: str, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of an encoded image."""
    name = named(element, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. of odd EXIF data, which are not read
            with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
                return use(image)
    except FileNotFoundError as error:
        raise DataError(f"{name} is not there: put it back, or take it out of the list.") from error
    except DataError as error:
        raise DataError(f"{name} {error}") from error
    # Pillow's readers raise whatever they come upon in a broken file: SyntaxError, IndexError, struct.error, ...
    except Exception as error:
        raise DataError(f"{name} cannot be read as an image ({in_a_line(error)}).") from error


def _colours(image: Image.Image) -> np.ndarray:
    require(not image.mode.startswith(_WIDE), f"has more than 8 bits a pixel (mode {image.mode}): save it with 8.")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns
    return np.asarray(image.convert("RGB"))


def _classes(image: Image.Image) -> np.ndarray:
    require(
        image.mode in ("1", "L", "P"),
        f"has colours (mode {image.mode}) where classes are expected: save it as a palette or grey PNG of 8 bits.",
    )
    pixels = np.asarray(image)
    return pixels.astype(np.uint8)
