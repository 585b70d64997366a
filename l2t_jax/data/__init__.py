"""Data: sets as trees of arrays, the order in which a run reads them, wrong labels."""

from l2t_jax.data.sets import DataError, Dataset, at, hold_out, require
from l2t_jax.data.tfds import read_tfds

__all__ = ["DataError", "Dataset", "at", "hold_out", "read_tfds", "require"]
