"""Images whose pixels are classified: folders in VOC's layout, and prepared TFDS data sets with masks.

Legend: n examples, H and W height and width in pixels, C classes, the background among them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l2t_jax.data.annotated import Annotated, check_same, ends
from l2t_jax.data.images import Element, Stored, decode, decode_mask, named, objects
from l2t_jax.data.sets import DataError, require
from l2t_jax.data.tfds import Records, open_tfds

IGNORED = 255  # the value of pixels that are not classified: VOC's borders
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IMAGES, MASKS, AUGMENTED, LISTS = "JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"
_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG")
_HELD_OUT = 5  # one in so many is tested on, where no lists say which


def read_voc(folder: Path, train: str = "train", test: str = "val") -> Annotated:
    """Images and masks of a folder in VOC's layout: JPEGImages, SegmentationClass, ImageSets/Segmentation.

    Args:
      folder: that one, or one that holds VOC2012 or VOCdevkit/VOC2012.
      train: a list: the name of a .txt in ImageSets/Segmentation or in the folder, or its path. Its lines are names of
        images, or pairs "image mask" of paths in the folder. The masks of names are those of SegmentationClass; of
        SegmentationClassAug, where the list's name has "aug" in it. Without any list a fifth of all names that
        have a mask is tested on, always the same.
      test: likewise.
    Returns:
      the parts; the classes are VOC's, or the lines of a classes.txt in the folder, background first. counts["test"]
      tells how many images of the test list are in the training list too.
    Raises:
      DataError: one line says what is missing, or does not fit in the first and the last image. The others are
        looked at when they are read, by `read_pair`.
    """
    folder = _root(Path(folder))
    names = _class_names(folder)
    lists = [_list_file(folder, name) for name in (train, test)]
    if lists == [None, None]:
        pairs = _without_lists(folder, train)
    else:
        for name, found in zip((train, test), lists, strict=True):
            require(found is not None, f"{folder / LISTS / name}.txt is not there: expected a list of names of images.")
        pairs = [_listed(folder, found) for found in lists if found is not None]
    parts = [{"image": objects(i for i, _ in part), "mask": objects(m for _, m in part)} for part in pairs]
    both = len({image for image, _ in pairs[0]} & {image for image, _ in pairs[1]})
    _try(parts, len(names), str(folder))
    return Annotated(parts[0], parts[1], names, {"train": {}, "test": {"in_training_too": both}})


def read_masks_tfds(data_dir: Path, download: bool, name: str) -> Annotated:
    """Images and masks of a prepared TFDS data set with the features "image" and "segmentation_mask".

    TFDS's own voc/2007 and voc/2012 have boxes and no masks: of a set `voc/...` without masks, the folder VOC2012 is
    sought where TFDS unpacks what it downloads, and beside the prepared set.

    Args:
      data_dir: holds prepared sets.
      download: whether to prepare a set that is missing.
      name: of the set; its splits train and validation (or test) are read.
    Returns:
      the parts; images and masks are read when they are asked for.
    Raises:
      DataError: the data are missing or unreadable, or have no masks.
    """
    voc = name.startswith("voc/")
    found = _unpacked_voc(data_dir, name) if voc else None
    if found is not None:
        return read_voc(found)
    try:
        train, test = open_tfds(data_dir, download, name)
    except DataError as error:
        year = name.replace("/", "").upper()
        told = (
            f"{year} is not in {data_dir}: unpack VOC's archive there, so that {data_dir / 'VOCdevkit' / year} is it."
        )
        raise DataError(told if voc and not download else str(error)) from error
    for records in (train, test):
        if not {"image", "segmentation_mask"} <= set(records.fields):
            found = _unpacked_voc(data_dir, name) if voc else None
            if found is not None:  # the download has just unpacked it
                return read_voc(found)
            also = " TFDS has only VOC's boxes: give VOC's own folder VOC2012." if voc else ""
            raise DataError(
                f"{name} in {records.directory} has {', '.join(records.fields)}: expected image and segmentation_mask."
                + also
            )
    labels = _masks_of(train)
    check_same(labels, _masks_of(test), name)
    parts = [
        {
            "image": objects(Stored(records, i, "image") for i in range(len(records))),
            "mask": objects(Stored(records, i, "segmentation_mask") for i in range(len(records))),
        }
        for records in (train, test)
    ]
    _try(parts, len(labels), name)
    return Annotated(parts[0], parts[1], labels, {"train": {}, "test": {}})


def read_pair(image: Element, mask: Element, classes: int, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, decoded and checked.

    Args:
      image: see `l2t_jax.data.images`.
      mask: of the same size.
      classes: C; other pixels than 0 to C - 1 must be 255.
      where: what to call them in an error, if they are no files.
    Returns:
      image [H, W, 3] uint8, mask [H, W] uint8.
    Raises:
      DataError: one is missing or broken, their sizes differ, or a pixel is of no class.
    """
    pixels, labels = decode(image, where), decode_mask(mask, where)
    sizes = [f"{array.shape[0]}x{array.shape[1]}" for array in (labels, pixels)]
    require(
        sizes[0] == sizes[1],
        f"{named(mask, where)} is {sizes[0]} and its image {named(image, where)} {sizes[1]}: expected one size.",
    )
    strange = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[classes:IGNORED]) + classes
    require(
        not len(strange),
        f"{named(mask, where)} has the class {', '.join(map(str, strange[:3]))}: expected 0 to {classes - 1}, "
        f"or {IGNORED} for pixels that do not count.",
    )
    return pixels, labels


