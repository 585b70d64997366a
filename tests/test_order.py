"""The order of examples as a pure function of seed, epoch and round."""

import numpy as np
import pytest

from l2t_jax.data import order
from l2t_jax.data.order import Plan

SIZES = {
    "rounds": 9,
    "examples": 103,
    "validation_ratio": 0.4,
    "stages": 2,
    "unroll_length": 3,
    "batch_size": 7,
    "validation_batch_size": 5,
}  # 62 train in 8 batches and 6 left over, 41 validation in 4 rounds of 10 and 1 left over
PLAN = Plan(**SIZES)


def epoch(number: int, seed: int = 3, **sizes: float) -> tuple[np.ndarray, np.ndarray]:
    """All rounds of an epoch: training batches [K, B], validation batches [K', V]."""
    plan = Plan(**(SIZES | sizes))
    count = plan.rounds_per_epoch
    rounds = [plan.indices(seed, number * count + r) for r in range(count)]
    train, validation = (
        np.concatenate([a.reshape(-1, a.shape[-1]) for a in part]) for part in zip(*rounds, strict=True)
    )
    return train, validation


def test_sizes() -> None:
    assert order.split_sizes(50_000, 0.5) == (25_000, 25_000)
    assert order.split_sizes(100, 0.29) == (71, 29)  # 100 * 0.29 < 29 in floating point
    assert Plan(1, 25, 25, 100, 0.5, 50_000, 1).rounds_per_epoch == 250
    assert PLAN.rounds_per_epoch == 4


def test_round_indices_are_a_pure_function() -> None:
    first = [PLAN.indices(3, r) for r in range(9)]
    order._split.cache_clear()
    order._pass_order.cache_clear()
    again = [PLAN.indices(3, r) for r in reversed(range(9))][::-1]
    for (train, validation), (train_again, validation_again) in zip(first, again, strict=True):
        assert train.shape == (2, 3, 7) and validation.shape == (2, 5)
        assert train.dtype == validation.dtype == np.int32
        np.testing.assert_array_equal(train, train_again)
        np.testing.assert_array_equal(validation, validation_again)


def test_results_may_be_written_to() -> None:
    for array in PLAN.indices(3, 0):
        array[:] = -1
    assert min(a.min() for a in PLAN.indices(3, 0)) >= 0


@pytest.mark.parametrize("number", [0, 1])
def test_an_epoch_keeps_training_and_validation_apart(number: int) -> None:
    train, validation = epoch(number)
    split = PLAN.split(3, number)
    assert sorted([*split.train, *split.validation]) == list(range(103))
    assert set(train.ravel()) <= set(split.train)
    assert validation.ravel().tolist() == split.validation[:40].tolist()  # in order, disjoint, one dropped


def test_training_streams_over_whole_passes() -> None:
    train, _ = epoch(0)
    part = set(PLAN.split(3, 0).train)
    passes = train.reshape(3, 8 * 7)  # 4 rounds of 6 batches, 8 a pass: rounds 1 and 2 cross a pass
    for one in passes:
        assert len(set(one)) == 56 and set(one) < part
    assert len({tuple(one) for one in passes}) == 3
    assert len({frozenset(one) for one in passes}) == 3  # what is dropped varies


def test_stages_and_unroll_length_only_cut_the_stream() -> None:
    train, validation = epoch(1)
    for changed in ({"stages": 1, "unroll_length": 3, "validation_batch_size": 10}, {"unroll_length": 1}):
        other, other_validation = epoch(1, **changed)
        np.testing.assert_array_equal(other, train[: len(other)])
        np.testing.assert_array_equal(other_validation.ravel(), validation.ravel())


def test_seed_and_epoch_change_the_order() -> None:
    splits = [PLAN.split(s, e) for s, e in [(3, 0), (3, 1), (4, 0), (0, 3)]]
    assert len({frozenset(s.validation) for s in splits}) == 4
    assert not np.array_equal(epoch(0)[0].ravel()[:56], splits[0].train[:56])


def test_a_meta_set_may_be_trained_on_as_well() -> None:
    """Then a pass over the training part has all examples; what validates is the same."""
    fixed = SIZES | {"fixed_split": True, "epoch_stages": 2}
    plan, apart = Plan(**fixed, meta_trains=True), Plan(**fixed)
    assert plan.split(3, 0).train.tolist() == list(range(103)) and apart.split(3, 0).train.tolist() == list(range(62))
    drawn = [plan.indices(3, r) for r in range(7)]
    train = np.concatenate([part.ravel() for part, _ in drawn])[: 2 * 98]  # 14 batches of 7 a pass, 5 left over
    for one in train.reshape(2, 98):
        assert len(set(one)) == 98 and set(range(62, 103)) & set(one)
    for (_, validation), r in zip(drawn, range(7), strict=True):
        np.testing.assert_array_equal(validation, apart.indices(3, r)[1])
    longer = Plan(**fixed | {"examples": 1030}, meta_trains=True)  # 1030 // 42 and 618 // 42 rounds of an epoch
    assert (longer.rounds_per_epoch, Plan(**fixed | {"examples": 1030}).rounds_per_epoch) == (24, 14)
    with pytest.raises(ValueError, match="meta_trains is of a meta set"):
        Plan(**SIZES, meta_trains=True)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"validation_ratio": 0.0}, "validation_ratio=0.0 must lie between 0 and 1"),
        ({"validation_ratio": 1.0}, "validation_ratio=1.0"),
        ({"batch_size": 63}, "leave 62 for training, fewer than batch_size=63"),
        ({"validation_batch_size": 21}, "leave 41 for validation, fewer than the 2 x 21"),
        ({"unroll_length": 0}, "unroll_length=0"),
        ({"batch_size": -2}, "batch_size=-2"),
    ],
)
def test_impossible_sizes_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**(SIZES | changed))


def test_sizes_at_the_edge_are_allowed() -> None:
    train, validation = Plan(**(SIZES | {"batch_size": 62, "validation_batch_size": 20})).indices(3, 5)
    assert sorted(train[0, 0]) == sorted(train[1, 2]) and len(set(validation.ravel())) == 40
    with pytest.raises(ValueError, match="round=-1"):
        PLAN.indices(3, -1)


def test_a_method_of_single_steps_has_the_same_epochs_and_training_batches() -> None:
    """Six stages of one step read what two stages of three read; validation batches stream over the epoch's part."""
    single = {"stages": 6, "unroll_length": 1, "epoch_stages": 2}
    seen = []
    for r in range(9):  # two epochs of four rounds, and one more
        train, _ = PLAN.indices(3, r)
        other, validation = Plan(**SIZES | single).indices(3, r)
        np.testing.assert_array_equal(other.ravel(), train.ravel())
        assert np.isin(validation, PLAN.split(3, r // 4).validation).all()
        seen.append(validation)
    assert validation.shape == (6, 5)
    streamed = np.concatenate(seen[:4])  # 24 batches of 5 in passes of 8 batches, 41 examples
    passes = streamed.reshape(3, 40)
    assert all(len(np.unique(one)) == 40 for one in passes)
    assert np.any(passes[0] != passes[1])


def test_first_pass_over_the_validation_part_is_its_own_order() -> None:
    """What records of earlier versions read: consecutive blocks of the epoch's division."""
    _, validation = PLAN.indices(3, 5)
    part = PLAN.split(3, 1).validation
    np.testing.assert_array_equal(validation.ravel(), part[10:20])
