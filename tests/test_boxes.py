"""Images with boxes: COCO's files and prepared sets; wrong boxes are counted, wrong files told in a line."""

import copy
import io
import json

import numpy as np
import pytest
from lines import prepared, said_in_a_line
from PIL import Image

from l2t_jax.data.boxes import read_boxes_tfds, read_coco, tidy
from l2t_jax.data.images import decode

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "owl"}]


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


def content():
    """Three images, 100 wide and 50 high; the second has no box."""
    images = [{"id": 10 * i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in (3, 1, 2)]
    annotations = [
        annotation(1, 20, 90, [10, 10, 20, 20], area=333.5, iscrowd=1),
        annotation(2, 30, 3, [0, 0, 100, 50], area=5000),
        annotation(3, 20, 7, [50, 25, 10, 5]),
    ]
    return {"images": images, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)}


def coco(folder, change=lambda content: None, pictures="{kind}2017", size=(100, 50)):
    (folder / "annotations").mkdir(parents=True)
    for kind in ("train", "val"):
        told = content()
        if kind == "train":
            told = change(told) or told
        text = told if isinstance(told, str) else json.dumps(told)
        (folder / "annotations" / f"instances_{kind}2017.json").write_text(text)
        place = folder / pictures.format(kind=kind)
        place.mkdir(parents=True, exist_ok=True)
        for i in (1, 2, 3):
            Image.new("RGB", size, (i, i, i)).save(place / f"{i}.jpg")
    return folder


@pytest.mark.versions
@pytest.mark.parametrize("pictures", ["{kind}2017", "images/{kind}2017", "images", ".", "{kind}"])
def test_boxes_are_those_of_the_files(tmp_path, pictures):
    found = read_coco(coco(tmp_path, pictures=pictures))
    assert found.names == ("dog", "cat", "owl")  # in the order of their ids
    for part in found[:2]:
        assert [path.name for path in part["image"]] == ["3.jpg", "1.jpg", "2.jpg"]
        np.testing.assert_array_equal(part["id"], [30, 10, 20])
        assert [len(boxes) for boxes in part["boxes"]] == [1, 0, 2] and part["boxes"][1].shape == (0, 4)
        np.testing.assert_allclose(part["boxes"][2], [[0.2, 0.4, 0.2, 0.4], [0.55, 0.55, 0.1, 0.1]], rtol=1e-6)
        np.testing.assert_array_equal(part["boxes"][0], [[0.5, 0.5, 1, 1]])
        assert [classes.tolist() for classes in part["classes"]] == [[0], [], [2, 1]]
        assert [area.tolist() for area in part["area"]] == [[5000], [], [333.5, 50]]  # the box's where none is given
        assert [crowd.tolist() for crowd in part["crowd"]] == [[False], [], [True, False]]
        kinds = {name: part[name][0].dtype for name in ("boxes", "classes", "crowd", "area")}
        assert kinds == {"boxes": np.float32, "classes": np.int32, "crowd": bool, "area": np.float32}
        assert part["id"].dtype == np.int64 and decode(part["image"][0]).shape == (50, 100, 3)
    assert found.counts["train"]["images_without_boxes"] == 1 and sum(found.counts["train"].values()) == 1


def test_wrong_boxes_are_counted(tmp_path):
    nan = float("nan")
    wrong = {
        "degenerate": [[1, 1, 0.05, 9], [1, 1, 9, 0], [1, 1, -5, 5], [nan, 1, 5, 5], [1, 1, 5, float("inf")]],
        "outside": [[100, 1, 5, 5], [1, -9, 5, 5], [99.95, 1, 50, 5]],
        "unknown_class": [[1, 1, 5, 5]],
        "clipped": [[-5, -5, 15, 15], [90, 40, 20, 20]],
    }

    def change(told):
        told["annotations"] = [annotation(0, 20, 3, [0, 0, 100, 50])]
        for kind, boxes in wrong.items():
            told["annotations"] += [annotation(1, 30, 4 if kind == "unknown_class" else 7, box) for box in boxes]

    found = read_coco(coco(tmp_path, change))
    expected = {kind: len(boxes) for kind, boxes in wrong.items()}
    assert found.counts["train"] == expected | {"images_without_boxes": 1, "classes_without_boxes": 1}
    np.testing.assert_allclose(found.train["boxes"][0], [[0.05, 0.1, 0.1, 0.2], [0.95, 0.9, 0.1, 0.2]], rtol=1e-6)
    for leaf in ("boxes", "area"):
        assert all(np.isfinite(one).all() for one in found.train[leaf])


