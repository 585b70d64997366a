"""Data: sets as arrays, the order in which a run reads them, wrong labels."""

from l2t_jax.data.sets import DATASETS, DataError, Dataset, check, hold_out, load

__all__ = ["DATASETS", "DataError", "Dataset", "check", "hold_out", "load"]
