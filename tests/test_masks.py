"""Images with masks: VOC's layout, lists, prepared sets; what does not fit is told in a line."""

import numpy as np
import pytest
from lines import prepared, said_in_a_line
from PIL import Image

from l2t_jax.data.masks import VOC_CLASSES, read_masks_tfds, read_pair, read_voc

N = 10


def voc(folder, lists=True):
    """A folder in VOC's layout, image i of (20 + i) x 30 pixels and with the class i in its mask."""
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / kind).mkdir(parents=True)
    for i in range(N):
        mask = np.full((20 + i, 30), 255, np.uint8)
        mask[:, 3:], mask[:, 20:] = 0, i
        Image.new("RGB", (30, 20 + i), (i, i, i)).save(folder / "JPEGImages" / f"{i}.jpg")
        image = Image.fromarray(mask).convert("P")
        image.putdata(mask.ravel().tolist())
        image.save(folder / "SegmentationClass" / f"{i}.png")
    if lists:
        write(folder, "train", range(6))
        write(folder, "val", range(6, N))
    return folder


def write(folder, name, lines):
    (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def stems(part):
    return [path.stem for path in part["image"]]


@pytest.mark.versions
def test_lists_of_names(tmp_path):
    folder = voc(tmp_path / "VOCdevkit" / "VOC2012")
    for place in (folder, tmp_path, tmp_path / "VOCdevkit"):
        found = read_voc(place)
        assert stems(found.train) == list("012345") and stems(found.test) == list("6789")
        assert found.names == VOC_CLASSES and len(found.names) == 21 and found.counts["test"]["in_training_too"] == 0
    image, mask = read_pair(found.test["image"][0], found.test["mask"][0], 21)
    assert image.shape == (26, 30, 3) and mask.shape == (26, 30) and np.unique(mask).tolist() == [0, 6, 255]
    assert read_voc(folder, test="train").counts["test"]["in_training_too"] == 6


def test_augmented_masks_and_pairs(tmp_path):
    folder = voc(tmp_path)
    (folder / "SegmentationClassAug").mkdir()
    for i in (1, 2):
        image = Image.fromarray(np.full((20 + i, 30), 7, np.uint8))
        image.save(folder / "SegmentationClassAug" / f"{i}.png")
    write(folder, "trainaug", range(6))
    found = read_voc(folder, "trainaug")
    assert [path.parent.name[17:] for path in found.train["mask"]] == ["", "Aug", "Aug", "", "", ""]
    pairs = [f"/JPEGImages/{i}.jpg SegmentationClassAug/{i}.png" for i in (1, 2)]
    (folder / "mine.txt").write_text("\n".join(pairs))
    for name in ("mine", "mine.txt", str(folder / "mine.txt")):
        found = read_voc(folder, name, "val")
        assert stems(found.train) == ["1", "2"] and np.unique(read_pair(*map(at0, found.train.values()), 21)[1]) == [7]
    assert [path.parent.name for path in read_voc(folder).train["mask"]] == ["SegmentationClass"] * 6


def at0(leaf):
    return leaf[0]


def test_without_lists_a_fifth_is_tested_on(tmp_path):
    folder = voc(tmp_path, lists=False)
    found, again = read_voc(folder), read_voc(folder)
    assert len(found.test["image"]) == 2 and sorted(stems(found.train) + stems(found.test)) == list("0123456789")
    assert stems(found.test) == stems(again.test)


def test_classes_of_ones_own(tmp_path):
    folder = voc(tmp_path)
    (folder / "classes.txt").write_text("ground\n" + "\n".join("abcdefghi"))
    assert read_voc(folder).names == ("ground", *"abcdefghi")


def unlink(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def resaved(name, image):
    return lambda folder: image.save(folder / name)


def grey(value, size=(30, 20)):
    return Image.fromarray(np.full(size[::-1], value, np.uint8))


def no_lists(folder):
    unlink("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt")(folder)


FIRST = "SegmentationClass/0.png"
BAD = {
    "no training list": (unlink("ImageSets/Segmentation/train.txt"), "Segmentation/train.txt is not there"),
    "no test list": (unlink("ImageSets/Segmentation/val.txt"), "Segmentation/val.txt is not there"),
    "other lists": (
        lambda f: [no_lists(f), write(f, "mine", "01")],
        "has the lists mine, and none called train",
    ),
    "an empty list": (lambda f: write(f, "train", []), "train.txt is empty"),
    "three words": (lambda f: write(f, "train", ["0", "1 2 3"]), "train.txt, line 2: 3 words"),
    "a name that is not there": (lambda f: write(f, "val", ["6", "x"]), r"val.txt, line 2: the image .*x.jpg is not"),
    "an image gone": (unlink("JPEGImages/3.jpg"), r"train.txt, line 4: the image .*3.jpg is not there"),
    "a mask gone": (unlink("SegmentationClass/3.png"), r"train.txt, line 4: the mask .*Class/3.png is not there"),
    "a pair gone": (lambda f: write(f, "train", ["a.jpg b.png"]), r"line 1: the image .*a.jpg is not there"),
    "no latin": (
        lambda f: (f / "ImageSets/Segmentation/train.txt").write_bytes(b"\xe9"),
        "train.txt cannot be read: expected a text in UTF-8",
    ),
    "another size": (resaved(FIRST, grey(1, (30, 19))), r"0.png is 19x30 and its image .*0.jpg 20x30"),
    "a class too many": (resaved(FIRST, grey(21)), r"0.png has the class 21: expected 0 to 20, or 255"),
    "a class of 254": (resaved(FIRST, grey(254)), r"0.png has the class 254"),
    "colours": (resaved(FIRST, Image.new("RGB", (30, 20))), r"0.png has colours \(mode RGB\)"),
    "a broken mask": (lambda f: (f / FIRST).write_bytes(b"\x89PNG"), "0.png cannot be read as an image"),
    "a broken image": (lambda f: (f / "JPEGImages/9.jpg").write_bytes(b"x"), "9.jpg cannot be read as an image"),
    "the background alone": (
        lambda f: [grey(0, (30, 20 + i)).save(f / f"SegmentationClass/{i}.png") for i in range(6)],
        "no training mask has another class than the background",
    ),
    "nothing but borders": (
        lambda f: [grey(255, (30, 20 + i)).save(f / f"SegmentationClass/{i}.png") for i in range(6)],
        "no training mask has another class",
    ),
    "a mask without image": (
        lambda f: [no_lists(f), unlink("JPEGImages/3.jpg")(f)],
        r"3.png has no image .*JPEGImages/3.jpg",
    ),
    "no masks": (
        lambda f: [no_lists(f), unlink(*(f"SegmentationClass/{i}.png" for i in range(N)))(f)],
        "holds 0 masks",
    ),
    "no folder of images": (
        lambda f: [no_lists(f), (f / "ImageSets/Segmentation").rmdir(), (f / "JPEGImages").rename(f / "images")],
        "holds no JPEGImages",
    ),
    "no folder of masks": (
        lambda f: [no_lists(f), (f / "SegmentationClass").rename(f / "masks")],
        "holds neither SegmentationClass nor",
    ),
    "one class": (lambda f: (f / "classes.txt").write_text("a\n"), "classes.txt has 1 lines"),
    "a class twice": (lambda f: (f / "classes.txt").write_text("a\nb\na\n"), "classes.txt names a class twice"),
    "too few classes": (lambda f: (f / "classes.txt").write_text("a\nb\n"), r"5.png has the class 5: expected 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name, tmp_path):
    change, line = BAD[name]
    folder = voc(tmp_path / "mine")
    change(folder)
    said_in_a_line(lambda: read_voc(folder), line, folder)


def test_no_folder(tmp_path):
    said_in_a_line(lambda: read_voc(tmp_path / "x"), "x is not there or no folder")


def test_real_masks():
    folder = prepared("coco_voc_seg_mini")
    found = read_masks_tfds(folder, False, "coco_voc_seg_mini")
    assert found.names == VOC_CLASSES and [len(part["image"]) for part in found[:2]] == [189, 195]
    seen = set()
    for image, mask in zip(found.test["image"], found.test["mask"], strict=True):
        seen |= set(np.unique(read_pair(image, mask, 21)[1]).tolist())
    assert seen == {*range(21), 255}
    said_in_a_line(lambda: read_masks_tfds(folder, False, "coco_mini"), "objects.*expected image and segmentation_mask")


def test_vocs_own_masks_are_its_folder(tmp_path):
    """TFDS's voc has boxes alone: the folder is sought beside it, and where TFDS unpacks."""
    said_in_a_line(lambda: read_masks_tfds(tmp_path, False, "voc/2012"), "VOC2012 is not in .*VOCdevkit/VOC2012")
    voc(tmp_path / "downloads" / "voc" / "2012" / "extracted" / "TAR.a" / "VOCdevkit" / "VOC2012")
    assert len(read_masks_tfds(tmp_path, False, "voc/2012").train["image"]) == 6
