"""Prepared TFDS data sets, read without TensorFlow."""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2t_jax.data.sets import DataError, require
from l2t_jax.types import PyTree

_READ_BATCH = 2000  # records a read; one at a time is several times slower
Stack = Callable[[list[dict[str, Any]]], PyTree]


def read_tfds(data_dir: Path, download: bool, name: str, splits: Sequence[str], stack: Stack) -> list[PyTree]:
    """Read splits of a prepared TFDS data set; needs no TensorFlow.

    Args:
      data_dir: holds `name`/version/dataset_info.json and array_record files; or the folder `name` in it.
      download: whether to prepare what is missing.
      name: TFDS name.
      splits: names of splits.
      stack: some records -> a tree of arrays, leaves [k, ...].
    Returns:
      a tree for each split, in TFDS's order.
    Raises:
      DataError: the data are missing or unreadable.
    """
    directory = _prepared(data_dir, name)
    if directory is None and download:
        _download(data_dir, name)
        directory = _prepared(data_dir, name)
    if directory is None:
        raise DataError(
            f"{name} is not in {data_dir / name} (no version has a dataset_info.json): point --data_dir=DIR (or "
            "TFDS_DATA_DIR) at prepared array_record data, or run once with --download, which needs "
            "TensorFlow for preparing (pip install tensorflow)."
        )
    return [_read(directory, split, stack) for split in splits]


def _prepared(data_dir: Path, name: str) -> Path | None:
    """The newest version of a data set, sought without TFDS: its errors mislead where data are missing.

    The folder of the set itself, or of one of its versions, does as well.
    """
    folder = next((place for place in (data_dir, data_dir.parent) if place.name == name), data_dir / name)
    found = [p.parent for p in folder.glob("*/dataset_info.json")]
    versions = [p for p in found if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _read(directory: Path, split: str, stack: Stack) -> PyTree:
    stored = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    require(
        stored == "array_record",
        f"{directory} is prepared as {stored}, expected array_record: remove it and run with --download.",
    )
    import tensorflow_datasets as tfds  # seconds to import

    try:
        source = tfds.builder_from_directory(directory).as_data_source(split)
        blocks = [range(i, min(i + _READ_BATCH, len(source))) for i in range(0, len(source), _READ_BATCH)]
        parts = [stack(source.__getitems__(block)) for block in blocks]
    except Exception as error:
        raise DataError(
            f"Split {split!r} of {directory} could not be read ({_reason(error)}): check that all of its "
            "array_record files are there, or remove the directory and run with --download."
        ) from error
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _download(data_dir: Path, name: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        # Asked for first: TFDS finds out only after the download.
        raise DataError(f"Preparing {name} needs TensorFlow, which is not installed: pip install tensorflow.")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        # A folder of its own: archives of MNIST and Fashion-MNIST have the same names.
        builder.download_and_prepare(download_dir=data_dir / "downloads" / name)
    except Exception as error:
        raise DataError(
            f"{name} could not be downloaded and prepared in {data_dir} ({_reason(error)}): check the "
            "network and TensorFlow, or point --data_dir=DIR at prepared data."
        ) from error


def _reason(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
