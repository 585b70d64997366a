"""Data: loading and checking, and the order of examples as a pure function."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from l2t_jax import data
from l2t_jax.data import DataError

SIZES = {
    "n": 103,
    "validation_ratio": 0.4,
    "stages": 2,
    "unroll_length": 3,
    "batch_size": 7,
    "validation_batch_size": 5,
}  # 62 train in 8 batches and 6 left over, 41 validation in 4 rounds of 10 and 1 left over


def real_data() -> str:
    """Where prepared TFDS data lie on this machine."""
    beside = Path(__file__).parents[1] / "../shared/data/tfds"
    folder = os.environ.get("TFDS_DATA_DIR") or str(beside.resolve())
    if not (Path(folder) / "mnist").is_dir():
        pytest.skip(f"needs prepared MNIST in {folder}: set TFDS_DATA_DIR")
    return folder


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def test_digits_are_split_by_class_and_always_alike(digits: data.Dataset) -> None:
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 16
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert abs(test - (train + test) / 5).max() < 1
    np.testing.assert_allclose(digits.mean[0], digits.train_images.mean())
    np.testing.assert_allclose(digits.std[0], digits.train_images.std())
    assert digits.sha256 == "ceadbeb3288cb26088cfa8f18284605a59bf9dd2c77641ae37631cd16474f4c2"


def test_digits_divide_the_whole_set(digits: data.Dataset) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = {(*image.astype(int), label) for image, label in zip(images, labels, strict=True)}
    parts = [(digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)]
    train, test = ({(*i.ravel(), y) for i, y in zip(*part, strict=True)} for part in parts)
    assert train | test == whole and len(train) + len(test) == len(whole) == 1797


def test_hash_sees_pixels_labels_and_shapes(digits: data.Dataset) -> None:
    images = digits.test_images.copy()
    images[-1, -1, -1] += 1
    others = [
        dataclasses.replace(digits, test_images=images),
        dataclasses.replace(digits, train_labels=np.roll(digits.train_labels, 1)),
        dataclasses.replace(digits, test_images=digits.test_images.reshape(360, 4, 16, 1)),
    ]
    assert len({d.sha256 for d in [digits, *others]}) == 4


def broken(name: str, index: object, value: int, digits: data.Dataset) -> data.Dataset:
    array = getattr(digits, name).copy()
    array[index] = value
    return dataclasses.replace(digits, **{name: array})


def test_check_names_what_is_wrong(digits: data.Dataset) -> None:
    labels = digits.train_labels
    no_threes = labels != 3
    cases = {
        r"train: label 10 at index 17 is outside 0..9 \(1 such": broken("train_labels", 17, 10, digits),
        r"test: label -1 at index 4 .*\(2 such": broken("test_labels", [4, 9], -1, digits),
        r"classes \[3\]": dataclasses.replace(
            digits, train_images=digits.train_images[no_threes], train_labels=labels[no_threes]
        ),
        "1437 images have 1436 labels": dataclasses.replace(digits, train_labels=labels[:-1]),
        "labels are int64": dataclasses.replace(digits, train_labels=labels.astype(np.int64)),
        "images are float64": dataclasses.replace(digits, test_images=digits.test_images / 16),
        r"images are uint8 \(360, 8, 8\)": dataclasses.replace(digits, test_images=digits.test_images[..., 0]),
        r"test images \(4, 8, 1\)": dataclasses.replace(digits, test_images=digits.test_images[:, :4]),
        "1 channels": dataclasses.replace(digits, mean=(1.0, 2.0)),
        "every std must be positive": dataclasses.replace(digits, std=(0.0,)),
    }
    for message, dataset in cases.items():
        with pytest.raises(DataError, match=message):
            data.check(dataset)


def test_missing_and_unknown_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cifar10, cifar100, digits"):
        data.load("cifar")
    with pytest.raises(DataError, match=f"{tmp_path}/cifar10 .*--data_dir=DIR.*--download"):
        data.load("cifar10", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "here"))
    with pytest.raises(DataError, match=f"{tmp_path}/here/mnist"):
        data.load("mnist")


def test_download_without_tensorflow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^Preparing cifar10 needs TensorFlow[^\n]*$"):
        data.load("cifar10", tmp_path, download=True)


def test_the_newest_whole_version_is_read(tmp_path: Path) -> None:
    for version in ("3.0.2", "3.0.10", "3.0.11.incompleteAB12", "4.0.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        if version != "4.0.0":
            (tmp_path / "mnist" / version / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(DataError, match=r"3\.0\.10 is prepared as tfrecord, expected array_record"):
        data.load("mnist", tmp_path)


def test_damaged_data_say_so(tmp_path: Path) -> None:
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    with pytest.raises(DataError, match=r"^Split 'train' of [^\n]*3\.0\.1 could not be read[^\n]*$"):
        data.load("mnist", tmp_path)


def test_real_mnist() -> None:
    mnist = data.load("mnist", real_data())
    # The counts of LeCun, Cortes & Burges.
    assert np.bincount(mnist.train_labels).tolist()[:3] == [5923, 6742, 5958]
    assert mnist.test_images.shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose(mnist.train_images.mean(), mnist.mean[0], rtol=1e-3)
    np.testing.assert_allclose(mnist.train_images.std(), mnist.std[0], rtol=1e-3)


def epoch(number: int, seed: int = 3, **sizes: float) -> tuple[np.ndarray, np.ndarray]:
    """All rounds of an epoch: training batches [K, B], validation batches [K', V]."""
    sizes = SIZES | sizes
    count = data.rounds_per_epoch(data.split_sizes(103, 0.4)[1], sizes["stages"], sizes["validation_batch_size"])
    rounds = [data.round_indices(seed, number * count + r, **sizes) for r in range(count)]
    train, validation = (
        np.concatenate([a.reshape(-1, a.shape[-1]) for a in part]) for part in zip(*rounds, strict=True)
    )
    return train, validation


def test_sizes() -> None:
    assert data.split_sizes(50_000, 0.5) == (25_000, 25_000)
    assert data.split_sizes(100, 0.29) == (71, 29)  # 100 * 0.29 < 29 in floating point
    assert data.rounds_per_epoch(25_000, 1, 100) == 250
    assert data.rounds_per_epoch(41, 2, 5) == 4


def test_round_indices_are_a_pure_function() -> None:
    first = [data.round_indices(3, r, **SIZES) for r in range(9)]
    data.epoch_split.cache_clear()
    data._pass_order.cache_clear()
    again = [data.round_indices(3, r, **SIZES) for r in reversed(range(9))][::-1]
    for (train, validation), (train_again, validation_again) in zip(first, again, strict=True):
        assert train.shape == (2, 3, 7) and validation.shape == (2, 5)
        assert train.dtype == validation.dtype == np.int32
        np.testing.assert_array_equal(train, train_again)
        np.testing.assert_array_equal(validation, validation_again)


def test_results_may_be_written_to() -> None:
    for array in data.round_indices(3, 0, **SIZES):
        array[:] = -1
    assert min(a.min() for a in data.round_indices(3, 0, **SIZES)) >= 0


@pytest.mark.parametrize("number", [0, 1])
def test_an_epoch_keeps_training_and_validation_apart(number: int) -> None:
    train, validation = epoch(number)
    split = data.epoch_split(3, number, 103, 0.4)
    assert sorted([*split.train, *split.validation]) == list(range(103))
    assert set(train.ravel()) <= set(split.train)
    assert validation.ravel().tolist() == split.validation[:40].tolist()  # in order, disjoint, one dropped


def test_training_streams_over_whole_passes() -> None:
    train, _ = epoch(0)
    part = set(data.epoch_split(3, 0, 103, 0.4).train)
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
    splits = [data.epoch_split(s, e, 103, 0.4) for s, e in [(3, 0), (3, 1), (4, 0), (0, 3)]]
    assert len({frozenset(s.validation) for s in splits}) == 4
    assert not np.array_equal(epoch(0)[0].ravel()[:56], splits[0].train[:56])


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
        data.check_sizes(**(SIZES | changed))
    with pytest.raises(ValueError, match=message):
        data.round_indices(3, 0, **(SIZES | changed))


def test_sizes_at_the_edge_are_allowed() -> None:
    train, validation = data.round_indices(3, 5, **(SIZES | {"batch_size": 62, "validation_batch_size": 20}))
    assert sorted(train[0, 0]) == sorted(train[1, 2]) and len(set(validation.ravel())) == 40
    with pytest.raises(ValueError, match="round=-1"):
        data.round_indices(3, -1, **SIZES)
