"""Classes that are rare: a long tail, cut out of the training examples of a balanced set. NumPy only.

Legend: n training examples, C classes, mu how often the most frequent class occurs for one example of the rarest.
"""

import numpy as np

from l2t_jax.data import DataError, Dataset, require
from l2t_jax.data.order import require_counts


def long_tail(available: np.ndarray, ratio: float) -> np.ndarray:
    """How many examples of each class a long tail has: n_i = n mu^(-i / (C - 1)), from class 0 down to class C - 1.

    n is as large as what there is of each class allows, so that the profile is exponential whatever that is.

    Args:
      available: [C] examples of each class.
      ratio: mu, at least 1.
    Returns:
      [C] integers, each at least 1 and at most what is available, rounded down from n_i.
    Raises:
      DataError: mu is no number of at least 1.
    Source: Cui et al. 2019; Meta-Weight-Net (NeurIPS 2019), 4.1, where all classes have as many examples.
    """
    if not isinstance(ratio, (int, float, np.number)) or not 1 <= ratio < np.inf:
        raise DataError(
            f"an imbalance of {ratio} is none: give how many times the first class occurs for each example "
            "of the last, at least 1."
        )
    share = float(ratio) ** (-np.arange(len(available)) / max(1, len(available) - 1))
    n = np.min(available / share)
    # A product such as 100 * 0.1 must not lose an example to rounding.
    return np.clip(np.floor(n * share + 1e-6), 1, available).astype(int)


def with_imbalance(dataset: Dataset, ratio: float, seed: int) -> Dataset:
    """Leave out training examples until classes have a long tail; meta set and test set stay as they are.

    Args:
      dataset: of classes: train has "labels" [n], and info says `num_classes`. Where labels are wrong and the right
        ones are known, classes are those: an example's label is not what makes it rare.
      ratio: mu, see `long_tail`; 1 changes nothing.
      seed: of the draw of what is left out; equal seeds leave out the same.
    Returns:
      the data set, the order of the remaining examples as it was.
    Raises:
      DataError: see `long_tail`; the data set is none of classes, or a class has no example.
    """
    require_counts(DataError, seed=(seed, 0))
    classes = getattr(dataset.info, "num_classes", None)
    if classes is None or "labels" not in dataset.train:
        raise DataError(f"{dataset.name}: imbalance is of sets that are classified, and this is none: leave it out.")
    kept = dataset.examples - dataset.meta
    labels = dataset.train.get("true", dataset.train["labels"])[:kept]
    available = np.bincount(labels, minlength=classes)
    require(bool(available.all()), f"{dataset.name}: class {np.argmin(available)} has no example to train on.")
    wanted = long_tail(available, ratio)
    stays = np.ones(dataset.examples, bool)
    stays[:kept] = False
    order = np.random.default_rng((seed, 4)).permutation(kept)
    for label in range(classes):
        members = order[labels[order] == label]
        stays[members[: wanted[label]]] = True
    return dataset if stays.all() else dataset.take(stays)