def test_rounding_is_no_cut():
    corners = np.float32([[0, 0, 1 + 2e-7, 1], [-1e-7, 0.5, 0.001, 0.501]])
    zeros = np.zeros(2, np.int64)
    part, counts = tidy(zeros, corners, zeros, zeros, zeros, 1, 1)
    assert sum(counts.values()) == 0
    np.testing.assert_allclose(part["boxes"][0], [[0.5, 0.5, 1, 1], [0.0005, 0.5005, 0.001, 0.001]], rtol=1e-3)


def test_no_box_at_all():
    nothing = np.zeros(0, np.int64)
    part, counts = tidy(nothing, np.zeros((0, 4)), nothing, nothing, nothing, 3, 2)
    assert [boxes.shape for boxes in part["boxes"]] == [(0, 4)] * 3 and counts["images_without_boxes"] == 3
    assert counts["classes_without_boxes"] == 2


def put(*path_and_value):
    """A change: the value at a path of the content."""
    *path, last, value = path_and_value

    def change(told):
        for key in path:
            told = told[key]
        told[last] = value

    return change


BOX = ("annotations", 0, "bbox")
BAD = {
    "broken JSON": (lambda told: '{"images": [', "instances_train2017.json cannot be read as JSON"),
    "nothing": (lambda told: " ", "cannot be read as JSON"),
    "a list": (lambda told: "[]", "has no list images"),
    "no annotations": (lambda told: told.pop("annotations") and None, "has no list annotations"),
    "no categories": (put("categories", []), "has no categories"),
    "categories are no list": (put("categories", {}), "has no list categories"),
    "an annotation is a number": (put("annotations", 1, 5), "5 in annotations is no record"),
    "no images": (put("images", []), "lists no images"),
    "a category named": (put("categories", 1, {"id": "dog"}), "category id 'dog' is no whole number"),
    "a category of halves": (put("categories", 1, {"id": 1.5}), "category id 1.5 is no whole number"),
    "a category twice": (put("categories", 1, {"id": 7}), "two categories have the id 7"),
    "another category": (
        put("categories", 0, {"id": 7, "name": "bat"}),
        "val2017.json: category 7 is 'cat', and in .* 'bat'",
    ),
    "an image named": (put("images", 0, "id", "x"), "image id 'x' is no whole number"),
    "an image twice": (put("images", 1, "id", 30), "two images have the id 30"),
    "no file name": (put("images", 0, "file_name", None), "image 30 has no file_name"),
    "no width": (put("images", 1, "width", None), "image 10 is None wide and 50 high"),
    "no height": (put("images", 1, "height", 0), "image 10 is 100 wide and 0 high"),
    "of no image": (put("annotations", 0, "image_id", 99), "annotation 1 is of the image 99, which is not listed"),
    "three numbers": (put(*BOX, [1, 2, 3]), r"annotation 1 has the bbox \[1, 2, 3\]: expected four numbers"),
    "words": (put(*BOX, [1, 2, 3, "4"]), "expected four numbers"),
    "no box": (put(*BOX, None), "bbox None: expected four"),
    "true": (put(*BOX, [True, 1, 2, 3]), "expected four numbers"),
    "a category as a word": (put("annotations", 0, "category_id", "cat"), "has the category_id 'cat'"),
    "an area as a word": (put("annotations", 0, "area", "large"), "has the area .*large"),
    "the first image gone": (put("images", 0, "file_name", "x.jpg"), "x.jpg, the first image of .* is in none of"),
    "the last image gone": (put("images", 2, "file_name", "x.jpg"), "x.jpg, the last image of .* is not there"),
    "another shape": (put("images", 0, "width", 50), "3.jpg is 100 wide and 50 high, and in .* 50 and 50"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_coco(name, tmp_path):
    change, line = BAD[name]
    folder = coco(tmp_path / "mine", change)
    said_in_a_line(lambda: read_coco(folder), line, folder)


def test_bad_folders(tmp_path):
    said_in_a_line(lambda: read_coco(tmp_path / "x"), "x is not there or no folder")
    folder = coco(tmp_path / "mine")
    (folder / "annotations" / "instances_train2014.json").write_text("{}")
    said_in_a_line(lambda: read_coco(folder), "instances_train2014.json, instances_train2017.json: leave one")
    assert read_coco(folder, "instances_train2017.json").names == ("dog", "cat", "owl")
    (folder / "annotations" / "instances_val2017.json").unlink()
    said_in_a_line(lambda: read_coco(folder, "instances_train2017.json"), r"instances_val\*.json is not there")
    (folder / "train2017" / "3.jpg").write_text("x")
    said_in_a_line(lambda: read_coco(folder, *["instances_train2017.json"] * 2), "3.jpg cannot be read as an image")


def test_images_that_were_made_smaller_have_the_same_boxes(tmp_path):
    assert read_coco(coco(tmp_path, size=(51, 25))).counts["train"]["clipped"] == 0


def test_an_image_is_missed_when_it_is_read(tmp_path):
    folder = coco(tmp_path)
    (folder / "train2017" / "1.jpg").unlink()
    found = read_coco(folder)
    said_in_a_line(lambda: decode(found.train["image"][1]), "train2017/1.jpg is not there")


@pytest.fixture(scope="module")
def mini():
    return read_boxes_tfds(prepared("coco_mini"), False, "coco_mini")


def test_real_boxes(mini):
    """The counts of the prepared set."""
    assert [len(part["image"]) for part in mini[:2]] == [288, 281] and len(mini.names) == 80
    assert mini.names[:2] == ("person", "bicycle")
    assert sum(len(boxes) for part in mini[:2] for boxes in part["boxes"]) == 4652
    assert mini.counts["train"]["images_without_boxes"] + mini.counts["test"]["images_without_boxes"] == 2
    image = mini.test["image"][0]
    assert isinstance(image.source.read(0, "image"), bytes) and decode(image).shape == (320, 320, 3)


def test_a_prepared_set_and_its_files_are_the_same(mini, tmp_path):
    """What is prepared by TFDS, written as COCO's own files, is read alike."""
    part, some = mini.test, range(12)
    (tmp_path / "val").mkdir()
    told = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(mini.names)]}
    for i in some:
        image = part["image"][i]
        (tmp_path / "val" / f"{i}.jpg").write_bytes(image.source.read(image.index, "image"))
        height, width = decode(image).shape[:2]
        told["images"].append({"id": int(part["id"][i]), "file_name": f"{i}.jpg", "width": width, "height": height})
        for box, kind, area in zip(part["boxes"][i], part["classes"][i], part["area"][i], strict=True):
            corner = pixels(box, width, height)
            told["annotations"].append(annotation(0, int(part["id"][i]), int(kind), corner, area=float(area)))
    (tmp_path / "instances_val.json").write_text(json.dumps(told))
    found = read_coco(tmp_path, "instances_val.json", "instances_val.json")
    for i in some:
        np.testing.assert_allclose(found.test["boxes"][i], part["boxes"][i], atol=1e-6)
        np.testing.assert_array_equal(found.test["classes"][i], part["classes"][i])
        np.testing.assert_array_equal(found.test["area"][i], part["area"][i])
        np.testing.assert_array_equal(decode(found.test["image"][i]), decode(part["image"][i]))
    np.testing.assert_array_equal(found.test["id"], part["id"][:12])


