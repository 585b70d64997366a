"""The order of data as a pure function of (seed, round): so a run can stop anywhere and go on bit for bit. NumPy only.

Legend: n examples, S stages, N unroll length, B training batch, V validation batch.
"""

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class Split(NamedTuple):
    """The examples of one epoch, as indices into the n training examples; together each occurs once."""

    train: np.ndarray  # [n_train] int32
    validation: np.ndarray  # [n_validation] int32


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """What of a pass stands together: blocks of so many examples of one kind, as far as there are so many."""

    kinds: np.ndarray  # [n] integers
    size: int
    # whether the kinds are divided into the two parts, once for a whole run, and not the examples of each; sizes are
    # kept, so of one kind there may be examples in both
    apart: bool = False


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is and which examples each round reads.

    Batches stream on from round to round over the training and over the validation part of an epoch, each of which is
    shuffled anew on every pass; the incomplete last batch of a pass is dropped. With `blocks` a pass has each example
    once too, in blocks of one kind in random order; examples that fill no block come last, by kind.

    An epoch is one pass over the
    validation part: it has n_validation // (S V) rounds, each of which reads S validation batches not read before.

    Raises:
      ValueError: a size is below 1, rounds are below 0, the ratio is not in (0, 1), or a batch exceeds its part.

    Source: the released code of L2T-DLN, which divides anew every epoch, where Algorithm 1 of the paper says nothing.
    It loses one batch, and so one step, where a pass ends within a round; here every round has all its S N batches.
    """

    rounds: int  # of the whole run; 0 trains nothing
    unroll_length: int  # N
    batch_size: int  # B
    validation_batch_size: int  # V
    validation_ratio: float  # part of the examples that validates
    examples: int  # n
    stages: int  # S
    # the last examples, a meta set, validate in every epoch, and batches stream on over the whole run
    fixed_split: bool = False
    meta_trains: bool = False  # the meta set is trained on as well
    # S of the method with which this one is compared, so that both have the same epochs, and, where S N are equal, the
    # same training batches; by default `stages`
    epoch_stages: int | None = None
    blocks: Blocks | None = None  # by default examples stand alone
    # [n] of the examples: some rounds in a row, `buckets`, share their examples out by length
    lengths: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    buckets: int = 1

    def __post_init__(self) -> None:
        epoch_stages = self._epoch_stages
        sizes = {"examples": self.examples, "stages": self.stages, "unroll_length": self.unroll_length}
        sizes |= {"epoch_stages": epoch_stages, "batch_size": self.batch_size, "buckets": self.buckets}
        sizes |= {"validation_batch_size": self.validation_batch_size}
        require_counts(rounds=(self.rounds, 0), **{name: (size, 1) for name, size in sizes.items()})
        if self.blocks is not None:
            for name in ("batch_size", "validation_batch_size"):
                if (size := getattr(self, name)) <= self.blocks.size:
                    raise ValueError(
                        f"{name}={size} holds one block of {self.blocks.size} examples of a class, and no other class "
                        f"beside: give at least {2 * self.blocks.size}, or a smaller per_class."
                    )
        n_train, n_validation = split_sizes(self.examples, self.validation_ratio)
        if self.meta_trains and not self.fixed_split:
            raise ValueError("meta_trains is of a meta set, and the parts are divided anew: give fixed_split.")
        parts = f"{self.examples} examples at validation_ratio={self.validation_ratio} leave"
        if self.batch_size > n_train:
            raise ValueError(
                f"{parts} {n_train} for training, fewer than batch_size={self.batch_size}: lower one of the two."
            )
        if epoch_stages * self.validation_batch_size > n_validation:
            raise ValueError(
                f"{parts} {n_validation} for validation, fewer than the {epoch_stages} x {self.validation_batch_size} "
                "of one round: lower validation_batch_size or raise validation_ratio."
            )

    @property
    def _epoch_stages(self) -> int:
        return self.stages if self.epoch_stages is None else self.epoch_stages

    @property
    def rounds_per_pass(self) -> int:
        """Rounds in which the validation part is read once."""
        _, n_validation = split_sizes(self.examples, self.validation_ratio)
        return n_validation // (self._epoch_stages * self.validation_batch_size)

    @property
    def rounds_per_epoch(self) -> int:
        """An epoch reads the validation part once; where a meta set is kept apart, the training part."""
        if not self.fixed_split:
            return self.rounds_per_pass
        n_train, _ = _sizes(self.examples, self.validation_ratio, self.meta_trains)
        return max(1, n_train // (self.stages * self.unroll_length * self.batch_size))

    def of(self, stages: int) -> "Plan":
        """The same student steps on the same training batches, in the stages that another method reads."""
        length = self.stages * self.unroll_length // stages
        return dataclasses.replace(self, stages=stages, unroll_length=length, epoch_stages=self._epoch_stages)

    def split(self, seed: int, epoch: int) -> Split:
        """The training and the validation part of an epoch: read-only indices, at random in every epoch.

        Where `meta_trains`, the training part is of all examples.

        Raises:
          ValueError: a number is no integer of at least 0.
        """
        require_counts(seed=(seed, 0), epoch=(epoch, 0))
        which = self.examples, self.validation_ratio, self.meta_trains, self.fixed_split, self.blocks
        return _split(seed, epoch, *which)

    def indices(self, seed: int, round: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples a round reads: training indices [S, N, B] and validation indices [S, V], int32.

        Args:
          seed: of the run.
          round: absolute, counted from 0; it may lie beyond the run's end.
        Raises:
          ValueError: a number is no integer of at least 0.
        """
        require_counts(seed=(seed, 0), round=(round, 0))
        if self.buckets > 1 and self.lengths is not None:
            return self._alike(seed, round)
        return self._drawn(seed, round)

    def _alike(self, seed: int, round: int) -> tuple[np.ndarray, np.ndarray]:
        """As `indices`, of rounds of an epoch that share out their examples by length; which is which is drawn."""
        assert self.lengths is not None
        rounds = None if self.fixed_split else self.rounds_per_pass
        r = round if rounds is None else round % rounds
        first = r - r % self.buckets
        count = self.buckets if rounds is None else min(self.buckets, rounds - first)
        drawn = [self._drawn(seed, round - r + first + k) for k in range(count)]
        # Not of the seed: runs side by side have like lengths at the same time.
        chosen = np.random.default_rng((round - r + first, 2)).permutation(count)[r - first]
        found = []
        for part, each in enumerate(zip(*drawn, strict=True)):
            flat = np.concatenate([indices.ravel() for indices in each])
            mine = flat[np.argsort(self.lengths[flat], kind="stable")].reshape(count, -1)[chosen]
            mine = mine[_permutation((seed, round, part, 3), len(mine))]
            found.append(mine.reshape(each[0].shape))
        return found[0], found[1]

    def _drawn(self, seed: int, round: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, r = (0, round) if self.fixed_split else divmod(round, self.rounds_per_pass)
        which = seed, epoch, self.examples, self.validation_ratio, self.meta_trains, self.fixed_split, self.blocks
        steps = self.stages * self.unroll_length
        train = _batches("train", r * steps, (r + 1) * steps, self.batch_size, *which)
        validation = _batches("validation", r * self.stages, (r + 1) * self.stages, self.validation_batch_size, *which)
        return train.reshape(self.stages, self.unroll_length, self.batch_size), validation


@lru_cache(maxsize=32)
def _split(
    seed: int,
    epoch: int,
    n: int,
    validation_ratio: float,
    meta_trains: bool,
    fixed_split: bool,
    blocks: Blocks | None = None,
) -> Split:
    n_train, _ = split_sizes(n, validation_ratio)
    if blocks is not None and blocks.apart:
        order = _permutation((seed, 0, 0), n)
        kinds = blocks.kinds[order]
        places = np.random.default_rng((seed, 0, 0, 4)).permutation(kinds.max() + 1)
        order = order[np.argsort(places[kinds], kind="stable")]
        order.setflags(write=False)
    else:
        order = np.arange(n, dtype=np.int32) if fixed_split else _permutation((seed, epoch, 0), n)
    return Split(order if meta_trains else order[:n_train], order[n_train:])


def _sizes(n: int, validation_ratio: float, meta_trains: bool) -> tuple[int, int]:
    n_train, n_validation = split_sizes(n, validation_ratio)
    return (n if meta_trains else n_train), n_validation


@lru_cache(maxsize=128)
def _pass_order(
    part: str,
    seed: int,
    epoch: int,
    pass_index: int,
    n: int,
    validation_ratio: float,
    meta_trains: bool,
    fixed_split: bool,
    blocks: Blocks | None,
) -> np.ndarray:
    """The training or validation part of an epoch in the order of one pass over it."""
    split = _split(seed, epoch, n, validation_ratio, meta_trains, fixed_split, blocks)
    if part == "train":
        # Counted from 1, for NumPy reads the seeds (s, e) and (s, e, 0) as the same, and the split has 0.
        order = split.train[_permutation((seed, epoch, pass_index + 1), len(split.train))]
    elif pass_index == 0 and not fixed_split:
        order = split.validation  # in random order already
    else:
        order = split.validation[_permutation((seed, epoch, pass_index, 1), len(split.validation))]
    return order if blocks is None else _in_blocks(order, blocks, (seed, epoch, pass_index, 2 + (part == "train")))


def _in_blocks(order: np.ndarray, blocks: Blocks, seeds: tuple[int, ...]) -> np.ndarray:
    """The same examples in blocks of one kind, the blocks in random order; of each kind in the order given."""
    kinds = blocks.kinds[order]
    by_kind = np.argsort(kinds, kind="stable")
    _, begins, counts = np.unique(kinds[by_kind], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(begins, counts)  # of an example among those of its kind
    full = place < np.repeat(counts - counts % blocks.size, counts)
    whole = order[by_kind[full]].reshape(-1, blocks.size)
    found = np.concatenate([whole[_permutation(seeds, len(whole))].ravel(), order[by_kind[~full]]])
    found.setflags(write=False)
    return found


def _batches(part: str, begin: int, end: int, size: int, *which: Any) -> np.ndarray:
    """Batches number begin to end - 1 of those that stream over a part of an epoch, [end - begin, size]."""
    _, _, n, validation_ratio, meta_trains, *_ = which
    per_pass = _sizes(n, validation_ratio, meta_trains)[part == "validation"] // size
    seed, epoch, *rest = which
    places = [divmod(i, per_pass) for i in range(begin, end)]
    return np.stack([_pass_order(part, seed, epoch, p, *rest)[j * size : (j + 1) * size] for p, j in places])


def _permutation(seeds: tuple[int, ...], n: int) -> np.ndarray:
    order = np.random.default_rng(seeds).permutation(n).astype(np.int32)
    order.setflags(write=False)  # it is shared through a cache
    return order
