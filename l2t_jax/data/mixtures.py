"""Synthetic sets in classes: mixtures of Gaussians seen through a random layer. NumPy only."""

import numpy as np

from l2t_jax.data.order import require_counts

HIDDEN, PARTS = 64, 2


def mixtures(n: int, classes: int, dimension: int = 20, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a set of examples: x = tanh(W z), z ~ N(m_{y,k}, I), k one of two parts of class y.

    The means m are N(0, s^2 / 2) and s is drawn from U(1, 3), so sets are of all difficulties; W is N(0, 1 / D).

    Args:
      n: examples, classes at random.
      classes: C.
      dimension: D of z.
      seed: of all draws.
    Returns:
      inputs [n, 64] float32 in (-1, 1), labels [n] int32.
    Raises:
      ValueError: a count is below 1.
    Source: ours.
    """
    require_counts(n=(n, 1), classes=(classes, 1), dimension=(dimension, 1), seed=(seed, 0))
    random = np.random.default_rng(seed)
    means = random.normal(size=(classes, PARTS, dimension)) * random.uniform(1, 3) / np.sqrt(2)
    labels = random.integers(0, classes, n)
    z = means[labels, random.integers(0, PARTS, n)] + random.normal(size=(n, dimension))
    w = random.normal(size=(dimension, HIDDEN)) / np.sqrt(dimension)
    return np.tanh(z @ w).astype(np.float32), labels.astype(np.int32)
