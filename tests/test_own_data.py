"""A user's own data: every form gives the same set; what is malformed is told in a line, by the check that is meant."""

import csv
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from l2t_jax.data import DataError, hold_out
from l2t_jax.data.files import read_clean, read_labels
from l2t_jax.data.noise import wrong_share
from l2t_jax.tasks import TASKS, is_path, load
from l2t_jax.tasks.own import drawn_clean, from_arrays, from_csv, from_folder, open_path, with_clean, with_labels

RANDOM = np.random.default_rng(0)
N, C = 30, 3
X = RANDOM.integers(0, 256, (N, 4, 5, 3)).astype(np.uint8)
Y = np.arange(N, dtype=np.int64) % C
TABLE = RANDOM.normal(size=(N, 6))
NAMES = np.array(["cat", "dog", "owl"])


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


# What is right


@pytest.mark.parametrize(
    ("x", "shape", "dtype"),
    [
        (X, (4, 5, 3), np.uint8),
        (X[..., 0], (4, 5, 1), np.uint8),
        (X.astype(float) / 255, (4, 5, 3), np.float32),
        (TABLE, (6,), np.float32),
        (TABLE > 0, (6,), np.float32),
        (X.astype(int).tolist(), (4, 5, 3), np.float32),
    ],
)
@pytest.mark.parametrize(
    "labels", [Y, Y + 1, Y.astype(float), NAMES[Y], NAMES[Y].astype(object), Y[:, None], Y * 10 - 5]
)
def test_arrays(x, shape, dtype, labels):
    """Inputs are normalised by their last axis; labels become their places, whatever they are called."""
    data = from_arrays(x, labels, test=(x, labels))
    assert data.train["inputs"].shape == (N, *shape) and data.train["inputs"].dtype == dtype
    np.testing.assert_array_equal(data.train["labels"], Y)
    np.testing.assert_array_equal(data.test["labels"], Y)
    flat = np.asarray(data.train["inputs"], float).reshape(-1, shape[-1])
    np.testing.assert_allclose(data.info.mean, flat.mean(0), rtol=1e-5)
    batch = TASKS["classification"].build(data).gather(data.train, np.arange(N), None)
    inputs = np.asarray(batch.inputs).reshape(-1, shape[-1])
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(0), 1, rtol=1e-3)
    own = sorted(set(np.ravel(labels).tolist()))
    assert data.info.names == (() if own == [0, 1, 2] else tuple(int(x) if isinstance(x, float) else x for x in own))


def test_classes_are_in_the_order_of_their_numbers_then_names():
    data = from_arrays(TABLE, np.array(["10", "9", "b", "a", "2"] * 6), test=(TABLE[:5], ["10", "9", "b", "a", "2"]))
    assert data.info.names == ("2", "9", "10", "a", "b")


def test_a_constant_feature_is_left_as_it_is():
    data = from_arrays(changed(TABLE, (slice(None), 2), 7.0), Y, test=(TABLE, Y))
    assert data.info.std[2] == 1 and data.info.mean[2] == 7


def test_without_a_test_set_a_fifth_of_each_class_is_held_out():
    data = from_arrays(X, NAMES[Y])
    assert np.bincount(data.test["labels"]).tolist() == [2, 2, 2] and data.examples == 24
    np.testing.assert_array_equal(data.train["inputs"], X[data.index])
    assert data.sha256 == from_arrays(X, NAMES[Y]).sha256


def test_clean_examples_are_apart_and_last():
    data = from_arrays(X, changed(Y, 0, 1), test=(X, Y), clean=(X[:6], Y[:6]), true=Y)
    assert data.meta == 6 and data.examples == N + 6 and wrong_share(data) == pytest.approx(1 / N)
    np.testing.assert_array_equal(data.train["labels"][-6:], Y[:6])
    for which in ([3, 4, 8], np.isin(np.arange(N), [3, 4, 8])):
        chosen = from_arrays(X, Y, test=(X, Y), clean=which)
        assert chosen.meta == 3 and sorted(chosen.index[-3:]) == [3, 4, 8] and chosen.examples == N
        np.testing.assert_array_equal(chosen.train["inputs"], X[chosen.index])


def test_clean_examples_have_their_true_labels_where_these_are_known():
    wrong = (Y + 1) % 3
    data = with_clean(with_labels(from_arrays(X, Y, test=(X, Y)), wrong), np.array([3, 4, 8]))
    expected = np.where(np.isin(np.arange(N), [3, 4, 8]), Y, wrong)
    np.testing.assert_array_equal(data.train["labels"], expected[data.index])


