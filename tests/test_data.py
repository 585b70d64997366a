"""Data: loading and checking."""

import dataclasses
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from altered import altered
from PIL import Image

from l2t_jax.data import DataError, Dataset, hold_out
from l2t_jax.data.noise import with_noise, wrong_share
from l2t_jax.tasks import load
from l2t_jax.tasks.classification import check


def real_data() -> str:
    """Where prepared TFDS data lie on this machine."""
    beside = Path(__file__).parents[1] / "../shared/data/tfds"
    folder = os.environ.get("TFDS_DATA_DIR") or str(beside.resolve())
    if not (Path(folder) / "mnist").is_dir():
        pytest.skip(f"needs prepared MNIST in {folder}: set TFDS_DATA_DIR")
    return folder


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.mark.versions
def test_digits_are_split_by_class_and_always_alike(digits: Dataset) -> None:
    assert digits.train["inputs"].shape == (1437, 8, 8, 1) and digits.test["inputs"].shape == (360, 8, 8, 1)
    assert digits.train["inputs"].min() == 0 and digits.train["inputs"].max() == 16
    train, test = np.bincount(digits.train["labels"]), np.bincount(digits.test["labels"])
    assert abs(test - (train + test) / 5).max() < 1
    np.testing.assert_allclose(digits.info.mean[0], digits.train["inputs"].mean())
    np.testing.assert_allclose(digits.info.std[0], digits.train["inputs"].std())
    assert digits.sha256 == "ceadbeb3288cb26088cfa8f18284605a59bf9dd2c77641ae37631cd16474f4c2"


