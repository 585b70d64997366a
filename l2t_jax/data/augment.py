"""Images as a student reads them: of one size, and altered at random together with their masks and boxes.

On the host, in NumPy and Pillow, from a generator: equal generators give equal images. Each is one affine map of the
original, so nothing is resized twice and only pixels that are kept are computed.

Legend: H and W height and width in pixels, s the side of the square that is made, k boxes.
"""

import numpy as np
from PIL import Image

from l2t_jax.data.masks import IGNORED
from l2t_jax.data.sets import require

MEAN = (124, 116, 104)  # red, green, blue: the mean colour of ImageNet's images
GREY = (128, 128, 128)  # .5 of 255
LEAST = 1e-3  # as in l2t_jax.data.boxes
MOST = 90  # boxes an image

Colour = tuple[int, int, int]


def crop_masked(
    image: np.ndarray,
    mask: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    mirror: bool = True,
    mean: Colour = MEAN,
) -> tuple[np.ndarray, np.ndarray]:
    """A square of an image and of its mask, at a random scale and place, mirrored at random.

    Args:
      image: [H, W, 3] uint8.
      mask: [H, W] uint8.
      size: s. A side that is shorter, when scaled, has the image in its middle, `mean` around it, and 255 in the mask.
      rng: what is random is drawn from.
      scale: the least and the largest factor, drawn uniformly.
      mirror: whether half of all are mirrored.
      mean: colour around the image.
    Returns:
      [s, s, 3] uint8, by the nearest four pixels; [s, s] uint8, by the nearest.
    Source: PSPNet (CVPR 2017), 4.1: scale and mirror; its rotation and blur are left out.
    """
    _check_pair(image, mask)
    factor, at_x, at_y, turned = rng.uniform(*scale), rng.random(), rng.random(), mirror and rng.random() < 0.5
    height, width = (max(1, round(side * factor)) for side in mask.shape)
    left, top = _placed(width, size, at_x), _placed(height, size, at_y)
    box = (left, top, width, height)
    pixels = _map(image, size, box, turned, Image.Resampling.BILINEAR, mean)
    return pixels, _map(mask, size, box, turned, Image.Resampling.NEAREST, IGNORED)


def resized_crop(image: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """A square of an image: a part of it at random, mirrored at random; or, without a generator, its middle.

    Args:
      image: [H, W, 3] uint8.
      size: s.
      rng: draws a part of 0.16 to 1 of the image's area, of an aspect of 3/4 to 4/3, and whether it is mirrored. None:
        the largest square less an eighth of it, in the middle.
    Returns:
      [s, s, 3] uint8.
    Source: Szegedy et al. 2015 for the crop, with the least area of Wu et al. 2017's released code.
    """
    height, width = image.shape[:2]
    if rng is None:
        wide = high = min(height, width) * 7 / 8
        at_x = at_y = 0.5
        turned = False
    else:
        area, aspect = rng.uniform(0.16, 1) * height * width, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        wide, high = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
        at_x, at_y, turned = rng.random(), rng.random(), rng.random() < 0.5
    left, top = (width - wide) * at_x, (height - high) * at_y
    part = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, (left, top, left + wide, top + high))
    pixels = np.asarray(part)
    return pixels[:, ::-1] if turned else pixels


