"""The order of data as a pure function of (seed, epoch, round): so a run can stop anywhere and go on bit for bit.

Legend: n examples, S stages, N unroll length, B training batch, V validation batch. NumPy only.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Split(NamedTuple):
    """The examples of one epoch, as indices into the n training examples; together each occurs once."""

    train: np.ndarray  # [n_train] int32
    validation: np.ndarray  # [n_validation] int32


def require_counts(error: type[ValueError] = ValueError, /, **counts: tuple[Any, int]) -> None:
    """Check named integers, each given with the least it may be.

    Raises:
      ValueError (or `error`): names the first that is no integer or too small.
    """
    for name, (count, least) in counts.items():
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise error(f"{name}={count!r} is not {kind}: give {name} at least {least}.")


def split_sizes(n: int, validation_ratio: float) -> tuple[int, int]:
    """Divide n examples into (n_train, n_validation), n_validation = round(n * validation_ratio).

    Raises:
      ValueError: n is no integer of at least 1, or the ratio is not strictly between 0 and 1.
    """
    require_counts(n=(n, 1))
    if not isinstance(validation_ratio, (int, float, np.number)) or not 0 < validation_ratio < 1:
        raise ValueError(f"validation_ratio={validation_ratio!r} must lie between 0 and 1, both excluded.")
    n_validation = round(n * validation_ratio)
    return n - n_validation, n_validation


def rounds_per_epoch(n_validation: int, stages: int, validation_batch_size: int) -> int:
    """Count the rounds of an epoch, n_validation // (S V): each reads S validation batches not read before.

    Source: the released code of L2T-DLN, where an epoch is one pass over the validation part.
    """
    require_counts(stages=(stages, 1), validation_batch_size=(validation_batch_size, 1))
    return n_validation // (stages * validation_batch_size)


def check_sizes(
    *,
    n: int,
    validation_ratio: float,
    stages: int,
    unroll_length: int,
    batch_size: int,
    validation_batch_size: int,
    fixed_split: bool = False,
    epoch_stages: int | None = None,
) -> None:
    """Check that n examples suffice for at least one round. For the arguments see `round_indices`.

    Raises:
      ValueError: a size is below 1, the ratio is not strictly between 0 and 1, or a batch exceeds its part.
    """
    epoch_stages = stages if epoch_stages is None else epoch_stages
    sizes = {"n": n, "stages": stages, "unroll_length": unroll_length, "epoch_stages": epoch_stages}
    sizes |= {"batch_size": batch_size, "validation_batch_size": validation_batch_size}
    require_counts(**{name: (size, 1) for name, size in sizes.items()})
    n_train, n_validation = split_sizes(n, validation_ratio)
    parts = f"{n} examples at validation_ratio={validation_ratio} leave"
    if batch_size > n_train:
        raise ValueError(f"{parts} {n_train} for training, fewer than batch_size={batch_size}: lower one of the two.")
    if epoch_stages * validation_batch_size > n_validation:
        raise ValueError(
            f"{parts} {n_validation} for validation, fewer than the {epoch_stages} x {validation_batch_size} of "
            "one round: lower validation_batch_size or raise validation_ratio."
        )


@lru_cache(maxsize=32)
def epoch_split(seed: int, epoch: int, n: int, validation_ratio: float, fixed_split: bool = False) -> Split:
    """Divide the n training examples into the training and validation part of an epoch.

    Args:
      seed: of the run.
      epoch: counted from 0; every epoch has a random division of its own.
      n: number of examples.
      validation_ratio: part of them that validates.
      fixed_split: always the last examples validate instead: a meta set that is kept apart.

    Returns:
      Read-only indices.

    Raises:
      ValueError: a number is none, or below 0 (n: below 1); see `split_sizes`.

    Source: Algorithm 1 of L2T-DLN (NeurIPS 2023) has epochs and says nothing of a division; the released
    code divides anew every epoch, as is done here.
    """
    require_counts(seed=(seed, 0), epoch=(epoch, 0))
    n_train, _ = split_sizes(n, validation_ratio)
    order = np.arange(n, dtype=np.int32) if fixed_split else _permutation((seed, epoch, 0), n)
    return Split(order[:n_train], order[n_train:])


@lru_cache(maxsize=128)
def _pass_order(
    part: str, seed: int, epoch: int, pass_index: int, n: int, validation_ratio: float, fixed_split: bool
) -> np.ndarray:
    """The training or validation part of an epoch in the order of one pass over it."""
    split = epoch_split(seed, epoch, n, validation_ratio, fixed_split)
    if part == "train":
        # Counted from 1, for NumPy reads the seeds (s, e) and (s, e, 0) as the same, and the split has 0.
        return split.train[_permutation((seed, epoch, pass_index + 1), len(split.train))]
    if pass_index == 0 and not fixed_split:
        return split.validation  # in random order already
    return split.validation[_permutation((seed, epoch, pass_index, 1), len(split.validation))]


def _batches(part: str, begin: int, end: int, size: int, *which: int | float | bool) -> np.ndarray:
    """Batches number begin to end - 1 of those that stream over a part of an epoch, [end - begin, size]."""
    _, _, n, validation_ratio, _ = which
    per_pass = split_sizes(int(n), validation_ratio)[part == "validation"] // size
    seed, epoch, *rest = which
    places = [divmod(i, per_pass) for i in range(begin, end)]
    return np.stack([_pass_order(part, seed, epoch, p, *rest)[j * size : (j + 1) * size] for p, j in places])


def _permutation(seeds: tuple[int, ...], n: int) -> np.ndarray:
    order = np.random.default_rng(seeds).permutation(n).astype(np.int32)
    order.setflags(write=False)  # it is shared through a cache
    return order


def round_indices(
    seed: int,
    round: int,
    *,
    n: int,
    validation_ratio: float,
    stages: int,
    unroll_length: int,
    batch_size: int,
    validation_batch_size: int,
    fixed_split: bool = False,
    epoch_stages: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Say which examples a round reads, as a pure function of its arguments.

    Batches stream on from round to round over the training and over the validation part of an epoch, each of which is
    shuffled anew on every pass; the incomplete last batch of a pass is dropped. An epoch is one pass over the
    validation part, unless `epoch_stages` says otherwise.

    Args:
      seed: of the run.
      round: absolute, counted from 0.
      n: number of training examples.
      validation_ratio: part of them that validates, re-drawn every epoch.
      stages: S.
      unroll_length: N.
      batch_size: B.
      validation_batch_size: V.
      fixed_split: the last examples validate in every epoch, and batches stream on over the whole run.
      epoch_stages: S of the method with which this one is compared, so that both have the same epochs, and, where S N
        are equal, the same training batches; by default `stages`.

    Returns:
      Training indices [S, N, B] and validation indices [S, V], int32.

    Raises:
      ValueError: see `check_sizes`; or seed or round is no integer of at least 0.

    Source: the released code of L2T-DLN, which however loses one batch, and so one step, where a pass ends
    within a round; here every round has all its S N batches.
    """
    require_counts(seed=(seed, 0), round=(round, 0))
    check_sizes(
        n=n,
        validation_ratio=validation_ratio,
        stages=stages,
        unroll_length=unroll_length,
        batch_size=batch_size,
        validation_batch_size=validation_batch_size,
        epoch_stages=epoch_stages,
    )
    _, n_validation = split_sizes(n, validation_ratio)
    epoch, r = divmod(round, rounds_per_epoch(n_validation, epoch_stages or stages, validation_batch_size))
    if fixed_split:
        epoch, r = 0, round
    which = seed, epoch, n, validation_ratio, fixed_split
    steps = stages * unroll_length
    train = _batches("train", r * steps, (r + 1) * steps, batch_size, *which)
    validation = _batches("validation", r * stages, (r + 1) * stages, validation_batch_size, *which)
    return train.reshape(stages, unroll_length, batch_size), validation
