"""Wrong labels: which label becomes which, how often, and the clean examples that are kept apart. NumPy only.

Legend: n examples, C classes, p the noise ratio.
"""

import dataclasses

import numpy as np

from l2t_jax.data import DataError, Dataset
from l2t_jax.data.order import require_counts
from l2t_jax.inputs import known

NOISES = ("flip", "flip2", "uniform")
_FAR = 6.0  # standard deviations: a rate of wrong labels further off than this is a mistake, not chance


def transition(kind: str, ratio: float, num_classes: int, seed: int) -> np.ndarray:
    """The matrix whose row i is the distribution of the label that an example of class i gets.

    Args:
      kind: "flip": another class, drawn once for each class, with probability p; "flip2": two other classes, p / 2
        each; "uniform": any class, the right one too, with probability p: p (1 - 1 / C) of the labels are wrong.
      ratio: p in [0, 1].
      num_classes: C.
      seed: of the draw of the other classes.
    Returns:
      [C, C] float64, rows sum to 1.
    Raises:
      DataError: an unknown kind, a ratio outside [0, 1], or too few classes.
    Source: Meta-Weight-Net (NeurIPS 2019), 4.2, whose text and code differ on flips: two other classes is what its
    documentation says, one is the other choice of its code.
    """
    known(f"noise {kind!r}", kind, NOISES, DataError)
    require_counts(DataError, num_classes=(num_classes, 1), seed=(seed, 0))
    if not isinstance(ratio, (int, float, np.number)) or not 0 <= ratio <= 1:
        raise DataError(f"the noise ratio {ratio} must lie between 0 and 1.")
    others = {"flip": 1, "flip2": 2, "uniform": 0}[kind]
    if num_classes < max(2, others + 1):
        raise DataError(f"noise {kind!r} needs {max(2, others + 1)} classes or more, and there are {num_classes}.")
    if kind == "uniform":
        return ratio / num_classes + (1 - ratio) * np.eye(num_classes)
    random = np.random.default_rng((seed, 0))
    matrix = (1 - ratio) * np.eye(num_classes)
    for right in range(num_classes):
        wrong = random.choice(np.delete(np.arange(num_classes), right), others, replace=False)
        matrix[right, wrong] += ratio / others
    return matrix


def corrupt(labels: np.ndarray, matrix: np.ndarray, seed: int) -> np.ndarray:
    """Draw every label [n] anew from its class's row of the matrix, independently; int32 [n].

    Raises:
      DataError: labels are no integers [n] from 0 to C - 1, or the matrix is not [C, C] with rows that are
        distributions.
    """
    labels, matrix = np.asarray(labels), np.asarray(matrix)
    classes = len(matrix) if matrix.ndim else 0
    if matrix.shape != (classes, classes) or not _are_distributions(matrix):
        raise DataError(f"the matrix {list(matrix.shape)} is none of noise: give [C, C] with rows >= 0 that sum to 1.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype}{list(labels.shape)}: expected integers [n], a class for each.")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise DataError(f"label {labels[wrong][0]} is outside 0..{classes - 1}: correct the labels or the matrix.")
    require_counts(DataError, seed=(seed, 0))
    draws = np.random.default_rng((seed, 1)).random(len(labels))
    reached = np.cumsum(matrix, axis=1)[labels] > draws[:, None]  # [n, C]
    # A row may sum to a little less than 1: then the draw may exceed all of it, and the last class with weight is it.
    last = matrix.shape[1] - 1 - np.argmax(matrix[:, ::-1] > 0, axis=1)[labels]
    return np.where(reached.any(axis=1), reached.argmax(axis=1), last).astype(np.int32)


def _are_distributions(rows: np.ndarray) -> bool:
    return bool(np.all(rows >= 0) and np.allclose(rows.sum(axis=1), 1))


def with_noise(dataset: Dataset, kind: str, ratio: float, meta: int, seed: int) -> Dataset:
    """Corrupt the training labels of a data set, all but those of a clean meta set; the test set stays as it is.

    Args:
      dataset: of classes, with right labels: train has "labels" [n], and info says `num_classes`.
      kind, ratio: see `transition`.
      meta: clean examples kept apart, as many of each class (within one, where C does not divide it); 0 for none.
      seed: of the draws; equal seeds give equal data.
    Returns:
      the data set with its training examples in random order, the meta set last, what the labels were under "true".
    Raises:
      DataError: see `transition`; the data set is none of classes, or its labels are wrong already; a class has too
        few examples for the meta set; or, which never happens by chance, the rate of wrong labels is not that of the
        matrix.
    Source: the loader of Meta-Weight-Net; with meta = 0 a method that validates divides the corrupted set itself.
    """
    classes = getattr(dataset.info, "num_classes", None)
    if classes is None or "labels" not in dataset.train:
        raise DataError(f"{dataset.name}: wrong labels are of classes, and this data set has none: leave noise out.")
    if "true" in dataset.train:
        raise DataError(f"{dataset.name}: its labels are wrong already, beside the true ones: leave noise out.")
    if dataset.meta:
        raise DataError(f"{dataset.name}: {dataset.meta} clean examples are apart already: leave noise out.")
    labels = dataset.train["labels"]
    matrix = transition(kind, ratio, classes, seed)
    order = np.random.default_rng((seed, 2)).permutation(len(labels))
    apart = balanced(labels[order], meta, classes)
    order = np.concatenate([order[~apart], order[apart]])
    true = labels[order]
    kept = len(true) - meta
    given = np.concatenate([corrupt(true[:kept], matrix, seed), true[kept:]])
    _check_rate(given[:kept], true[:kept], matrix)
    noisy = dataset.take(order)
    return dataclasses.replace(noisy, train={**noisy.train, "labels": given, "true": true}, meta=meta)


def wrong_share(dataset: Dataset) -> float:
    """The share of wrong labels among the training examples outside the meta set."""
    if "true" not in dataset.train:
        return 0.0
    kept = dataset.examples - dataset.meta
    return float(np.mean(dataset.train["labels"][:kept] != dataset.train["true"][:kept]))


def balanced(labels: np.ndarray, meta: int, classes: int) -> np.ndarray:
    """Which examples [n] are the first meta / C of their class; of a rest, the first classes give one more each."""
    if not isinstance(meta, (int, np.integer)) or meta < 0 or 0 < meta < classes:
        raise DataError(f"a meta set of {meta} must have an example of each of {classes} classes at least, or be 0.")
    chosen = np.zeros(len(labels), bool)
    for label in range(classes):
        wanted = meta // classes + (label < meta % classes)
        members = np.flatnonzero(labels == label)
        if wanted >= len(members):
            raise DataError(
                f"a meta set of {meta} takes {wanted} of the {len(members)} examples of class {label} and leaves none "
                "for training: make it smaller."
            )
        chosen[members[:wanted]] = True
    return chosen


def _check_rate(given: np.ndarray, true: np.ndarray, matrix: np.ndarray) -> None:
    wrong = 1 - np.diagonal(matrix)[true]  # each example's probability of a wrong label
    found, expected = np.mean(given != true), wrong.mean()
    spread = np.sqrt(np.sum(wrong * (1 - wrong))) / len(true)
    if abs(found - expected) > _FAR * spread + 1e-12:
        raise DataError(f"{found:.4f} of the labels are wrong, expected {expected:.4f} ± {spread:.4f}.")