def pad_to_canvas(
    image: np.ndarray, mask: np.ndarray, canvas: tuple[int, int], mean: Colour = MEAN
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask in the top left corner of a canvas, `mean` and 255 beside them: for scoring, as it is.

    Args:
      image: [H, W, 3] uint8.
      mask: [H, W] uint8.
      canvas: height and width, at least H and W.
      mean: colour beside the image.
    Returns:
      [*canvas, 3] uint8 and [*canvas] uint8.
    Raises:
      DataError: the image is larger than the canvas.
    """
    _check_pair(image, mask)
    height, width = mask.shape
    require(
        height <= canvas[0] and width <= canvas[1],
        f"an image of {height}x{width} does not fit a canvas of {canvas[0]}x{canvas[1]}: give a larger one.",
    )
    pixels, labels = np.empty((*canvas, 3), np.uint8), np.full(canvas, IGNORED, np.uint8)
    pixels[:] = mean
    pixels[:height, :width], labels[:height, :width] = image, mask
    return pixels, labels


def place_boxed(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    jitter: float = 0.3,
    scale: tuple[float, float] = (1.0, 1.0),
    mirror: bool = True,
    hue: float = 0.1,
    saturation: float = 1.5,
    exposure: float = 1.5,
    most: int = MOST,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image and its boxes in a square, with another aspect, place and colour, mirrored at random.

    The aspect is (W + W u) / (H + H v), u and v uniform in [-jitter, jitter]; the longer side becomes `scale` times the
    square's, and the place is uniform among all where the image is inside (or covers the square, where it is longer).

    Args:
      image: [H, W, 3] uint8.
      boxes: [k, 4] float32, the centre's x and y, width and height, as parts of the image's.
      classes: [k] integers.
      size: s.
      rng: what is random is drawn from.
      jitter: of the aspect.
      scale: the least and the largest of the longer side; darknet has 1 and 1.
      mirror: whether half of all are mirrored.
      hue: the most that the hue is turned by, in turns.
      saturation: the largest factor of the saturation, which is cut off at its largest; as often divided by.
      exposure: likewise, of the brightness.
      most: boxes.
    Returns:
      [s, s, 3] uint8, grey around the image; boxes [most, 4] float32 and classes [most] int32, in random order, the
      rest 0 and -1. Boxes are cut at the border, and left out where less than .001 of the square's side is left.
    Source: darknet's load_data_detection, which places the image by another half pixel.
    """
    height, width = image.shape[:2]
    aspect = width * (1 + rng.uniform(-jitter, jitter)) / (height * (1 + rng.uniform(-jitter, jitter)))
    longer = size * rng.uniform(*scale)
    new_h, new_w = (longer, longer * aspect) if aspect < 1 else (longer / aspect, longer)
    left, top = rng.uniform(0, 1) * (size - new_w), rng.uniform(0, 1) * (size - new_h)
    turned = mirror and bool(rng.random() < 0.5)
    pixels = _map(image, size, (left, top, new_w, new_h), turned, Image.Resampling.BILINEAR, GREY)
    pixels = recolour(pixels, rng.uniform(-hue, hue), _either_way(rng, saturation), _either_way(rng, exposure))
    order = rng.permutation(len(boxes))
    moved, kept = move_boxes(boxes[order], (left / size, top / size, new_w / size, new_h / size), turned)
    return pixels, *filled(moved[kept], classes[order][kept], most)


def recolour(image: np.ndarray, turn: float, saturation: float, exposure: float) -> np.ndarray:
    """Turn the hue of an image, and multiply its saturation and its brightness.

    Args:
      image: [H, W, 3] uint8.
      turn: of the hue, 1 is the whole circle; in steps of 1 / 255.
      saturation: factor; what exceeds the largest is cut off.
      exposure: factor of red, green and blue; what exceeds 255 is cut off.
    Returns:
      [H, W, 3] uint8.
    """
    steps = np.arange(256)
    hues = (steps + round(turn * 255)) % 255  # 0 and 255 are both red
    saturations, values = np.clip(np.rint(steps * saturation), 0, 255), steps
    table = np.concatenate([hues, saturations, values]).astype(int).tolist()
    colours = Image.fromarray(image).convert("HSV").point(table).convert("RGB")
    brighter = np.clip(np.rint(steps * exposure), 0, 255).astype(int).tolist()
    return np.asarray(colours.point(brighter * 3))


def move_boxes(
    boxes: np.ndarray, place: tuple[float, float, float, float], mirrored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an image as boxes of the square it is placed in.

    Args:
      boxes: [k, 4], the centre's x and y, width and height, as parts of the image's.
      place: left, top, width and height of the image, as parts of the square's side.
      mirrored: whether the square is mirrored then.
    Returns:
      [k, 4] float32, cut at the square's border; bools [k], of which .001 of the side or more is left.
    """
    left, top, width, height = place
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    x, y = left + boxes[:, 0] * width, top + boxes[:, 1] * height
    x = 1 - x if mirrored else x
    half = boxes[:, 2:] * (width / 2, height / 2)
    low = np.clip(np.stack([x, y], 1) - half, 0, 1)
    high = np.clip(np.stack([x, y], 1) + half, 0, 1)
    moved = np.concatenate([(low + high) / 2, high - low], 1).astype(np.float32)
    return moved, np.all(moved[:, 2:] >= LEAST, axis=1)


def filled(boxes: np.ndarray, classes: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """The first boxes [k, 4] and classes [k] as arrays [most, 4] float32 and [most] int32; the rest is 0 and -1."""
    fixed, kinds = np.zeros((most, 4), np.float32), np.full(most, -1, np.int32)
    count = min(most, len(boxes))
    fixed[:count], kinds[:count] = boxes[:count], classes[:count]
    return fixed, kinds


def _check_pair(image: np.ndarray, mask: np.ndarray) -> None:
    require(
        image.shape == (*mask.shape, 3),
        f"an image {list(image.shape)} has a mask {list(mask.shape)}: expected [H, W, 3] and [H, W].",
    )


def _placed(side: int, size: int, at: float) -> int:
    """Where a scaled side begins in the square: in its middle if it is shorter, else anywhere, at in [0, 1)."""
    return (size - side) // 2 if side <= size else -int(at * (side - size + 1))


def _either_way(rng: np.random.Generator, most: float) -> float:
    """A factor, or as often one to divide by, uniform between 1 and the most."""
    factor = rng.uniform(1, most)
    return factor if rng.random() < 0.5 else 1 / factor


def _map(
    image: np.ndarray,
    size: int,
    box: tuple[float, float, float, float],
    mirrored: bool,
    how: Image.Resampling,
    around: int | Colour,
) -> np.ndarray:
    """A square in which an image fills left, top, width, height, in pixels; the square is mirrored then."""
    left, top, width, height = box
    across, down = image.shape[1] / width, image.shape[0] / height  # pixels of the image a pixel of the square
    # Pillow asks where a pixel of the square comes from: x' = a x + c, of places, the centre of pixel 0 being 0.5.
    a, c = (-across, (size - left) * across) if mirrored else (across, -left * across)
    data = (a, 0, c, 0, down, -top * down)
    made = Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, data, how, fillcolor=around)
    return np.asarray(made)
