"""Images that are read when they are needed: the numbers of those in memory, any size, a process its part; bad ones."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from launching import launch
from PIL import Image
from test_boxes import prepare

from benchmarks import reading
from experiments import classification
from l2t_jax import from_arrays, from_folder, train
from l2t_jax.data import DataError, Dataset
from l2t_jax.data import tfds as prepared
from l2t_jax.data.images import objects
from l2t_jax.runs import reporting
from l2t_jax.runs.config import UsageError
from l2t_jax.runs.parallel import Dispatch
from l2t_jax.runs.records import read_record
from l2t_jax.runs.streaming import Stream
from l2t_jax.tasks import load, own
from l2t_jax.tasks.classification import Classes
from l2t_jax.tasks.classification import classification as task_of

FEW = {"unroll_length": 2, "batch_size": 8, "validation_batch_size": 10, "memory": "save", "preset": "residual"}
NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(reporting, "draw", lambda *_: None)


def drawn(count, size=None, seed=0):
    """Images, of which the class is a colour: of one size [H, W], or of several."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = []
    for label in labels:
        shape = size or tuple(random.integers(12, 30, 2))
        image = random.integers(0, 120, (*shape, 3), np.uint8)
        image[..., label] += 100
        images.append(image)
    return images, labels


def encoded(image, kind="png"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Class folders with 20 images each to train, 5 each to test, of several sizes."""
    for part, count in (("train", 60), ("val", 15)):
        for i, (image, label) in enumerate(zip(*drawn(count, seed=count), strict=True)):
            place = tmp_path / "mine" / part / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03d}.png").write_bytes(encoded(image))
    return tmp_path / "mine"


def rows(workdir):
    return (Path(workdir) / "metrics.jsonl").read_bytes()


def test_what_stays_on_the_host_gives_the_same_numbers(tmp_path):
    """With crops and mirrors that are drawn on the device, weights and true labels: bit for bit."""
    images, labels = drawn(80, (8, 8))
    part = {"inputs": np.stack(images), "labels": labels.astype(np.int32)}
    info = Classes(3, (90.0,) * 3, (50.0,) * 3, augment=True)
    data = Dataset("drawn", {**part, "true": part["labels"]}, part, info)
    found = {}
    for stream in (False, True):
        workdir = tmp_path / str(stream)
        given = {"seeds": 2, "rounds": 4, "workdir": workdir, "quiet": True, **FEW}
        found[stream] = train("meta_weight_net", data, stream=stream, **given)
    assert rows(tmp_path / "True") == rows(tmp_path / "False") and found[True].scores == found[False].scores
    for one, other in zip(*(jax.tree.leaves(found[s].states) for s in (False, True)), strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("examples.csv", "observations.jsonl"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_files_of_one_size_give_the_numbers_of_arrays(tmp_path, monkeypatch):
    images, labels = drawn(60, (8, 8))
    whole = from_arrays(np.stack(images), labels, name="mine")
    files = from_arrays(objects(map(encoded, images)), labels, name="mine")
    assert files.info == whole.info and files.train["inputs"].dtype == object
    found = [
        train("mae", data, seeds=1, rounds=4, workdir=tmp_path / str(i), quiet=True, **FEW)
        for i, data in enumerate((whole, files))
    ]
    assert rows(tmp_path / "0") == rows(tmp_path / "1") and found[0].scores == found[1].scores
    np.testing.assert_allclose(
        found[1].probabilities(images[:4]), found[0].probabilities(np.stack(images[:4])), rtol=1e-6
    )
    monkeypatch.setattr(own, "LARGE", 1000)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "folder" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02d}.png").write_bytes(encoded(image))
    large = from_folder(tmp_path / "folder")
    assert large.train["inputs"].dtype == object and large.info.crop == 0  # it has one size, but is too large


def test_a_folder_of_images_of_any_size(folder, tmp_path):
    """From the command to a score; longer by --resume, with the crops of a run that was so long."""
    flags = [f"--{name}={value}" for name, value in FEW.items()]
    flags += [
        f"--dataset={folder}",
        "--crop=8",
        "--method=mae",
        "--seeds=1",
        "--student_lr=0.3",
        "--checkpoint_seconds=0",
    ]
    for workdir, length in (("whole", 8), ("run", 3), ("run", 8)):
        assert launch(classification, *flags, f"--rounds={length}", f"--workdir={tmp_path / workdir}", "--resume") == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    record = read_record(tmp_path / "run" / "summary.json")
    assert record["methods"]["mae"]["score"]["mean"] > 0.5
    about = (tmp_path / "run" / "final" / "about.json").read_text()
    assert '"cat"' in about
    with (tmp_path / "run" / "examples.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 60
    assert launch(classification, *flags, "--rounds=8", "--crop=9", f"--workdir={tmp_path / 'run'}", "--resume") == 2


def test_crops_and_what_is_known_of_the_set(folder):
    data = load(str(folder))
    sizes = [Image.open(path).size for path in data.train["inputs"]] + [Image.open(p).size for p in data.test["inputs"]]
    assert data.info.crop == min(map(min, sizes[:60])) and data.info.names == NAMES
    assert data.examples == 60 and len(data.test["labels"]) == 15
    task = task_of(data, crop=8)
    indices, seeds = np.array([3, 3, 7]), [(0, 1), (0, 2), (0, 1)]
    seen = task.read(data.train, indices, seeds)
    assert seen["inputs"].shape == (3, 8, 8, 3) and seen["labels"].tolist() == data.train["labels"][indices].tolist()
    assert np.any(seen["inputs"][0] != seen["inputs"][1])
    np.testing.assert_array_equal(task.read(data.train, indices[1:], seeds[1:])["inputs"], seen["inputs"][1:])
    middle = task.read(data.train, indices, None)["inputs"]
    np.testing.assert_array_equal(middle[0], middle[1])
    assert not task.draws and task_of(data).read(data.train, indices, None)["inputs"].shape[1] == data.info.crop


def test_a_prepared_set_is_read_where_it_lies(tmp_path, monkeypatch):
    """ImageNet's form, made by TFDS itself; labels are read once and kept."""
    import tensorflow_datasets as tfds

    images, labels = drawn(12)
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=[*NAMES, "eel"])}
    prepare(
        tmp_path,
        features,
        lambda: (
            {"image": io.BytesIO(encoded(image, "jpeg")), "label": int(label)}
            for image, label in zip([*images, images[0]], [*labels, 3], strict=True)
        ),
    )
    (tmp_path / "shop").rename(tmp_path / "imagenet2012")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    test, records = reversed(prepared.open_tfds(tmp_path, False, "imagenet2012"))
    assert len(prepared.labels_of(test)) == 13
    found = prepared.labels_of(records)
    assert sorted(found.tolist()) == sorted([*labels, 3]) and records.classes("label") == (*NAMES, "eel")
    monkeypatch.setattr(prepared.Records, "__iter__", lambda self: pytest.fail("read again"))
    np.testing.assert_array_equal(prepared.labels_of(records), found)
    monkeypatch.setattr("l2t_jax.tasks.classification.IMAGENET_CLASSES", 4)
    data = load("imagenet2012", tmp_path)
    seen = task_of(data).read(data.train, np.arange(13), None)
    assert seen["inputs"].shape == (13, 224, 224, 3)
    # What is brightest is the class, so each image has its own label.
    named = [label for label in seen["labels"] if label < 3]
    brightest = seen["inputs"].mean((1, 2)).argmax(-1)[seen["labels"] < 3]
    np.testing.assert_array_equal(brightest, named)