def pixels(box, width, height):
    x, y, w, h = (float(value) for value in box)
    return (x - w / 2) * width, (y - h / 2) * height, w * width, h * height


def test_a_prepared_set_without_boxes():
    folder = prepared("coco_voc_seg_mini")
    said_in_a_line(lambda: read_boxes_tfds(folder, False, "coco_voc_seg_mini"), "expected image and objects")
    said_in_a_line(lambda: read_boxes_tfds(folder, False, "coco/2017"), "coco/2017 is not in .*--download")


def prepare(folder, features, records):
    """A set of TFDS's own making, of the name shop."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Shop(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, downloads):
                return {"train": self._generate_examples(), "test": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(records())

    Shop(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.mark.versions
def test_a_prepared_set_without_areas_and_ids(tmp_path):
    """As TFDS's voc is: boxes and labels alone, and a test split in place of one for validation."""
    import tensorflow_datasets as tfds

    def encoded():
        file = io.BytesIO()
        Image.new("RGB", (100, 50)).save(file, "jpeg")
        file.seek(0)
        return file

    box = tfds.features.BBox
    told = [{"bbox": box(0.2, 0.1, 0.6, 0.3), "label": "owl"}]
    records = lambda: [{"image": encoded(), "objects": told}, {"image": encoded(), "objects": []}]  # noqa: E731
    label = tfds.features.ClassLabel(names=["cat", "owl"])
    objects = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "label": label})
    prepare(tmp_path, {"image": tfds.features.Image(), "objects": objects}, records)
    found = read_boxes_tfds(tmp_path, False, "shop")
    assert found.names == ("cat", "owl") and found.counts["test"]["classes_without_boxes"] == 1
    full = next(i for i in (0, 1) if len(found.test["boxes"][i]))
    np.testing.assert_allclose(found.test["boxes"][full], [[0.2, 0.4, 0.2, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(found.test["area"][full], [20 * 20], rtol=1e-5)
    assert found.test["classes"][full].tolist() == [1] and found.test["id"].tolist() == [0, 1]
    for deeper in ("shop", "shop/1.0.0"):
        assert read_boxes_tfds(tmp_path / deeper, False, "shop").names == found.names
    for file in (tmp_path / "shop" / "1.0.0").glob("*test*"):
        file.write_bytes(b"")
    said_in_a_line(lambda: read_boxes_tfds(tmp_path, False, "shop"), "Split 'test' of .* could not be read")
