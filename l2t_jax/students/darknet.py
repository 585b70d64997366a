"""Darknet's binary files of weights: read, checked to the byte, and written.

A file is a header, int32 major, minor and revision and then `seen`, the images that were trained on, and float32 values
of one convolution after the other:

    bias, weights                            of a convolution with a bias
    beta, gamma, mean, variance, weights     of one with BatchNorm

Weights are (out, in, rows, columns). There are no names or shapes in it, so only its size tells whether it fits.

Legend: K kernel size, I input and O output channels.
"""

import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2t_jax.types import PyTree

_PREFIX = "conv"  # of names, before the place in the file from 1 on


class Header(NamedTuple):
    """What a file of weights says of itself, and its size."""

    version: tuple[int, int, int]  # major, minor, revision
    seen: int  # images that were trained on
    bytes: int  # of the header
    floats: int  # that follow


def name_of(number: int) -> str:
    """The name of the convolution with this place in a file, from 1 on."""
    return f"{_PREFIX}{number}"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the first bytes of a file of weights.

    Args:
      path: the file.
    Returns:
      its header and how many floats it holds.
    Raises:
      ValueError: it is not there, or no header and whole floats.

    Source: darknet's parser, of which two facts are used: `seen` has 8 bytes where 10 major + minor is at least 2 and
    both are below 1000, else 4.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(20)
    except OSError as error:
        raise ValueError(
            f"weights {path} cannot be read ({error.strerror}): give the path of a darknet file."
        ) from error
    if len(start) >= 16:
        major, minor, revision = struct.unpack("<3i", start[:12])
        wide = 10 * major + minor >= 2 and major < 1000 and minor < 1000
        length = 20 if wide else 16
        if len(start) >= length and (size - length) % 4 == 0:
            seen = struct.unpack("<Q" if wide else "<i", start[12:length])[0]
            return Header((major, minor, revision), seen, length, (size - length) // 4)
    raise ValueError(
        f"weights {path} has {size} bytes, which is no header of 16 or 20 bytes and float32 values: give a whole file "
        "of darknet."
    )


def floats_of(shapes: PyTree, count: int | None = None) -> int:
    """How many values of a file the first `count` convolutions take, or all.

    Args:
      shapes: {"params": {"conv1": ...}, "batch_stats": ...} of arrays or of their shapes.
      count: of convolutions; None is all.
    """
    order = _in_order(shapes)[:count]
    return sum(int(np.prod(leaf.shape)) for number in order for _, leaf in _fields(shapes, number))


def read_darknet(
    path: str | os.PathLike[str], shapes: PyTree, ends: Collection[int] | None = None, beyond: Mapping[int, int] = {}
) -> dict[str, PyTree]:
    """Read the convolutions of a network from darknet's binary file.

    Args:
      path: the file.
      shapes: {"params": {"conv1": {"kernel": [K, K, I, O], ...}, ...}, "batch_stats": ...}, arrays or their shapes:
        each convolution has a "bias" or a "norm", with "scale" and "bias", in batch_stats "mean" and "var".
      ends: after how many convolutions a file may end; by default only after all.
      beyond: by a number of convolutions, how many floats may follow that are of another network and are not read.
    Returns:
      variables of this form, float32 NumPy, with the convolutions that the file has.
    Raises:
      ValueError: the file is missing, its size is none of those expected, or a value is not finite.
    """
    path, order = Path(path), _in_order(shapes)
    header = read_header(path)
    ends = (len(order),) if ends is None else sorted(ends)
    sizes = {floats_of(shapes, end): end for end in ends}
    sizes |= {floats_of(shapes, end) + more: end for end, more in beyond.items()}
    if header.floats not in sizes:
        *most, last = (str(header.bytes + 4 * size) for size in sorted(sizes))
        told = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(
            f"weights {path} has {header.bytes + 4 * header.floats} bytes, expected {told}: it is cut off, or of "
            "another network (or width)."
        )
    values = np.fromfile(path, "<f4", floats_of(shapes, sizes[header.floats]), offset=header.bytes)
    if not np.isfinite(values).all():
        raise ValueError(
            f"weights {path} holds values that are not finite, the first at float {np.argmin(np.isfinite(values))}: "
            "give an undamaged file."
        )
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    place = 0
    for number in order[: sizes[header.floats]]:
        for keys, leaf in _fields(shapes, number):
            length = int(np.prod(leaf.shape))
            value = values[place : place + length].astype(np.float32)
            place += length
            if keys[-1] == "kernel":
                rows, columns, inputs, outputs = leaf.shape
                value = np.ascontiguousarray(value.reshape(outputs, inputs, rows, columns).transpose(2, 3, 1, 0))
            within = variables
            for key in keys[:-1]:
                within = within.setdefault(key, {})
            within[keys[-1]] = value
    return variables


def write_darknet(
    path: str | os.PathLike[str],
    variables: PyTree,
    *,
    seen: int = 0,
    version: tuple[int, int, int] = (0, 2, 0),
) -> None:
    """Write a network as darknet's binary file, which darknet and `read_darknet` read.

    Args:
      path: the file; it is overwritten.
      variables: {"params", "batch_stats"} of convolutions "conv1", "conv2", ...; of a student of which only the head is
        trained, put those of its backbone before its own.
      seen: images that were trained on.
      version: major, minor, revision.
    Raises:
      ValueError: the convolutions are not numbered from 1 on.
    """
    major, minor, _ = version
    wide = 10 * major + minor >= 2 and major < 1000 and minor < 1000
    with Path(path).open("wb") as file:
        file.write(struct.pack("<3i", *version) + struct.pack("<Q" if wide else "<i", seen))
        for number in _in_order(variables):
            for keys, leaf in _fields(variables, number):
                value = np.asarray(leaf)
                value = value.transpose(3, 2, 0, 1) if keys[-1] == "kernel" else value
                file.write(np.ascontiguousarray(value, "<f4").tobytes())


def _in_order(variables: PyTree) -> list[int]:
    names = set(variables["params"])
    order = list(range(1, len(names) + 1))
    if names != {name_of(number) for number in order}:
        raise ValueError(
            f"convolutions are {', '.join(sorted(names))}: expected {name_of(1)}, {name_of(2)}, ... without a gap."
        )
    return order


def _fields(variables: PyTree, number: int) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a convolution in the order of the file, with their keys."""
    name = name_of(number)
    params = variables["params"][name]
    kernel = (("params", name, "kernel"), params["kernel"])
    if "norm" not in params:
        return [(("params", name, "bias"), params["bias"]), kernel]
    stats = variables["batch_stats"][name]["norm"]
    return [
        *((("params", name, "norm", key), params["norm"][key]) for key in ("bias", "scale")),
        *((("batch_stats", name, "norm", key), stats[key]) for key in ("mean", "var")),
        kernel,
    ]
