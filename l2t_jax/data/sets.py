"""Data sets: trees of arrays with what is known of them. NumPy only.

Legend: n training examples, m test examples.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2t_jax.types import PyTree


class DataError(ValueError):
    """Data that are missing, unreadable or not what their name promises."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: what `Task.gather` of its task reads. Its parts cannot come apart.

    Leaves may be arrays of objects [n], e.g. images of several sizes: what `Task.read` of its task reads.

    Raises:
      DataError: a leaf is no NumPy array, or the leaves of a part differ in their number of examples.
    """

    name: str
    train: PyTree  # leaves [n, ...], NumPy
    test: PyTree  # leaves [m, ...]
    info: Any = None  # what its task must know besides, e.g. the number of classes: a record of the task's own
    meta: int = 0  # so many of the last training examples are a clean meta set, never trained on
    index: np.ndarray | None = None  # [n] where each training example stood in the set as it was loaded

    def __post_init__(self) -> None:
        count(self.train, f"{self.name} train")
        count(self.test, f"{self.name} test")
        n = self.examples
        require(_is_count(self.meta, n), f"{self.name}: meta={self.meta!r}, expected an integer from 0 to {n - 1}.")
        if self.index is None:
            object.__setattr__(self, "index", np.arange(n))
        found = np.asarray(self.index).shape
        require(found == (n,), f"{self.name}: index is {list(found)}, expected one for each of {n}.")

    @property
    def examples(self) -> int:
        """n, the meta set among them."""
        return count(self.train, f"{self.name} train")

    @property
    def sha256(self) -> str:
        """The hash of all examples, shapes and dtypes included.

        Of an element that is a file: its name and its size in bytes, so that a hundred thousand files are not read for
        it. Of one that lies in a prepared set: its place there, and the set's name and size.
        """
        digest = hashlib.sha256()
        for array in (*jax.tree.leaves(self.train), *jax.tree.leaves(self.test)):
            _add(digest, array)
        return digest.hexdigest()

    def take(self, which: np.ndarray, **changes: Any) -> "Dataset":
        """The training examples at `which` (indices or a mask), all that belongs to each with them.

        Args:
          which: [k] integers or [n] bools.
          **changes: of other fields.
        """
        assert self.index is not None
        return dataclasses.replace(self, train=at(self.train, which), index=self.index[which], **changes)


def at(part: PyTree, which: np.ndarray | slice) -> PyTree:
    """The examples of a part at indices, under a mask or of a slice."""
    return jax.tree.map(lambda leaf: leaf[which], part)


def count(part: PyTree, what: str) -> int:
    """The number of examples of a part.

    Raises:
      DataError: a leaf is no NumPy array of at least one example, or they differ in their number of examples.
    """
    sizes: dict[str, int] = {}
    no_tree = lambda x: x is None or isinstance(x, list)  # noqa: E731  for jax these are trees
    for path, leaf in jax.tree_util.tree_leaves_with_path(part, is_leaf=no_tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "examples"
        kind = type(leaf).__name__
        require(isinstance(leaf, np.ndarray), f"{what}: {name} are a {kind}, expected a NumPy array.")
        require(leaf.size > 0 and leaf.ndim > 0, f"{what}: {name} are {leaf.dtype} {leaf.shape}: there is no example.")
        sizes[name] = len(leaf)
    require(bool(sizes), f"{what}: there is no array.")
    told = " have ".join(f"{size} {name}" for name, size in sizes.items())
    require(len(set(sizes.values())) == 1, f"{what}: {told}: expected one of each for every example.")
    return next(iter(sizes.values()))


def _add(digest: Any, element: Any) -> None:
    """Let a hash see an array, or an element of an array of objects."""
    if isinstance(element, np.ndarray):
        digest.update(f"{element.shape} {element.dtype.str}".encode())
        if element.dtype != object:
            digest.update(np.ascontiguousarray(element).data)
            return
        for part in element.ravel():
            _add(digest, part)
    elif isinstance(element, bytes):
        digest.update(f"bytes {len(element)}".encode() + element)
    elif isinstance(element, Path):
        try:
            digest.update(f"file {element.name} {element.stat().st_size}".encode())
        except OSError as error:
            raise DataError(f"{element} is not there or cannot be read: put it back, or read the set anew.") from error
    else:
        place = getattr(element, "place", None)
        require(isinstance(place, str), f"an example is a {type(element).__name__}: expected an array, bytes or Path.")
        digest.update(f"stored {place}".encode())


def _is_count(value: Any, n: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(0 <= value < n)


def require(condition: bool, message: str) -> None:
    """Raise a DataError with this line unless the condition holds."""
    if not condition:
        raise DataError(message)


def hold_out(dataset: Dataset, share: float, seed: int = 0, *, strata: np.ndarray | None = None) -> Dataset:
    """Put a part of the training examples in the place of the test set: what settings are chosen by.

    Args:
      dataset: whose test set will not be there, so that nothing can read it. Of a meta set nothing is held out.
      share: of the training examples, of each stratum, rounded to whole examples; 0 changes nothing.
      seed: of the draw; equal seeds hold out the same examples.
      strata: [n] the kind of each example, e.g. its class, of which equal shares are held out; by default all are one.
    Returns:
      the data set, its name and the order of the remaining training examples as they were. What is held out has the
      true labels, where some are wrong and the right ones are known.
    Raises:
      DataError: the share is none, or a stratum would have no example in one of the parts.
    """
    require(isinstance(seed, (int, np.integer)) and seed >= 0, f"seed={seed!r} is not an integer of at least 0.")
    require(0 <= share < 1, f"{dataset.name}: the share to hold out is {share}, expected at least 0 and less than 1.")
    if share == 0:
        return dataset
    n = dataset.examples
    kinds = np.zeros(n, int) if strata is None else strata
    require(kinds.shape == (n,), f"{dataset.name}: strata are {list(kinds.shape)}, expected one for each of {n}.")
    held = np.zeros(n, bool)
    order = np.random.default_rng((seed, 3)).permutation(n)
    order = order[order < n - dataset.meta]
    for kind in np.unique(kinds):
        members = order[kinds[order] == kind]
        wanted = round(share * len(members))
        which = "" if strata is None else f" of class {kind}"
        require(
            0 < wanted < len(members),
            f"{dataset.name}: holding out {share:g} of the {len(members)} examples{which} leaves one part without "
            "any: choose another share.",
        )
        held[members[:wanted]] = True
    judged = {"labels": "true"} if "true" in dataset.train else {}  # a test set has right labels
    return dataset.take(~held, test=at({name: dataset.train[judged.get(name, name)] for name in dataset.test}, held))
