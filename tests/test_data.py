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
from PIL import Image

from l2t_jax import data
from l2t_jax.data import DataError


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


@pytest.mark.versions
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
    mnist = data.load("mnist", tmp_path)
    for read, labels in ((mnist.train_images, mnist.train_labels), (mnist.test_images, mnist.test_labels)):
        np.testing.assert_array_equal(read[np.argsort(labels)], images)  # TFDS shuffles


@pytest.mark.versions
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


def test_held_out_examples_take_the_place_of_the_test_set() -> None:
    digits = data.load("digits")
    held = data.hold_out(digits, 0.2)
    counts = np.bincount(digits.train_labels)
    np.testing.assert_array_equal(np.bincount(held.test_labels), np.round(0.2 * counts))
    np.testing.assert_array_equal(np.bincount(held.train_labels), counts - np.round(0.2 * counts))
    key = lambda images, labels: sorted((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))  # noqa: E731
    parts = np.concatenate([held.train_images, held.test_images]), np.concatenate([held.train_labels, held.test_labels])
    assert key(*parts) == key(digits.train_images, digits.train_labels)  # nothing of the test set, nothing twice
    assert data.hold_out(digits, 0.2).sha256 == held.sha256 != data.hold_out(digits, 0.2, seed=1).sha256
    assert data.hold_out(digits, 0) is digits
    with pytest.raises(DataError, match=r"holding out 0\.001 of the 142 examples of class 0 leaves"):
        data.hold_out(digits, 0.001)


def test_real_mnist() -> None:
    mnist = data.load("mnist", real_data())
    # The counts of LeCun, Cortes & Burges.
    assert np.bincount(mnist.train_labels).tolist()[:3] == [5923, 6742, 5958]
    assert mnist.test_images.shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose(mnist.train_images.mean(), mnist.mean[0], rtol=1e-3)
    np.testing.assert_allclose(mnist.train_images.std(), mnist.std[0], rtol=1e-3)
