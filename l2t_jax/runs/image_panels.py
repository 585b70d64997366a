"""Images and what is seen in them: maps of classes, boxes."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from l2t_jax.runs.plots import COLOURS, write

# Of the classes of pixels: matplotlib's twenty and two more in place of its greys, as images under them are grey.
_CLASSES: tuple[Any, ...] = (*(colormaps["tab20"](i) for i in range(20) if i not in (14, 15)), "#393b79", "#637939")


def panels(
    path: str | Path, columns: dict[str, list[Any]], *, names: Sequence[str], title: str, most_labels: int = 8
) -> Figure:
    """Draw images and what is seen in them, a row for each image and a column for each who looks.

    Args:
        path: the picture, its format by the suffix.
        columns: name -> a `tasks.Panel` for each image: maps of classes are laid over the image, boxes drawn on it.
        names: of the classes of maps, for the legend; class 0 is the ground and is left as it is.
        title: above all.
        most_labels: boxes of an image that are labelled, the first ones; the others are drawn bare.
    """
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(2.6 * len(columns), 2.5 * rows + 0.6), layout="constrained")
    seen: set[int] = set()
    for c, (name, each) in enumerate(columns.items()):
        for r, panel in enumerate(each):
            axes = figure.add_subplot(rows, len(columns), r * len(columns) + c + 1)
            axes.set_axis_off()
            axes.imshow(_with_classes(panel))
            if r == 0:
                axes.set_title(name, fontsize="medium")
            if panel.classes is not None:
                seen |= {int(value) for value in np.unique(panel.classes) if 0 < value < len(names)}
            for b, box in enumerate(() if panel.boxes is None else panel.boxes):
                left, top, right, bottom = box
                colour = COLOURS[hash_of(panel.labels[b].split(" ")[0]) % len(COLOURS)]
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2)
                )
                if b < most_labels:
                    axes.text(left, top, panel.labels[b], fontsize=5, color="white", backgroundcolor=colour).set_bbox(
                        {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
                    )
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour_of(value)) for value in sorted(seen)]
    if handles:
        labels = [names[value] for value in sorted(seen)]
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 * len(columns), frameon=False, fontsize="small"
        )
    figure.suptitle(title)
    return write(figure, path)


def _with_classes(panel: Any) -> np.ndarray:
    """The image [H, W, 3] under the colours of the classes of its pixels; those that do not count are white.

    It is grey there, as colours of its own would be taken for those of classes.
    """
    image: np.ndarray = panel.image.astype(np.float32) / 255
    if panel.classes is None:
        return image
    image = np.repeat(image @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=-1)
    classes = np.asarray(panel.classes)
    for value in np.unique(classes):
        if value:
            colour = np.ones(3) if value == 255 else np.array(colour_of(int(value)))
            image[classes == value] = 0.35 * image[classes == value] + 0.65 * colour
    return image


def colour_of(value: int) -> tuple[float, float, float]:
    """The colour of a class from 1 on: twenty that can be told apart, then again from the first."""
    red, green, blue = to_rgb(_CLASSES[(value - 1) % len(_CLASSES)])
    return red, green, blue


def hash_of(word: str) -> int:
    """A number of a word, the same in every process."""
    return zlib.crc32(word.encode())