def test_a_process_reads_its_part_of_a_batch(folder):
    """Of batches of 8 the second process of two reads the last four places, with the draws of these places."""
    data = load(str(folder))
    task, read = task_of(data, crop=8), []
    watched = task._replace(read=lambda *given: read.append(len(given[1])) or task.read(*given))
    part = lambda x: x[..., x.shape[-1] // 2 :]  # noqa: E731
    program = SimpleNamespace(part=part, owns=lambda g: True, data=lambda tree: tree)
    random = np.random.default_rng(0)
    train_part, validation = random.integers(0, 60, (3, 1, 2, 8)), random.integers(0, 60, (3, 1, 10))
    flags = np.zeros(3, bool)
    dispatch = Dispatch(train_part, validation, np.arange(5, 8), flags, np.int32(3), np.array([7, 9], np.uint32))
    stream = Stream(watched, SimpleNamespace(backbone=None), data.train, program)
    block, (placed,) = stream.take([dispatch])
    stream.close()
    assert sum(read) == 3 * (2 * 4 + 5) == len(block["labels"])
    for part, name, size in ((0, "train", 8), (1, "validation", 10)):
        whole = getattr(dispatch, name)
        for r in range(3):
            seeds = [(7, 9, 5 + r, part, place) for place in range(whole[r].size)]
            expected = task.read(data.train, whole[r].ravel(), seeds)["inputs"].reshape(*whole[r].shape, 8, 8, 3)
            own_part = getattr(placed, name)[r][..., size // 2 :]
            np.testing.assert_array_equal(block["inputs"][own_part], expected[..., size // 2 :, :, :, :])


# What is wrong


def spoiled(folder, *names):
    for name in names:
        path = folder / "train" / name
        path.write_bytes(path.read_bytes()[:90])


def test_images_that_cannot_be_read(folder, tmp_path, capsys):
    """One is named, and ends the run; where that is asked for all are, and the others keep their places."""
    spoiled(folder, "cat/000.png", "owl/002.png")
    flags = [f"--{name}={value}" for name, value in FEW.items()]
    flags += [f"--dataset={folder}", "--crop=8", "--method=mae", "--rounds=3", "--seeds=1"]
    assert launch(classification, *flags, f"--workdir={tmp_path / 'a'}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cat/000.png cannot be read as an image" in said
    labels = np.repeat([0, 1, 2], 20)
    labels[21] = 2  # of the second dog
    np.save(tmp_path / "labels.npy", labels)
    flags += ["--skip_broken", f"--labels={tmp_path / 'labels.npy'}", "--validation_ratio=0.3"]
    assert launch(classification, *flags, f"--workdir={tmp_path / 'b'}") == 0
    said = capsys.readouterr().err
    assert "2 of 75 images are left out: " in said and "cat/000.png" in said and "owl/002.png" in said
    with (tmp_path / "b" / "examples.csv").open() as file:
        lines = {int(line["index"]): line for line in csv.DictReader(file)}
    assert len(lines) == 58 and not {0, 40} & set(lines)
    assert [index for index, line in lines.items() if line["right"] == "false"] == [21]


def test_an_image_that_breaks_while_the_run_goes_on_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own, "SAMPLE", 1)
    path = folder / "train" / "dog" / "004.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its head is good
    flags = [f"--{name}={value}" for name, value in FEW.items()]
    flags += [f"--dataset={folder}", "--crop=8", "--method=mae", "--rounds=20", "--seeds=1"]
    assert launch(classification, *flags, f"--workdir={tmp_path / 'a'}") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "dog/004.png" in said[0] and said[0].endswith("mend it, or give --skip_broken.")


def test_a_set_that_has_shrunk_is_another(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reporting, "MOST_READ", 59)
    flags = [f"--{name}={value}" for name, value in FEW.items()]
    flags += [f"--dataset={folder}", "--crop=8", "--method=mae", "--seeds=1", f"--workdir={tmp_path / 'a'}"]
    assert launch(classification, *flags, "--rounds=2") == 0
    assert not (tmp_path / "a" / "examples.csv").exists()  # it would read 60 images again
    (folder / "train" / "dog" / "001.png").unlink()
    capsys.readouterr()
    assert launch(classification, *flags, "--rounds=3", "--resume") == 2
    said = capsys.readouterr().err
    assert "holds another run (dataset_sha256: there" in said and said.count("\n") == 1


BAD = {
    "an empty class": (lambda f: (f / "train" / "bat").mkdir(), r"train/bat holds no image"),
    "an empty class to test": (lambda f: (f / "val" / "bat").mkdir(), r"val/bat holds no image"),
    "all broken": (
        lambda f: [p.write_text("x") for p in f.rglob("*.png")],
        r"cannot be read as an image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name, folder):
    change, line = BAD[name]
    change(folder)
    with pytest.raises(DataError, match=line):
        load(str(folder))
    if name == "all broken":
        with pytest.raises(DataError, match=r"none of 75 images can be read: .*png cannot be"):
            load(str(folder), skip_broken=True)


def test_what_cannot_be_asked_for():
    images, labels = drawn(30, (8, 8))
    features = from_arrays(np.ones((30, 4)) * np.arange(30)[:, None], labels)
    with pytest.raises(ValueError, match=r"crop=8 is of images of 8 bits, and inputs are float32 \[4\]"):
        task_of(features, crop=8)
    with pytest.raises(ValueError, match="crop=-1 is negative"):
        task_of(features, crop=-1)
    with pytest.raises(DataError, match="skip_broken is of your own images, and digits is a prepared set"):
        load("digits", skip_broken=True)
    with pytest.raises(DataError, match="inputs are object"):
        from_arrays(np.array([None] * 30, object), labels)
    with pytest.raises(DataError, match=r"example 1 is 9x8 and arrays, example 0 8x8: cut squares from them by --crop"):
        odd = from_arrays(objects(map(encoded, images)), labels)
        odd.train["inputs"][1] = np.zeros((9, 8, 3), np.uint8)
        odd.train["inputs"][0] = images[0]
        task_of(odd).read(odd.train, np.arange(2), None)
    with pytest.raises(UsageError, match="--stream: the examples of --task=translation are cut"):
        given = {"task": "translation", "student": "lstm_small", "task_knobs": {"buckets": 2}}
        train("cross_entropy", "made_up", stream=True, rounds=1, **given)
    assert task_of(from_arrays(np.stack(images), labels), crop=4).read is not None  # arrays are cropped as well


# The benchmark


@pytest.mark.results
def test_the_page_has_the_rows_of_the_record():
    root = Path(__file__).parents[1]
    record = read_record(root / "benchmarks" / "results" / "reading_cpu.json")
    page = (root / "docs" / "own_data.md").read_text()
    for row in record["rows"]:
        speed = row["images_per_second"]
        assert f"| {row['program']} | {speed:.0f} | {1000 * record['batch'] / speed:.0f} |" in page
    assert f"{record['step_seconds']:.0f} seconds on the same cores" in page


def test_the_benchmark_reads_all_images(tmp_path, monkeypatch, capsys):
    saved = flagsaver.save_flag_values(reading.FLAGS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # grain's processes take seconds to start
    try:
        given = ["--images=50", "--repeats=1", "--nostep", "--workers=1,2", f"--out={tmp_path / 'r.json'}"]
        reading.main(["reading", *given])
        with pytest.raises(SystemExit):
            reading.main(["reading", "--workers=0"])
    finally:
        flagsaver.restore_flag_values(saved, reading.FLAGS)
    names = [row["program"] for row in read_record(tmp_path / "r.json")["rows"]]
    assert names == ["threads, 1", "threads, 2"] and "numbers of at least 1" in capsys.readouterr().err
