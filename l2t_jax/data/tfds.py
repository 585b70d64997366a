"""Prepared TFDS data sets, read without TensorFlow."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2t_jax.data.sets import DataError, require
from l2t_jax.types import PyTree

_READ_BATCH = 2000  # records a read; one at a time is several times slower
_ENCODED_BATCH = 100  # records with whole images
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
    directory = _found(data_dir, download, name)
    return [_read(directory, split, stack) for split in splits]


class Records:
    """A split of a prepared TFDS data set whose records are read when asked for; its images stay encoded.

    Raises:
      DataError: it is missing or unreadable.
    """

    def __init__(self, directory: Path, split: str) -> None:
        _require_array_record(directory)
        import tensorflow_datasets as tfds  # seconds to import

        try:
            builder = tfds.builder_from_directory(directory)
            features = builder.info.features
            images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
            skip = {name: tfds.decode.SkipDecoding() for name in images}
            self._source = builder.as_data_source(split, decoders=skip)
            self._count = len(self._source)
        except Exception as error:
            raise _unreadable(directory, split, error) from error
        self.directory, self.split = directory, split
        self.name = f"{builder.info.full_name} {split}"
        self.fields = tuple(features)
        self._features = features

    def __len__(self) -> int:
        return self._count

    def read(self, index: int, field: str) -> Any:
        """A field of the record at an index; an image encoded."""
        return self._read([index])[0][field]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        for start in range(0, len(self), _ENCODED_BATCH):
            yield from self._read(range(start, min(start + _ENCODED_BATCH, len(self))))

    def classes(self, *path: str) -> tuple[str, ...]:
        """The names of the classes of a feature, e.g. "objects", "label"; () where it is none of classes."""
        feature = self._features
        for key in path:
            feature = getattr(feature, "feature", feature)  # of a sequence
            if not hasattr(feature, "keys") or key not in feature:
                return ()
            feature = feature[key]
        feature = getattr(feature, "feature", feature)
        return tuple(feature.names) if getattr(feature, "num_classes", None) else ()

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return list(self._source.__getitems__(indices))
        except Exception as error:
            raise _unreadable(self.directory, self.split, error) from error


def open_tfds(data_dir: Path, download: bool, name: str) -> tuple[Records, Records]:
    """Open the splits train and validation (where there is none: test) for reading record by record.

    Args:
      data_dir: as in `read_tfds`.
      download: likewise.
      name: likewise.
    Raises:
      DataError: the data are missing or unreadable, or a split is empty.
    """
    directory = _found(data_dir, download, name)
    splits = [split["name"] for split in json.loads((directory / "dataset_info.json").read_text()).get("splits", ())]
    found = Records(directory, "train"), Records(directory, "test" if "validation" not in splits else "validation")
    for records in found:
        require(len(records) > 0, f"{records.name} in {directory} holds no record.")
    return found


def labels_of(records: Records, field: str = "label") -> np.ndarray:
    """The class [n] int32 of each record. Whole records are read for it, so it is kept in the user's cache.

    Raises:
      DataError: a record has none, or cannot be read.
    """
    require(field in records.fields, f"{records.name} has {', '.join(records.fields)}: expected a {field}.")
    about = (records.directory / "dataset_info.json").read_bytes()
    key = hashlib.sha256(about + f"{records.directory} {records.split} {field}".encode()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_jax" / "labels" / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError):
        found: np.ndarray = np.load(kept, allow_pickle=False)
        if found.shape == (len(records),):
            return found
    found = np.fromiter((record[field] for record in records), np.int32, len(records))
    with contextlib.suppress(OSError):  # a cache that cannot be written saves no time, and nothing is wrong
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(written, found)
        written.replace(kept)
    return found


def _found(data_dir: Path, download: bool, name: str) -> Path:
    """The folder of a prepared data set, prepared now where it is missing and that is asked for."""
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
    return directory


def _prepared(data_dir: Path, name: str) -> Path | None:
    """The newest version of a data set, sought without TFDS: its errors mislead where data are missing.

    The folder of the set itself, or of one of its versions, does as well.
    """
    parts = Path(name).parts  # two where a set has kinds: coco/2017
    is_its = lambda place: place.parts[-len(parts) :] == parts  # noqa: E731
    folder = next((place for place in (data_dir, data_dir.parent) if is_its(place)), data_dir / name)
    found = [p.parent for p in folder.glob("*/dataset_info.json")]
    versions = [p for p in found if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _read(directory: Path, split: str, stack: Stack) -> PyTree:
    _require_array_record(directory)
    import tensorflow_datasets as tfds  # seconds to import

    try:
        source = tfds.builder_from_directory(directory).as_data_source(split)
        blocks = [range(i, min(i + _READ_BATCH, len(source))) for i in range(0, len(source), _READ_BATCH)]
        parts = [stack(source.__getitems__(block)) for block in blocks]
    except Exception as error:
        raise _unreadable(directory, split, error) from error
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _require_array_record(directory: Path) -> None:
    stored = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    require(
        stored == "array_record",
        f"{directory} is prepared as {stored}, expected array_record: remove it and run with --download.",
    )


def _unreadable(directory: Path, split: str, error: Exception) -> DataError:
    return DataError(
        f"Split {split!r} of {directory} could not be read ({_reason(error)}): check that all of its "
        "array_record files are there, or remove the directory and run with --download."
    )


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