@pytest.mark.parametrize("count", [3, 7, 13])
def test_so_many_clean_examples_are_drawn_of_each_true_class(count):
    given = changed(Y, np.flatnonzero(Y == 0)[:3], 1)
    data = with_labels(hold_out(from_arrays(X, Y, test=(X, Y)), 0.2), given)
    which = drawn_clean(data, count)
    assert sorted(np.bincount(Y[which])) == sorted(count // 3 + (c < count % 3) for c in range(3))
    assert set(which) <= set(data.index) and which.tolist() == drawn_clean(data, count).tolist()
    assert with_clean(data, which).meta == count


def write_csv(path, heads, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


def write_images(folder, images, labels, ending="png"):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04d}.{ending}")
    return folder


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("data", "target"), ("x_train", "y_train")])
def test_an_npz(tmp_path, names):
    x, y = names
    test = ("x_test", "y_test") if x == "x_train" else (f"test_{x}", f"test_{y}") if x != "x" else ("x_test", "y_test")
    np.savez(tmp_path / "mine.npz", **{x: X, y: Y, test[0]: X[:9], test[1]: Y[:9]}, true=Y)
    data = load(str(tmp_path / "mine.npz"))
    assert data.name == "mine" and len(data.test["labels"]) == 9
    np.testing.assert_array_equal(data.train["true"], Y)
    assert data.sha256 == from_arrays(X, Y, test=(X[:9], Y[:9]), true=Y).sha256


def test_a_table_of_features_and_a_table_of_files(tmp_path):
    rows = [
        [*values, label, "test" if i < 6 else "train"]
        for i, (values, label) in enumerate(zip(TABLE, NAMES[Y], strict=True))
    ]
    data = from_csv(write_csv(tmp_path / "t.csv", [*"abcdef", "Label", "split"], rows))
    expected = from_arrays(TABLE[6:], NAMES[Y[6:]], test=(TABLE[:6], NAMES[Y[:6]]))
    assert data.sha256 == expected.sha256 and data.info == expected.info
    write_images(tmp_path, X, ["all"] * N)
    rows = [[f"all/{i:04d}.png", label] for i, label in enumerate(NAMES[Y])]
    files = from_csv(write_csv(tmp_path / "files.csv", ["file", "class"], rows))
    assert files.sha256 == from_arrays(X, NAMES[Y]).sha256


def test_folders(tmp_path):
    """Classes are the folders that hold images, wherever they lie; with train and test, or without."""
    plain = from_folder(write_images(tmp_path / "plain", X, NAMES[Y]))
    order = np.argsort(Y, kind="stable")
    assert plain.sha256 == from_arrays(X[order], NAMES[Y[order]]).sha256
    write_images(tmp_path / "both" / "train", X, NAMES[Y])
    write_images(tmp_path / "both" / "test", X[:6], NAMES[Y[:6]])
    both = open_path(tmp_path / "both")
    assert both.examples == N and len(both.test["labels"]) == 6
    nested = from_folder(write_images(tmp_path / "nested", X[..., 0], [f"alphabet/{name}" for name in NAMES[Y]]))
    assert nested.info.names[0] == "alphabet/cat" and nested.train["inputs"].shape[1:] == (4, 5, 1)
    (tmp_path / "plain" / "cat" / ".hidden.png").write_text("no image")
    assert from_folder(tmp_path / "plain").sha256 == plain.sha256
    write_images(tmp_path / "sizes", [X[0], np.zeros((9, 9, 3), np.uint8)] * 15, NAMES[Y])
    assert from_folder(tmp_path / "sizes", size=(6, 7)).train["inputs"].shape[1:] == (6, 7, 3)


def test_other_labels_are_given_and_the_own_ones_true(tmp_path):
    data = from_arrays(X, NAMES[Y], test=(X, NAMES[Y]))
    given = changed(Y, [0, 4], [1, 0])
    np.save(tmp_path / "l.npy", given)
    np.savez(tmp_path / "l.npz", worse=given, other=Y)
    write_csv(tmp_path / "l.csv", ["index", "label"], [[i, NAMES[given[i]]] for i in range(N - 1, -1, -1)])
    for text in ("l.npy", "l.npz:worse", "l.csv"):
        noisy = with_labels(data, read_labels(str(tmp_path / text)))
        np.testing.assert_array_equal(noisy.train["labels"], given)
        np.testing.assert_array_equal(noisy.train["true"], Y)
        np.testing.assert_array_equal(noisy.test["labels"], Y)
    held = with_labels(hold_out(data, 0.2, strata=Y), given)  # in another order, labels follow
    np.testing.assert_array_equal(held.train["labels"], given[held.index])


