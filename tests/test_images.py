"""Images of several sizes: what is decoded, what is told of broken ones, and sets of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from lines import said_in_a_line
from PIL import Image

from l2t_jax.data import DataError, Dataset, at, hold_out
from l2t_jax.data.images import Stored, decode, decode_mask, objects, size_of

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (7, 9, 3)).astype(np.uint8)
LABELS = RANDOM.integers(0, 4, (7, 9)).astype(np.uint8)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def palette(labels):
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([value for i in range(256) for value in (255 - i, i * 7 % 256, i)])
    return image


class Shelf:
    """A prepared set of images in memory."""

    name = "shelf"

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, index, field):
        return self.images[index]


@pytest.mark.versions
def test_each_element_gives_the_same_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PIXELS))
    for element in (PIXELS, encoded(PIXELS), tmp_path / "a.png", Stored(Shelf(encoded(PIXELS)), 0, "image")):
        np.testing.assert_array_equal(decode(element), PIXELS)
        assert decode(element).dtype == np.uint8 and size_of(element) == (7, 9)
    (tmp_path / "m.png").write_bytes(encoded(LABELS))
    for element in (LABELS, LABELS[..., None], encoded(LABELS), encoded(palette(LABELS)), tmp_path / "m.png"):
        np.testing.assert_array_equal(decode_mask(element), LABELS)
        assert decode_mask(element).dtype == np.uint8


def test_every_kind_of_image_becomes_red_green_blue():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decode(encoded(grey)), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(decode(grey), np.stack([grey] * 3, -1))
    alpha = np.concatenate([PIXELS, PIXELS[..., :1]], -1)
    np.testing.assert_array_equal(decode(encoded(alpha)), PIXELS)
    np.testing.assert_array_equal(decode(encoded(np.stack([grey, grey], -1))), np.stack([grey] * 3, -1))
    colours = np.array([[255 - i, i * 7 % 256, i] for i in range(4)], np.uint8)
    np.testing.assert_array_equal(decode(encoded(palette(LABELS))), colours[LABELS])
    see_through = encoded(palette(LABELS), transparency=bytes([0, 100, 255, 255]))
    np.testing.assert_array_equal(decode(see_through), colours[LABELS])
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(encoded(flat, "jpeg")).astype(int) - [255, 0, 0]).max() < 12
    assert np.unique(decode(encoded(Image.fromarray(grey > 99)))).tolist() == [0, 255]
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(grey > 99))), grey > 99)


def test_a_rotation_in_exif_is_left_as_it_is():
    """Boxes and masks are of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = encoded(PIXELS, "jpeg", exif=exif)
    assert size_of(file) == (7, 9) == decode(file).shape[:2]


BAD = {
    "no file": (Path("/nowhere/a.png"), "/nowhere/a.png is not there"),
    "a folder": (Path("/"), "cannot be read as an image"),
    "text": (b"hello", "image 3 cannot be read as an image"),
    "nothing": (b"", "cannot be read as an image"),
    "the head alone": (encoded(PIXELS)[:40], "cannot be read as an image"),
    "truncated": (encoded(np.tile(PIXELS, (20, 20, 1)), "jpeg")[:900], "cannot be read as an image"),
    "stored text": (Stored(Shelf(b"x", b"hello"), 1, "image"), "shelf of 2, image 1 cannot be read as an image"),
    "16 bits": (encoded(np.full((4, 4), 900, np.uint16)), r"image 3 has more than 8 bits"),
    "floats": (PIXELS / 255, r"image 3 is float64 \[7, 9, 3\]: expected uint8"),
    "four channels": (np.zeros((2, 2, 4), np.uint8), r"is uint8 \[2, 2, 4\]"),
    "a row": (PIXELS[0, 0], r"is uint8 \[3\]"),
    "no pixel": (PIXELS[:0], r"is uint8 \[0, 9, 3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name):
    element, line = BAD[name]
    said_in_a_line(lambda: decode(element, "image 3"), line)


def test_bad_masks():
    said_in_a_line(lambda: decode_mask(encoded(PIXELS), "mask 3"), r"mask 3 has colours \(mode RGB\).*palette or grey")
    said_in_a_line(lambda: decode_mask(PIXELS, "mask 3"), r"mask 3 is uint8 \[7, 9, 3\]")
    said_in_a_line(lambda: decode_mask(encoded(LABELS.astype(np.uint16))), r"has colours \(mode I;16\)")


def test_images_of_several_sizes_are_a_set(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(encoded(PIXELS[: 3 + i % 4]))
    files = objects(tmp_path / f"{i}.png" for i in range(10))
    boxes = objects(RANDOM.random((i % 3, 4)).astype(np.float32) for i in range(10))
    data = Dataset("mine", {"image": files, "boxes": boxes}, {"image": files[:2], "boxes": boxes[:2]})
    assert data.examples == 10 and at(data.train, np.array([3, 1]))["image"].tolist() == [files[3], files[1]]
    held = hold_out(data, 0.2)
    assert len(held.test["image"]) == 2 and held.examples == 8
    assert held.train["image"].tolist() == files[held.index].tolist()
    with pytest.raises(DataError, match="10 boxes have 9 image"):
        Dataset("mine", {"boxes": boxes, "image": files[:9]}, data.test)


def test_the_hash_sees_elements(tmp_path):
    """Of arrays and bytes the content, of files name and size, of a prepared set the place."""
    (tmp_path / "a.png").write_bytes(encoded(PIXELS))
    shelf = Shelf(encoded(PIXELS), encoded(PIXELS))

    def of(*elements):
        return Dataset("mine", {"image": objects(elements)}, {"image": objects(elements[:1])}).sha256

    other = PIXELS.copy()
    other[0, 0, 0] ^= 1
    kinds = [PIXELS, other, PIXELS[:, :3], encoded(PIXELS), encoded(other), tmp_path / "a.png"]
    kinds += [Stored(shelf, 0, "image"), Stored(shelf, 1, "image"), Stored(Shelf(*shelf.images, b""), 1, "image")]
    assert len({of(kind) for kind in kinds} | {of(PIXELS, other), of(other, PIXELS)}) == len(kinds) + 2
    assert of(PIXELS.copy()) == of(PIXELS) == of(np.asfortranarray(PIXELS))
    before = of(tmp_path / "a.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "b" / "a.png")
    assert of(tmp_path / "b" / "a.png") == before  # a folder may be moved
    said_in_a_line(lambda: of(tmp_path / "a.png"), "a.png is not there")
    said_in_a_line(lambda: of("a.png"), "an example is a str")
    (tmp_path / "b" / "a.png").write_bytes(encoded(PIXELS) + b"\0")
    assert of(tmp_path / "b" / "a.png") != before


def test_arrays_of_one_shape_are_not_stacked():
    assert objects([PIXELS, PIXELS]).shape == (2,) and objects([]).shape == (0,)
