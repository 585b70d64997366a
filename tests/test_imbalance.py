"""A long tail has the lengths of the literature, spares what is clean or tested on, and is told in the record."""

import json

import numpy as np
import pytest
from launching import SMALL, launch
from sklearn.metrics import balanced_accuracy_score

from experiments import detection, noisy_labels
from l2t_jax.data import DataError, Dataset
from l2t_jax.data.imbalance import long_tail, with_imbalance
from l2t_jax.data.noise import with_noise
from l2t_jax.tasks import load
from l2t_jax.tasks.classification import Classes, classification

EQUAL = np.full(10, 5000)


def a_set(counts, **fields):
    """So many examples of each class, in order; the value of each is its place."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    inputs = np.arange(len(labels), dtype=np.float32)[:, None]
    train = {"inputs": inputs, "labels": labels, **fields}
    return Dataset("own", train, {"inputs": inputs, "labels": labels}, Classes(len(counts), (0.0,), (1.0,)))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1, [5000] * 10),
        # The published sizes of CIFAR-10 with a tail of 10 and of 100.
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
    ],
)
def test_the_lengths_of_a_long_tail(ratio, expected):
    np.testing.assert_array_equal(long_tail(EQUAL, ratio), expected)


def test_where_classes_differ_the_tail_is_as_long_as_the_scarcest_allows():
    np.testing.assert_array_equal(long_tail(np.array([1000, 20, 90]), 100), [200, 20, 2])
    np.testing.assert_array_equal(long_tail(np.array([7, 7]), 1000), [7, 1])


def test_what_stays_are_examples_of_the_set_in_their_order_and_no_two_seeds_alike():
    data = a_set([40, 40, 40])
    one, again, other = (with_imbalance(data, 4, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.bincount(one.train["labels"]), [40, 20, 10])
    assert one.sha256 == again.sha256 != other.sha256
    places = one.train["inputs"][:, 0].astype(int)
    assert (np.diff(places) > 0).all() and (one.index == places).all()
    np.testing.assert_array_equal(one.train["labels"], data.train["labels"][places])
    assert len(one.test["labels"]) == 120
    assert with_imbalance(data, 1, 0) is data


def test_the_clean_part_is_spared_and_rare_is_what_an_example_truly_is():
    noisy = with_noise(a_set([60] * 4), "flip", 0.5, 40, 1)
    tail = with_imbalance(noisy, 10, 1)
    kept = tail.examples - tail.meta
    assert tail.meta == 40
    np.testing.assert_array_equal(np.bincount(tail.train["true"][kept:]), [10] * 4)
    np.testing.assert_array_equal(tail.train["inputs"][kept:], noisy.train["inputs"][-40:])
    np.testing.assert_array_equal(np.bincount(tail.train["true"][:kept]), long_tail(np.full(4, 50), 10))
    assert 0.2 < np.mean(tail.train["true"][:kept] != tail.train["labels"][:kept]) < 0.8


@pytest.mark.parametrize(
    ("data", "ratio", "match"),
    [
        (a_set([5, 5]), 0.5, "an imbalance of 0.5 is none: give how many times"),
        (a_set([5, 5]), np.nan, "an imbalance of nan is none"),
        (a_set([5, 5]), np.inf, "an imbalance of inf is none"),
        (a_set([5, 5]), "2", "an imbalance of 2 is none"),
        (a_set([5, 0, 5]), 2, "class 1 has no example to train on"),
        (
            Dataset("pixels", {"image": np.zeros(3)}, {"image": np.zeros(3)}),
            2,
            "imbalance is of sets that are classified",
        ),
    ],
)
def test_bad_tails(data, ratio, match):
    with pytest.raises(DataError, match=match):
        with_imbalance(data, ratio, 0)


def test_the_score_of_classes_is_that_of_an_independent_implementation():
    task = classification(a_set([5, 5, 5, 5]))  # of the last class nothing is tested
    rng = np.random.default_rng(0)
    true, predicted = np.repeat([0, 1, 2], [50, 20, 5]), rng.integers(0, 4, 75)
    right = (true == predicted).astype(np.float32)
    found = task.score({"accuracy": right, "error": right + 1, "class": true})
    assert found["accuracy"] == pytest.approx(right.mean()) and found["error"] == pytest.approx(right.mean() + 1)
    # which warns of classes that are predicted and never true
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(true, predicted)
    assert found["balanced accuracy"] == pytest.approx(expected)
    assert found["accuracy of 2"] == pytest.approx(right[true == 2].mean()) and "accuracy of 3" not in found


def test_a_run_on_a_long_tail_says_what_it_has_trained_on(tmp_path, capsys):
    """As the README has it, but short; the record has the accuracy of each class."""
    run = ("--noise_ratio=0", "--imbalance=100", "--method=cross_entropy", "--seeds=1", f"--workdir={tmp_path}/run")
    assert launch(noisy_labels, *run, *SMALL) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    counts = summary["config"]["examples_of_class"]
    digits = load("digits")
    balanced = with_noise(digits, "flip2", 0, 100, 1).train["labels"][:-100]
    assert counts == long_tail(np.bincount(balanced), 100).tolist() and counts[0] > 50 * counts[-1]
    scores = {name: value["mean"] for name, value in summary["methods"]["cross_entropy"]["scores"].items()}
    each = [scores[f"accuracy of {label}"] for label in range(10)]
    assert scores["balanced accuracy"] == pytest.approx(np.mean(each))
    shares = np.bincount(digits.test["labels"]) / len(digits.test["labels"])
    assert scores["accuracy"] == pytest.approx(np.dot(shares, each))
    told = capsys.readouterr()
    assert "digits, mlp, long tail of 100" in told.out
    assert f"training examples of each class: {', '.join(map(str, counts))}" in told.err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (noisy_labels, ("--imbalance=0.5",), "imbalance"),
        (noisy_labels, ("--imbalance=nan",), "--imbalance=nan: an imbalance of nan is none: give how many times"),
        (
            detection,
            ("--imbalance=2", "--dataset=shapes"),
            "--imbalance=2: shapes: imbalance is of sets that are classified",
        ),
    ],
)
def test_bad_flags(module, arguments, message, capsys):
    assert launch(module, *arguments, "--rounds=1", "--seeds=1") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
