"""Wrong labels: their law, the meta set kept clean, and what reaches a method."""

import numpy as np
import pytest
from altered import altered

from l2t_jax.data import DataError, noise
from l2t_jax.data.order import Plan
from l2t_jax.tasks import load
from l2t_jax.tasks.classification import check, classification

DIGITS = load("digits")


@pytest.mark.parametrize("kind", noise.NOISES)
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_rows_are_distributions(kind, ratio):
    matrix = noise.transition(kind, ratio, 10, seed=1)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    wrong = ratio * (1 - 1 / 10) if kind == "uniform" else ratio
    np.testing.assert_allclose(1 - np.diagonal(matrix), wrong)
    targets = (matrix - np.diag(np.diagonal(matrix)) > 0).sum(axis=1)
    assert set(targets) == ({0} if ratio == 0 else {{"flip": 1, "flip2": 2, "uniform": 9}[kind]})
    if kind == "flip2":
        np.testing.assert_allclose(matrix[matrix > 0][:1], ratio / 2 if ratio == 1 else matrix[0][matrix[0] > 0][0])


def test_flips_are_drawn_anew_by_seed():
    first, again, other = (noise.transition("flip2", 0.4, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("kind", noise.NOISES)
def test_labels_follow_the_matrix(kind):
    """Each class's labels are distributed as its row, within five standard deviations."""
    matrix = noise.transition(kind, 0.4, 5, seed=0)
    true = np.repeat(np.arange(5, dtype=np.int32), 20_000)
    given = noise.corrupt(true, matrix, seed=3)
    found = np.stack([np.bincount(given[true == i], minlength=5) / 20_000 for i in range(5)])
    assert np.all(np.abs(found - matrix) <= 5 * np.sqrt(matrix * (1 - matrix) / 20_000) + 1e-12)
    assert given.dtype == np.int32


def test_meta_set_is_clean_balanced_and_last():
    noisy = noise.with_noise(DIGITS, "flip", 0.4, meta=100, seed=0)
    check(noisy)
    np.testing.assert_array_equal(noisy.train["labels"][-100:], noisy.train["true"][-100:])
    np.testing.assert_array_equal(np.bincount(noisy.train["labels"][-100:]), 10)
    assert 0.33 < noise.wrong_share(noisy) < 0.47  # 0.4 within six standard deviations of 1337 draws
    np.testing.assert_array_equal(noisy.test["labels"], DIGITS.test["labels"])
    # The same examples with the same true labels, in another order.
    row = lambda d, labels: sorted(zip(map(bytes, d.train["inputs"]), labels.tolist(), strict=True))  # noqa: E731
    assert row(noisy, noisy.train["true"]) == row(DIGITS, DIGITS.train["labels"])
    again = noise.with_noise(DIGITS, "flip", 0.4, meta=100, seed=0)
    assert again.sha256 == noisy.sha256 != noise.with_noise(DIGITS, "flip", 0.4, meta=100, seed=1).sha256
    assert altered(noisy, train_true=noisy.train["labels"]).sha256 != noisy.sha256


def test_meta_set_within_one_where_classes_do_not_divide_it():
    counts = np.bincount(noise.with_noise(DIGITS, "uniform", 0.2, meta=23, seed=0).train["true"][-23:], minlength=10)
    assert counts.tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("swap", 0.4, 100), "noise 'swap' is unknown; choose one of flip, flip2, uniform."),
        (("flip", 1.4, 100), "the noise ratio 1.4 must lie between 0 and 1."),
        (("flip", 0.4, 5), "must have an example of each of 10 classes"),
        (("flip", 0.4, -1), "must have an example of each of 10 classes"),
        (("flip", 0.4, 1437), "leaves none for training: make it smaller."),
    ],
)
def test_bad_arguments(arguments, message):
    kind, ratio, meta = arguments
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        noise.with_noise(DIGITS, kind, ratio, meta, seed=0)


def test_flip2_needs_three_classes():
    with pytest.raises(DataError, match="needs 3 classes or more, and there are 2"):
        noise.transition("flip2", 0.4, 2, seed=0)


def test_a_wrong_rate_is_refused(monkeypatch):
    monkeypatch.setattr(noise, "corrupt", lambda labels, matrix, seed: labels)
    with pytest.raises(DataError, match=r"0\.0000 of the labels are wrong, expected 0\.4000"):
        noise.with_noise(DIGITS, "flip", 0.4, meta=100, seed=0)


def test_methods_train_on_the_noisy_part_only():
    """Training batches come from the corrupted part, validation batches from the meta set, with labels as given."""
    noisy = noise.with_noise(DIGITS, "flip", 0.4, meta=100, seed=0)
    n = len(noisy.train["labels"])
    plan = Plan(9, 5, 25, 50, 100 / n, n, 1, fixed_split=True)
    rounds = [plan.indices(0, r) for r in range(30)]
    train, validation = (np.concatenate([part[i].ravel() for part in rounds]) for i in (0, 1))
    assert train.max() < n - 100 <= validation.min()
    passes = train[: 53 * 25].reshape(53, 25)  # 1337 examples: 53 batches, 12 left over
    assert len(np.unique(passes)) == 53 * 25
    np.testing.assert_array_equal(np.unique(validation[:100]), np.arange(n - 100, n))
    assert np.any(validation[:100] != validation[100:200])  # shuffled anew on every pass
    assert plan.rounds_per_epoch == 1337 // 125

    batch = classification(noisy).gather(noisy.train, train[:500], None)
    np.testing.assert_array_equal(batch.targets, noisy.train["labels"][train[:500]])
    np.testing.assert_array_equal(batch.true, noisy.train["true"][train[:500]])
    assert np.mean(np.asarray(batch.targets) != np.asarray(batch.true)) > 0.3
    assert classification(DIGITS).gather(DIGITS.train, np.arange(3), None).true == ()