def test_digits_divide_the_whole_set(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = {(*image.astype(int), label) for image, label in zip(images, labels, strict=True)}
    parts = [(digits.train["inputs"], digits.train["labels"]), (digits.test["inputs"], digits.test["labels"])]
    train, test = ({(*i.ravel(), y) for i, y in zip(*part, strict=True)} for part in parts)
    assert train | test == whole and len(train) + len(test) == len(whole) == 1797


def test_hash_sees_pixels_labels_and_shapes(digits: Dataset) -> None:
    images = digits.test["inputs"].copy()
    images[-1, -1, -1] += 1
    others = [
        altered(digits, test_inputs=images),
        altered(digits, train_labels=np.roll(digits.train["labels"], 1)),
        altered(digits, test_inputs=digits.test["inputs"].reshape(360, 4, 16, 1)),
    ]
    assert len({d.sha256 for d in [digits, *others]}) == 4


def put(array: np.ndarray, index: object, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_check_names_what_is_wrong(digits: Dataset) -> None:
    images, labels, held = digits.train["inputs"], digits.train["labels"], digits.test["inputs"]
    no_threes = labels != 3
    cases: dict[str, dict[str, Any]] = {
        r"train: label 10 at index 17 is outside 0..9 \(1 such": {"train_labels": put(labels, 17, 10)},
        r"test: label -1 at index 4 .*\(2 such": {"test_labels": put(digits.test["labels"], [4, 9], -1)},
        r"classes \[3\]": {"train_inputs": images[no_threes], "train_labels": labels[no_threes]},
        "1437 inputs have 1436 labels": {"train_labels": labels[:-1]},
        "labels are int64": {"train_labels": labels.astype(np.int64)},
        "inputs are float64": {"test_inputs": held / 16},
        r"train inputs are \(8, 8, 1\) and test inputs \(8, 8\)": {"test_inputs": held[..., 0]},
        r"the input at index 3 is not finite \(1 such\)": {"train_inputs": put(np.float32(images), (3, 0), np.nan)},
        r"test inputs \(4, 8, 1\)": {"test_inputs": held[:, :4]},
        "1 channels": {"mean": (1.0, 2.0)},
        "every std must be positive": {"std": (0.0,)},
    }
    for message, changes in cases.items():
        with pytest.raises(DataError, match=message):
            check(altered(digits, **changes))


def test_missing_and_unknown_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cifar10, cifar100, imagenet2012\. Did you mean cifar10"):
        load("cifar")
    with pytest.raises(DataError, match=f"{tmp_path}/cifar10 .*--data_dir=DIR.*--download"):
        load("cifar10", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "here"))
    with pytest.raises(DataError, match=f"{tmp_path}/here/mnist"):
        load("mnist")


def test_download_without_tensorflow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^Preparing cifar10 needs TensorFlow[^\n]*$"):
        load("cifar10", tmp_path, download=True)


@pytest.mark.versions
def test_prepared_data_are_read(tmp_path: Path) -> None:
    """Ten images, prepared by TFDS itself. They are given as PNGs: encoding arrays would need TensorFlow."""
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(256, size=(10, 28, 28, 1), dtype=np.uint8)

    def encoded(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "png")
        file.seek(0)
        return file

    with tfds.core.registered.skip_registration():

        class Mnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")

            def _info(self) -> tfds.core.DatasetInfo:
                features = {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, downloads: object) -> dict[str, Any]:
                return {"train": self._generate_examples(), "test": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
                yield from ((n, {"image": encoded(image), "label": n}) for n, image in enumerate(images))

    Mnist(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    mnist = load("mnist", tmp_path)
    for deeper in ("mnist", "mnist/3.0.1"):
        assert load("mnist", tmp_path / deeper).sha256 == mnist.sha256
    for read, labels in ((mnist.train["inputs"], mnist.train["labels"]), (mnist.test["inputs"], mnist.test["labels"])):
        np.testing.assert_array_equal(read[np.argsort(labels)], images)  # TFDS shuffles


@pytest.mark.versions
def test_the_newest_whole_version_is_read(tmp_path: Path) -> None:
    for version in ("3.0.2", "3.0.10", "3.0.11.incompleteAB12", "4.0.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        if version != "4.0.0":
            (tmp_path / "mnist" / version / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(DataError, match=r"3\.0\.10 is prepared as tfrecord, expected array_record"):
        load("mnist", tmp_path)


def test_damaged_data_say_so(tmp_path: Path) -> None:
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    with pytest.raises(DataError, match=r"^Split 'train' of [^\n]*3\.0\.1 could not be read[^\n]*$"):
        load("mnist", tmp_path)


def test_held_out_examples_take_the_place_of_the_test_set(digits: Dataset) -> None:
    labels = digits.train["labels"]
    held = hold_out(digits, 0.2, strata=labels)
    counts = np.bincount(labels)
    np.testing.assert_array_equal(np.bincount(held.test["labels"]), np.round(0.2 * counts))
    np.testing.assert_array_equal(np.bincount(held.train["labels"]), counts - np.round(0.2 * counts))
    key = lambda part: sorted((x.tobytes(), int(y)) for x, y in zip(part["inputs"], part["labels"], strict=True))  # noqa: E731
    assert sorted(key(held.train) + key(held.test)) == key(digits.train)  # nothing of the test set, nothing twice
    again, other = hold_out(digits, 0.2, strata=labels), hold_out(digits, 0.2, seed=1, strata=labels)
    assert again.sha256 == held.sha256 != other.sha256
    assert hold_out(digits, 0) is digits
    with pytest.raises(DataError, match=r"holding out 0\.001 of the 142 examples of class 0 leaves"):
        hold_out(digits, 0.001, strata=labels)
    assert len(hold_out(digits, 0.001).test["labels"]) == 1  # without strata all are one kind
    with pytest.raises(DataError, match=r"strata are \[3\], expected one for each of 1437"):
        hold_out(digits, 0.2, strata=labels[:3])


def test_the_parts_of_an_example_stay_together(digits: Dataset) -> None:
    """However a set is ordered, corrupted and divided, image, label, true label and index are of one example."""
    labels = digits.train["labels"]
    noisy = with_noise(digits, "flip2", 0.4, 100, 1)
    held = hold_out(noisy, 0.2, strata=noisy.train["true"])
    for data in (noisy, held, held.take(np.arange(held.examples)[::-1], meta=0)):
        np.testing.assert_array_equal(data.train["inputs"], digits.train["inputs"][data.index])
        np.testing.assert_array_equal(data.train["true"], labels[data.index])
    assert wrong_share(held) == pytest.approx(0.39, abs=0.02)
    np.testing.assert_array_equal(held.train["inputs"][-100:], noisy.train["inputs"][-100:])  # of the meta set none
    assert held.meta == 100 and "true" not in held.test
    right = {x.tobytes(): y for x, y in zip(digits.train["inputs"], labels, strict=True)}  # judged by the truth
    assert [right[x.tobytes()] for x in held.test["inputs"]] == held.test["labels"].tolist()
    with pytest.raises(DataError, match="its labels are wrong already"):
        with_noise(held, "flip2", 0.0, 0, 1)
    with pytest.raises(DataError, match=r"index is \[3\], expected one for each of 1437"):
        dataclasses.replace(digits, index=np.arange(3))


def test_what_has_no_classes_has_no_wrong_labels() -> None:
    table = Dataset("table", {"x": np.ones((5, 2)), "y": np.ones(5)}, {"x": np.ones((1, 2)), "y": np.ones(1)})
    with pytest.raises(DataError, match="table: wrong labels are of classes, and this data set has none"):
        with_noise(table, "flip", 0.4, 0, 1)


def test_real_mnist() -> None:
    mnist = load("mnist", real_data())
    # The counts of LeCun, Cortes & Burges.
    assert np.bincount(mnist.train["labels"]).tolist()[:3] == [5923, 6742, 5958]
    assert mnist.test["inputs"].shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose(mnist.train["inputs"].mean(), mnist.info.mean[0], rtol=1e-3)
    np.testing.assert_allclose(mnist.train["inputs"].std(), mnist.info.std[0], rtol=1e-3)
