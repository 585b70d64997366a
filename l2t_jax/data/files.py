"""Files of examples: arrays, tables, images. Each that cannot be read is named in one line. NumPy and Pillow only.

Legend: n examples, H and W height and width in pixels, c channels.
"""

import csv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from l2t_jax.data.sets import DataError, require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_labels(text: str) -> np.ndarray:
    """The labels of a file: a .csv with a column "label", an .npy, or an .npz, whose array is named by FILE:NAME.

    Raises:
      DataError: it cannot be read, or has no such column or array.
    """
    return _one_array(text, "label")


def read_clean(text: str) -> np.ndarray:
    """The indices of a file: a .csv with a column "index", an .npy, or an .npz, whose array is named by FILE:NAME.

    Raises:
      DataError: it cannot be read, or has no such column or array, or an entry is no number.
    """
    found = _one_array(text, "index")
    if found.dtype.kind in "US":
        require(all(word.strip().isdigit() for word in found), f"{text}: an index of a clean example is no number.")
        found = found.astype(int)
    return found


def _one_array(text: str, column: str) -> np.ndarray:
    file, _, key = text.partition(":") if not Path(text).exists() else (text, "", "")
    path = Path(file)
    require(path.is_file(), f"{file} is not there: give a .csv, an .npy, or an .npz as FILE:NAME.")
    if path.suffix == ".csv":
        heads, rows = read_csv(path)
        require(column in heads, f"{path} has the columns {', '.join(heads)}: expected one called {column}.")
        if column == "label" and "index" in heads:
            rows = sorted(rows, key=lambda row: _index(path, row))
        return np.array([row[column] for row in rows])
    if path.suffix == ".npy":
        return next(iter(read_arrays(path).values()))
    require(path.suffix == ".npz", f"{path} is none of a .csv, an .npy and an .npz.")
    arrays = read_arrays(path)
    key = key or (next(iter(arrays)) if len(arrays) == 1 else "")
    require(key in arrays, f"{path} holds {', '.join(arrays)}: say which, as {path}:NAME.")
    return arrays[key]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .npy by name.

    Raises:
      DataError: it cannot be read, or holds Python objects.
    """
    try:
        found = np.load(path, allow_pickle=False)
        return {path.stem: found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} cannot be read ({in_a_line(error)}): give what numpy.savez writes.") from error


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The head of a table in lower case, and its rows.

    Raises:
      DataError: it cannot be read, has no rows, or one has another number of cells than the head.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({in_a_line(error)}): give a .csv in UTF-8.") from error
    require(len(lines) > 1, f"{path} has {len(lines)} lines: expected a head and a line for each example.")
    heads = [head.strip().lower() for head in lines[0]]
    require(len(set(heads)) == len(heads), f"{path} has a column twice: {', '.join(heads)}.")
    for number, row in enumerate(lines[1:], 2):
        require(len(row) == len(heads), f"{path}, line {number}: {len(row)} cells under {len(heads)} heads.")
    return heads, [dict(zip(heads, map(str.strip, row), strict=True)) for row in lines[1:]]


def read_images(files: Sequence[Path], size: tuple[int, int] | None = None) -> np.ndarray:
    """Images [n, H, W, c] uint8, all grey (c = 1) or all coloured (c = 3).

    Raises:
      DataError: one is not there or cannot be read, or their sizes differ and none is given.
    """
    read: list[Image.Image] = []
    for file in files:
        try:
            with Image.open(file) as opened:
                grey = opened.mode in ("1", "L", "I", "I;16", "LA")
                read.append(opened.convert("L" if grey else "RGB"))
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} cannot be read as an image ({in_a_line(error)}).") from error
    if size is not None:
        read = [image.resize(size[::-1], Image.Resampling.BILINEAR) for image in read]
    for file, image in zip(files, read, strict=True):
        require(
            image.size == read[0].size,
            f"{file} is {image.height}x{image.width} and {files[0]} {read[0].height}x{read[0].width}: make all images "
            "one size, or read them by from_folder(path, size=(H, W)).",
        )
    mode = "RGB" if any(image.mode == "RGB" for image in read) else "L"
    arrays = np.stack([np.asarray(image.convert(mode)) for image in read])
    return arrays if mode == "RGB" else arrays[..., None]


def image_files(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Image files below a folder in order, and the folder that holds each, from there."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.parent != folder)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    require(bool(files), f"{folder} holds no image in class folders ({', '.join(IMAGES)}).")
    holding = {file.relative_to(folder).parts[0] for file in files}
    for place in sorted(folder.iterdir()):
        empty = place.is_dir() and not place.name.startswith(".") and place.name not in holding
        require(not empty, f"{place} holds no image ({', '.join(IMAGES)}): put some there, or remove it.")
    return files, np.array([file.parent.relative_to(folder).as_posix() for file in files])


def column_of(path: Path, heads: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that has one of these names, if any.

    Raises:
      DataError: two have.
    """
    found = [head for head in heads if head in names]
    require(len(found) < 2, f"{path} has the columns {' and '.join(found)}: leave one of them.")
    return found[0] if found else None


def number_in(path: Path, row: dict[str, str], head: str, line: int) -> float:
    """The number in a cell.

    Raises:
      DataError: it is none.
    """
    try:
        return float(row[head])
    except ValueError:
        raise DataError(f"{path}, line {line}: {row[head]!r} under {head} is no number.") from None


def _index(path: Path, row: dict[str, str]) -> int:
    require(row["index"].isdigit(), f"{path}: index {row['index']!r} is no whole number from 0 on.")
    return int(row["index"])


def in_a_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