def test_clean_lists(tmp_path):
    np.save(tmp_path / "c.npy", np.array([1, 3, 5]))
    write_csv(tmp_path / "c.csv", ["index"], [[1], [3], [5]])
    for name in ("c.npy", "c.csv"):
        np.testing.assert_array_equal(read_clean(str(tmp_path / name)), [1, 3, 5])


def test_a_name_or_a_path(tmp_path, monkeypatch):
    spec = TASKS["classification"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [is_path(name, spec) for name in ("digits", "a/b", "x.npz", "here", "digts")] == [
        False,
        True,
        True,
        True,
        False,
    ]


# What is wrong

KINDS = {"None": None, "a word": "x", "objects": np.array([{}] * N), "words": np.array(["x"] * N), "complex": X * 1j}
BAD_INPUTS = {
    **{name: (value, "expected numbers|expected features") for name, value in KINDS.items()},
    "a number": (3.0, "expected features"),
    "one axis": (np.arange(N), r"are \[30\]: expected features"),
    "five axes": (X[..., None], "expected features"),
    "no example": (X[:0], "there is no example"),
    "no feature": (TABLE[:, :0], "there is no example"),
    "ragged": ([[1.0], [1.0, 2.0]] * 15, "are ragged"),
    "dates": (np.zeros((N, 2), "datetime64[s]"), "expected numbers"),
    "too few": (X[:-1], "29 (test )?inputs have 30"),
    **{
        f"{bad} at {i}": (changed(TABLE, (i, 2), bad), f"at index {i} is not finite")
        for bad in (np.nan, np.inf, -np.inf)
        for i in (0, 7, 29)
    },
}
BAD_LABELS = {
    "too few": (Y[:-1], "30 inputs have 29 labels"),
    "too many": (np.append(Y, 1), "30 inputs have 31 labels"),
    "none": (Y[:0], "30 inputs have 0 labels"),
    "None": (None, "expected one label for each"),
    "a number": (3, "expected one label for each"),
    "one hot": (np.eye(C)[Y], r"are \[30, 3\]: expected one label"),
    "halves": (Y + 0.5, "not all whole numbers"),
    "NaN": (changed(Y.astype(float), 3, np.nan), "not all whole numbers"),
    "inf": (changed(Y.astype(float), 3, np.inf), "not all whole numbers"),
    "complex": (Y * 1j, "expected whole numbers or names"),
    "objects": (np.array([None] * N), "neither numbers nor names"),
    "numbers and names": (np.array([*"ab", 3] * 10, object), "neither numbers nor names"),
    "empty names": (np.array(["a", "b", " "] * 10), "one is empty"),
    "dates": (np.zeros(N, "datetime64[s]"), "expected whole numbers or names"),
    "ragged": ([[1], [1, 2]] * 15, "are ragged"),
    "one class": (np.zeros(N, int), "all labels are 0: expected two classes"),
    "one name": (np.array(["a"] * N), "all labels are a: expected two classes"),
}
BAD_TESTS = {
    "lengths": ((X, Y[:-1]), "30 test inputs have 29 test labels"),
    "an unknown class": ((X, changed(Y, 4, 9)), "the test label '9' at index 4 has no training example"),
    "another size": ((X[:, 1:], Y), "test inputs are uint8 .* and the training inputs uint8"),
    "other channels": ((X[..., :1], Y), "test inputs are uint8 .* and the training inputs uint8"),
    "nothing": ((X[:0], Y[:0]), "there is no example"),
    "words": ((np.array(["x"] * N), Y), "test inputs are <U1"),
    "halves": ((X, Y + 0.5), "test labels are float64"),
    "floats for bytes": ((X / 255, Y), "test inputs are float32 .* and the training inputs uint8"),
    "names for numbers": ((X, NAMES[Y]), "the test label 'cat' at index 0"),
}
BAD_CLEAN = {
    "outside": ([0, 1, 99], r"\[99\] is outside 0\.\.29"),
    "below 0": ([0, 1, -1], r"\[-1\] is outside"),
    "twice": ([0, 1, 2, 2], "named twice"),
    "floats": (np.array([0.0, 1.0, 2.0]), "are float64: expected whole numbers"),
    "names": (np.array(["a", "b"]), "expected whole numbers"),
    "rows": (np.array([[0, 1, 2]]), r"are \[1, 3\]: expected indices"),
    "none": ([], r"are \[0\]: expected indices"),
    "a class without": ([0, 1, 3], "class 2 has no clean example"),
    "all": (np.arange(N), "class 0 has no other example"),
    "all of a class": ([0, 1, *range(2, N, 3)], "class 2 has no other example"),
    "too few marks": (np.ones(7, bool), "7 marks of clean examples for 30"),
    "pair of lengths": ((X[:3], Y[:2]), "3 clean inputs have 2 clean labels"),
    "another size": ((X[:3, 1:], Y[:3]), r"clean inputs are uint8 \(3, 5, 3\) and the training inputs"),
    "three parts": ((X[:3], Y[:3], Y[:3]), "clean has 3 parts"),
    "NaN": ((changed(X[:3].astype(float), (0, 0), np.nan), Y[:3]), "not finite"),
}
BAD_TRUE = {
    "too few": (Y[:-1], "29 true labels beside 30"),
    "unknown": (changed(Y, 4, 9), "the true label '9' at index 4"),
    "halves": (Y + 0.5, "true labels are float64"),
    "rows": (np.eye(C)[Y], "true labels are"),
}
ARRAYS = {
    **{f"inputs, {name}": ({"x": x}, line) for name, (x, line) in BAD_INPUTS.items()},
    **{f"test inputs, {name}": ({"test": (x, Y)}, line) for name, (x, line) in BAD_INPUTS.items()},
    **{f"labels, {name}": ({"y": y}, line) for name, (y, line) in BAD_LABELS.items()},
    **{f"test, {name}": ({"test": test}, line) for name, (test, line) in BAD_TESTS.items()},
    **{f"clean, {name}": ({"clean": clean}, line) for name, (clean, line) in BAD_CLEAN.items()},
    **{f"true, {name}": ({"true": true}, line) for name, (true, line) in BAD_TRUE.items()},
    "too few to hold out": ({"x": X[:6], "y": Y[:6], "test": None}, "class 0, 1, 2 has fewer than 3 examples"),
    "a class of one": ({"y": changed(Y, 0, 7), "test": None}, "class 7 has fewer than 3 examples"),
}


def said_in_a_line(call, line, named=""):
    with pytest.raises(DataError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and 15 < len(said) < 500 and re.search(line, said) and named in said, said


@pytest.mark.parametrize("name", ARRAYS)
def test_bad_arrays(name):
    change, line = ARRAYS[name]
    said_in_a_line(lambda: from_arrays(**({"x": X, "y": Y, "test": (X, Y), "name": "mine"} | change)), line, "mine")


def storable(x):
    return isinstance(x, np.ndarray) and x.dtype != object


NPZ = {
    "no file": (None, "is not there"),
    "empty": (b"", "cannot be read"),
    "text": (b"hello, world\n", "cannot be read"),
    "truncated": (b"PK\x03\x04" + b"\0" * 40, "cannot be read"),
    "other names": ({"a": X, "b": Y}, "holds a, b: expected x and y"),
    "no labels": ({"x": X}, "holds x: expected x and y"),
    "no inputs": ({"y": Y}, "holds y: expected x and y"),
    "nothing": ({}, "holds nothing|there is no array|cannot be read"),
    "objects": ({"x": np.array([{}] * N, object), "y": Y}, "cannot be read"),
    "lengths": ({"x": X, "y": Y[:-1]}, "30 inputs have 29 labels"),
    "clean outside": ({"x": X, "y": Y, "clean": np.array([0, 1, 99])}, "outside"),
    "clean as floats": ({"x": X, "y": Y, "clean": np.array([0.5])}, "expected whole numbers"),
    "true too few": ({"x": X, "y": Y, "true": Y[1:]}, "29 true labels"),
    **{
        f"x {name}": ({"x": x, "y": Y}, line)
        for name, (x, line) in BAD_INPUTS.items()
        if isinstance(x, np.ndarray) and x.dtype != object
    },
    **{
        f"y {name}": ({"x": X, "y": y}, line)
        for name, (y, line) in BAD_LABELS.items()
        if isinstance(y, np.ndarray) and y.dtype != object
    },
}


@pytest.mark.parametrize("name", NPZ)
def test_bad_npz(name, tmp_path):
    content, line = NPZ[name]
    path = tmp_path / "mine.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, allow_pickle=True, **content)
    said_in_a_line(lambda: open_path(path), line, "mine")


GOOD = "a,b,label\n" + "".join(f"{i},{i * i},{'xy'[i % 2]}\n" for i in range(20))
CSV = {
    "empty": ("", "has 0 lines"),
    "a head alone": ("a,b,label\n", "has 1 lines"),
    "no label": (GOOD.replace("label", "lable"), "expected one called label"),
    "two labels": (GOOD.replace("a,b,label", "class,b,label"), "class and label: leave one"),
    "two columns of one name": (GOOD.replace("a,b,", "a,a,"), "a column twice"),
    "a short line": (GOOD + "1,2\n", "line 22: 2 cells under 3 heads"),
    "a long line": (GOOD + "1,2,x,4\n", "line 22: 4 cells under 3 heads"),
    "a word": (GOOD.replace("\n3,9", "\nthree,9"), "line 5: 'three' under a is no number"),
    "an empty cell": (GOOD.replace("\n3,9", "\n,9"), "line 5: '' under a is no number"),
    "NaN": (GOOD.replace("\n3,9", "\nnan,9"), "is not finite"),
    "inf": (GOOD.replace("\n3,9", "\ninf,9"), "is not finite"),
    "an empty label": (GOOD.replace("\n3,9,y", "\n3,9,"), "one is empty"),
    "one class": (GOOD.replace(",y", ",x"), "all labels are x"),
    "labels alone": ("label\n" + "x\ny\n" * 10, "no column of features"),
    "a strange split": (GOOD.replace("a,b,", "a,split,"), "must be train or test"),
    "all of it to test": ("a,split,label\n" + "".join(f"{i},test,x\n" for i in range(9)), "there is no example"),
    "Latin-1": (GOOD.replace("x", "\xe9").encode("latin-1"), "cannot be read"),
    "zeros": (b"a,b\0,label\n1,2,3\n", "cannot be read|expected|no number|all labels"),
    "files that are not there": ("file,label\n" + "a.png,x\nb.png,y\n" * 5, "a.png is not there: put it back"),
    "semicolons": (GOOD.replace(",", ";"), "expected one called label"),
}


@pytest.mark.parametrize("name", CSV)
def test_bad_csv(name, tmp_path):
    content, line = CSV[name]
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said_in_a_line(lambda: open_path(path), line, "mine" if "files" not in name else "a.png")


def spoil(folder, change):
    """A good folder, and one thing that is wrong with it."""
    write_images(folder, X, NAMES[Y])
    change(folder)
    return folder


FOLDERS = {
    "nothing": (lambda f: [p.unlink() for p in f.rglob("*.png")], "holds no image"),
    "a text as an image": (lambda f: (f / "cat" / "a.png").write_text("x"), r"cat/a\.png cannot be read as an image"),
    "an empty image": (lambda f: (f / "dog" / "a.png").touch(), r"dog/a\.png cannot be read"),
    "a truncated image": (
        lambda f: (f / "dog" / "z.png").write_bytes((f / "dog" / "0001.png").read_bytes()[:40]),
        r"dog/z\.png cannot be read",
    ),
    "one class": (lambda f: [shutil.rmtree(f / name) for name in ("cat", "dog")], "all labels are owl"),
    "an empty class": (lambda f: [p.unlink() for p in (f / "cat").iterdir()], "cat holds no image"),
    "a class of one": (
        lambda f: [p.unlink() for p in sorted((f / "cat").iterdir())[1:]],
        "class cat has fewer than 3",
    ),
    "images beside folders": (lambda f: [p.rename(f / p.name) for p in sorted(f.rglob("*.png"))], "holds no image"),
    "texts": (lambda f: [p.rename(p.with_suffix(".txt")) for p in sorted(f.rglob("*.png"))], "holds no image"),
    "an unknown class to test": (
        lambda f: [
            (f.parent / "t").mkdir(),
            f.rename(f.parent / "t" / "train"),
            write_images(f.parent / "t" / "test", X[:1], ["bat"]),
        ],
        "the test label 'bat'",
    ),
    "a test without images": (
        lambda f: [(f.parent / "t" / "test").mkdir(parents=True), f.rename(f.parent / "t" / "train")],
        "test holds no image",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folders(name, tmp_path):
    change, line = FOLDERS[name]
    folder = spoil(tmp_path / "mine", change)
    said_in_a_line(lambda: open_path(folder if folder.exists() else tmp_path / "t"), line)


PATHS = {
    "/nowhere": "is not there: give a folder",
    "/nowhere/x.npz": "is not there",
    "/nowhere/x.csv": "is not there",
    "/dev/null": "is none of a folder, an .npz and a .csv|no folder",
    __file__: "is none of a folder",
}


@pytest.mark.parametrize("path", PATHS)
def test_bad_paths(path):
    said_in_a_line(lambda: load(path), PATHS[path])


LABELS = {
    "no file": (None, ".npy", "is not there"),
    "another ending": (b"1\n2\n", ".txt", "is none of a .csv"),
    "an empty npy": (b"", ".npy", "cannot be read"),
    "a text as npy": (b"hello", ".npy", "cannot be read"),
    "objects": (np.array([None] * N), ".npy", "cannot be read"),
    "too few": (Y[:-1], ".npy", "29 labels for 30 training examples"),
    "another class": (changed(Y, 3, 7), ".npy", "label '7' at index 3 is none of its classes"),
    "below 0": (changed(Y, 3, -1), ".npy", "label '-1' at index 3"),
    "halves": (Y + 0.5, ".npy", "not all whole numbers"),
    "one hot": (np.eye(C)[Y], ".npy", "expected one label for each"),
    "names": (np.array(["x"] * N), ".npy", "label 'x' at index 0"),
    "two arrays, none named": ({"a": Y, "b": Y}, ".npz", "say which"),
    "an array that is not there": ({"a": Y}, ".npz:b", "holds a: say which"),
    "a csv without label": (b"index,l\n0,1\n", ".csv", "expected one called label"),
    "a csv with a strange index": (b"index,label\nx,1\n", ".csv", "index 'x' is no whole number"),
    "a csv of too few": (b"label\n1\n", ".csv", "1 labels for 30"),
    "an empty csv": (b"", ".csv", "has 0 lines"),
    "a csv with an empty label": (b"label\n" + b"1\n" * 29 + b' ""\n', ".csv", "one is empty|none of its classes"),
}


@pytest.mark.parametrize("name", LABELS)
def test_bad_labels(name, tmp_path):
    content, ending, line = LABELS[name]
    text = write(tmp_path / "mine", content, ending)
    said_in_a_line(lambda: with_labels(from_arrays(X, Y, test=(X, Y)), read_labels(text)), line)


def write(path, content, ending):
    """A file; what names it."""
    file = path.with_suffix(ending.partition(":")[0])
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    return f"{path}{ending}"


CLEAN = {
    "no file": (None, ".npy", "is not there"),
    "another ending": (b"1\n2\n", ".txt", "is none of a .csv"),
    "a text as npy": (b"hello", ".npy", "cannot be read"),
    "a csv without index": (b"label\n1\n", ".csv", "expected one called index"),
    "a csv of words": (b"index\nx\n", ".csv", "an index of a clean example is no number"),
    "a csv below 0": (b"index\n-1\n", ".csv", "no number"),
    **{
        f"npy, {name}": (np.asarray(clean), ".npy", line if name != "names" else "no number")
        for name, (clean, line) in BAD_CLEAN.items()
        if not isinstance(clean, tuple) and name != "none"
    },
}


@pytest.mark.parametrize("name", CLEAN)
def test_bad_clean(name, tmp_path):
    content, ending, line = CLEAN[name]
    text = write(tmp_path / "mine", content, ending)
    said_in_a_line(lambda: with_clean(from_arrays(X, Y, test=(X, Y)), read_clean(text)), line)


def test_clean_twice():
    data = from_arrays(X, Y, test=(X, Y), clean=[0, 1, 2])
    said_in_a_line(lambda: with_clean(data, np.array([3, 4, 5])), "3 clean examples are apart already")


def test_there_are_many_rows():
    assert sum(map(len, (ARRAYS, NPZ, CSV, FOLDERS, PATHS, LABELS, CLEAN))) >= 200