def _root(folder: Path) -> Path:
    require(folder.is_dir(), f"{folder} is not there or no folder: expected one with {IMAGES} and {MASKS}.")
    inner = [folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"]
    for place in inner:
        if (place / IMAGES).is_dir():
            return place
    # Lists of pairs need none of VOC's names of folders.
    require(
        bool(list(folder.glob("*.txt"))) or (folder / LISTS).is_dir(),
        f"{folder} holds no {IMAGES}: expected VOC's layout with {IMAGES}, {MASKS} and {LISTS}, or lists of pairs.",
    )
    return folder


def _class_names(folder: Path) -> tuple[str, ...]:
    own = folder / "classes.txt"
    if not own.is_file():
        return VOC_CLASSES
    names = tuple(_lines(own))
    require(2 <= len(names) <= IGNORED, f"{own} has {len(names)} lines: expected 2 to {IGNORED}, background first.")
    require(len(set(names)) == len(names), f"{own} names a class twice.")
    return names


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: expected a text in UTF-8.") from error


def _list_file(folder: Path, name: str) -> Path | None:
    places = (folder / LISTS / f"{name}.txt", folder / f"{name}.txt", folder / name, Path(name))
    return next((place for place in places if place.suffix == ".txt" and place.is_file()), None)


def _listed(folder: Path, path: Path) -> list[tuple[Path, Path]]:
    """The images and masks of a list."""
    lines = _lines(path)
    require(bool(lines), f"{path} is empty: expected a name of an image in each line.")
    order = (AUGMENTED, MASKS) if "aug" in path.stem.lower() else (MASKS, AUGMENTED)
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        require(len(words) < 3, f"{path}, line {number}: {len(words)} words, expected a name, or an image and a mask.")
        if len(words) == 2:
            places = [[folder / word.lstrip("/"), Path(word)] for word in words]
        else:
            stem = words[0].removesuffix(".jpg").removesuffix(".png")
            places = [
                [folder / IMAGES / f"{stem}{ending}" for ending in _ENDINGS],
                [folder / kind / f"{stem}.png" for kind in order],
            ]
        there = [next((place for place in places if place.is_file()), None) for places in places]
        for kind, file, sought in zip(("image", "mask"), there, places, strict=True):
            require(file is not None, f"{path}, line {number}: the {kind} {sought[0]} is not there.")
        image, mask = there
        assert image is not None and mask is not None
        pairs.append((image, mask))
    return pairs


def _without_lists(folder: Path, name: str) -> list[list[tuple[Path, Path]]]:
    """All images that have a mask, of which a fifth, always the same, is tested on."""
    given = sorted((folder / LISTS).glob("*.txt")) if (folder / LISTS).is_dir() else []
    told = ", ".join(path.stem for path in given)
    require(not given, f"{folder / LISTS} has the lists {told}, and none called {name}: name one of them.")
    kinds = [folder / kind for kind in (MASKS, AUGMENTED) if (folder / kind).is_dir()]
    require(bool(kinds), f"{folder} holds neither {MASKS} nor {LISTS}: expected masks as PNGs.")
    masks = sorted(kinds[0].glob("*.png"))
    pairs = []
    for mask in masks:
        image = next((p for e in _ENDINGS if (p := folder / IMAGES / f"{mask.stem}{e}").is_file()), None)
        require(image is not None, f"{mask} has no image {folder / IMAGES / mask.stem}.jpg.")
        assert image is not None
        pairs.append((image, mask))
    require(len(pairs) >= 2, f"{kinds[0]} holds {len(pairs)} masks (*.png): expected two or more.")
    held = np.zeros(len(pairs), bool)
    held[np.random.default_rng((0, 5)).permutation(len(pairs))[: max(1, len(pairs) // _HELD_OUT)]] = True
    return [[pair for pair, test in zip(pairs, held, strict=True) if test == part] for part in (False, True)]


def _masks_of(records: Records) -> tuple[str, ...]:
    """The classes of a set's masks: TFDS names those of an image's labels, the background where it is among them."""
    named_there = records.classes("labels")
    return named_there if named_there[:1] == VOC_CLASSES[:1] else VOC_CLASSES


def _unpacked_voc(data_dir: Path, name: str) -> Path | None:
    """VOC's own folder of that year, beside the prepared set or where TFDS unpacks its archives."""
    year = f"VOC{name.removeprefix('voc').strip('/')}"
    places = [data_dir / year, data_dir / "VOCdevkit" / year]
    for pattern in ("extracted", "*/extracted", "*/*/extracted"):
        places += sorted((data_dir / "downloads").glob(f"{pattern}/*/VOCdevkit/{year}"))
    return next((place for place in places if (place / MASKS).is_dir()), None)


def _try(parts: Sequence[dict[str, np.ndarray]], classes: int, what: str) -> None:
    """Read the ends of both parts, and of the training masks as many as it takes to see a class."""
    for part in parts:
        for i in ends(part["image"]):
            read_pair(part["image"][i], part["mask"][i], classes)
    seen = (decode_mask(mask) for mask in parts[0]["mask"])
    require(
        any(bool(np.any((mask > 0) & (mask != IGNORED))) for mask in seen),
        f"{what}: no training mask has another class than the background: nothing can be learned.",
    )
