"""Images with boxes: COCO's files, and prepared TFDS data sets. What boxes are wrong is left out and counted.

Legend: n images, m boxes of all of them, k boxes of one, C classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2t_jax.data.annotated import Annotated, check_same, ends
from l2t_jax.data.files import in_a_line
from l2t_jax.data.images import Stored, objects, size_of
from l2t_jax.data.sets import DataError, require
from l2t_jax.data.tfds import Records, open_tfds

LEAST = 1e-3  # of the image: a box less wide or high is none (darknet's bound)
_ROUNDING = 1e-6  # how far float32 may take a box out of its image: this is not counted
_ASPECT = 0.02  # how far an image's shape may be from that its annotations tell, for rounding when it was resized


def read_coco(folder: Path, train: str = "instances_train*.json", test: str = "instances_val*.json") -> Annotated:
    """Images and boxes of a folder in COCO's layout.

    Args:
      folder: holds the annotations, in the folder annotations or beside it, and the images: those of
        instances_train2017.json in train2017, images/train2017 or images, or from `folder` on, as file_name says.
      train: the name of the training annotations, or a pattern that fits one file.
      test: likewise.
    Returns:
      the parts, see `Annotated`; the classes are the categories of training in the order of their ids. Boxes that are
      no boxes are left out, and those that stick out of their image are cut: the counts tell how many.
    Raises:
      DataError: one line names the file and what is wrong. The first and the last image are opened at once, the others
        when they are read.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder} is not there or no folder: expected one with annotations/{train}.")
    files = [_annotations(folder, pattern) for pattern in (train, test)]
    contents = [_json(file) for file in files]
    ids, names = _categories(files[0], contents[0])
    other = dict(zip(*_categories(files[1], contents[1]), strict=True))
    for number, name in zip(ids, names, strict=True):
        known = other.get(number, name)
        require(known == name, f"{files[1]}: category {number} is {known!r}, and in {files[0].name} {name!r}.")
    parts, counts = {}, {}
    for part, file, content in zip(("train", "test"), files, contents, strict=True):
        parts[part], counts[part] = _coco_part(folder, file, content, ids)
    return Annotated(parts["train"], parts["test"], names, counts)


def read_boxes_tfds(data_dir: Path, download: bool, name: str) -> Annotated:
    """Images and boxes of a prepared TFDS data set with the features "image" and "objects", e.g. coco/2017.

    All annotations are kept in memory; images are read when they are asked for.

    Args:
      data_dir: holds prepared sets.
      download: whether to prepare a set that is missing.
      name: of the set; its splits train and validation (or test) are read.
    Returns:
      as `read_coco`. Where the set has no areas, they are those of the boxes; where it has no ids, places.
    Raises:
      DataError: the data are missing or unreadable, or have no boxes.
    """
    both = open_tfds(data_dir, download, name)
    for records in both:
        require(
            {"image", "objects"} <= set(records.fields),
            f"{name} in {records.directory} has {', '.join(records.fields)}: expected image and objects.",
        )
    names = [records.classes("objects", "label") for records in both]
    require(bool(names[0]), f"{name}: its objects have no class: expected a feature objects/label.")
    check_same(names[0], names[1], name)
    parts, counts = {}, {}
    for part, records in zip(("train", "test"), both, strict=True):
        parts[part], counts[part] = _tfds_part(records, len(names[0]))
    return Annotated(parts["train"], parts["test"], names[0], counts)


def tidy(
    owner: np.ndarray, corners: np.ndarray, classes: np.ndarray, crowd: np.ndarray, area: np.ndarray, n: int, c: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Boxes by image, without those that are none; boxes that stick out are cut.

    Args:
      owner: [m] the image of each.
      corners: [m, 4] left, top, right, bottom, as parts of the image's width and height.
      classes: [m] integers.
      crowd: [m] bool.
      area: [m].
      n: images.
      c: C.
    Returns:
      "boxes", "classes", "crowd" and "area" of `Annotated`, those of an image in the order given. Counts: "degenerate"
      (not finite, or less than .001 of the image wide or high), "outside" (nothing, or less than that, is inside),
      "unknown_class" (none of 0 to C - 1), each of those that are left out, by the first that holds; "clipped", of
      those that are cut; "images_without_boxes" and "classes_without_boxes", of what is left.
    """
    corners = np.asarray(corners, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(corners).all(1) & ((corners[:, 2:] - corners[:, :2]) >= LEAST - _ROUNDING).all(1)
    cut = np.clip(np.nan_to_num(corners), 0, 1)
    inside = ((cut[:, 2:] - cut[:, :2]) >= LEAST - _ROUNDING).all(1)
    known = (classes >= 0) & (classes < c)
    keep = good & inside & known
    moved = keep & (np.abs(cut - np.where(keep[:, None], corners, cut)) > _ROUNDING).any(1)
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.argsort(owner[chosen], kind="stable")]
    boxes = np.concatenate([(cut[:, :2] + cut[:, 2:]) / 2, cut[:, 2:] - cut[:, :2]], 1).astype(np.float32)
    borders = np.searchsorted(owner[chosen], np.arange(1, n))
    leaves = {"boxes": boxes, "classes": classes.astype(np.int32), "crowd": crowd.astype(bool)}
    leaves["area"] = area.astype(np.float32)
    part = {name: objects(np.split(leaf[chosen], borders)) for name, leaf in leaves.items()}
    counts = {
        "degenerate": int(np.sum(~good)),
        "outside": int(np.sum(good & ~inside)),
        "unknown_class": int(np.sum(good & inside & ~known)),
        "clipped": int(np.sum(moved)),
        "images_without_boxes": n - len(np.unique(owner[chosen])),
        "classes_without_boxes": c - len(np.unique(classes[chosen])),
    }
    return part, counts


def _annotations(folder: Path, pattern: str) -> Path:
    found = sorted({*(folder / "annotations").glob(pattern), *folder.glob(pattern)})
    require(bool(found), f"{folder / 'annotations' / pattern} is not there: expected COCO's annotations of boxes.")
    told = ", ".join(file.name for file in found)
    require(len(found) == 1, f"{folder} has {told}: leave one there, or say which.")
    return found[0]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({in_a_line(error)}).") from error
    for key in ("images", "annotations", "categories"):
        listed = isinstance(content, dict) and isinstance(content.get(key), list)
        require(listed, f"{file} has no list {key}: expected COCO's annotations of boxes.")
        strange = next((x for x in content[key] if not isinstance(x, dict)), None)
        require(strange is None, f"{file}: {str(strange)[:60]} in {key} is no record: expected an object in braces.")
    return content


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _categories(file: Path, content: dict[str, Any]) -> tuple[list[int], tuple[str, ...]]:
    """Ids and names, in the order of the ids."""
    found: dict[int, str] = {}
    for category in content["categories"]:
        number = category.get("id")
        require(_whole(number), f"{file}: the category id {number!r} is no whole number.")
        require(number not in found, f"{file}: two categories have the id {number}.")
        found[number] = str(category.get("name", number))
    require(bool(found), f"{file} has no categories: expected one or more.")
    ids = sorted(found)
    return ids, tuple(found[number] for number in ids)


def _coco_part(
    folder: Path, file: Path, content: dict[str, Any], ids: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    images, annotations = content["images"], content["annotations"]
    require(bool(images), f"{file} lists no images: expected one or more.")
    place: dict[int, int] = {}
    for i, image in enumerate(images):
        number, sides = image.get("id"), (image.get("width"), image.get("height"))
        require(_whole(number), f"{file}: the image id {number!r} is no whole number.")
        require(number not in place, f"{file}: two images have the id {number}.")
        require(isinstance(image.get("file_name"), str), f"{file}: image {number} has no file_name.")
        good = all(_number(side) and side > 0 for side in sides)
        require(good, f"{file}: image {number} is {sides[0]} wide and {sides[1]} high: expected two positive numbers.")
        place[number] = i
    for annotation in annotations:
        which = f"{file}: annotation {annotation.get('id')}"
        owner, box = annotation.get("image_id"), annotation.get("bbox")
        listed = _whole(owner) and owner in place
        require(listed, f"{which} is of the image {owner!r}, which is not listed.")
        four = isinstance(box, list) and len(box) == 4 and all(map(_number, box))
        require(four, f"{which} has the bbox {str(box)[:60]}: expected four numbers, x, y, width and height.")
        number = annotation.get("category_id")
        require(_whole(number), f"{which} has the category_id {number!r}: expected a whole number.")
        area = annotation.get("area", 0)
        require(_number(area), f"{which} has the area {str(area)[:60]!r}: expected a number.")
    paths = _paths(folder, file, [image["file_name"] for image in images])
    sizes = np.array([(image["width"], image["height"]) for image in images], np.float64)
    for i in ends(paths):
        height, width = size_of(paths[i])
        told = f"{paths[i]} is {width} wide and {height} high, and in {file.name} {sizes[i, 0]:g} and {sizes[i, 1]:g}"
        same = abs(np.log(width / height * sizes[i, 1] / sizes[i, 0])) < _ASPECT
        require(bool(same), f"{told}: its boxes would be wrong. Give the images that the annotations are of.")
    owner = np.array([place[a["image_id"]] for a in annotations], np.int64)
    corners = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    pixels = np.array([a.get("area", np.nan) for a in annotations], np.float64)
    pixels = np.where(np.isfinite(pixels), pixels, corners[:, 2] * corners[:, 3])
    corners[:, 2:] += corners[:, :2]
    to_class = {number: c for c, number in enumerate(ids)}
    classes = np.array([to_class.get(a["category_id"], -1) for a in annotations], np.int64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool)
    relative = corners / np.tile(sizes[owner], 2)
    part, counts = tidy(owner, relative, classes, crowd, pixels, len(images), len(ids))
    return {"image": objects(paths), **part, "id": np.array(list(place), np.int64)}, counts


def _paths(folder: Path, file: Path, names: Sequence[str]) -> list[Path]:
    """The files of images: in the first of the usual folders that has the first one."""
    kind = file.stem.removeprefix("instances_")
    roots = [folder / kind, folder / "images" / kind, folder / "images", folder, file.parent]
    roots += sorted(path for path in folder.glob(f"{kind[:3]}*") if path.is_dir())
    root = next((root for root in roots if (root / names[0]).is_file()), None)
    told = ", ".join(str(root) for root in roots[:4])
    require(root is not None, f"{names[0]}, the first image of {file}, is in none of {told}.")
    assert root is not None
    last = root / names[-1]
    require(last.is_file(), f"{last}, the last image of {file}, is not there.")
    return [root / name for name in names]


def _tfds_part(records: Records, c: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    owner: list[int] = []
    bbox: list[Any] = []
    label: list[Any] = []
    crowd: list[Any] = []
    area: list[Any] = []
    ids: list[int] = []
    flat: list[float] = []  # the sides of an image, twice, for each of its boxes that has no area
    for i, record in enumerate(records):
        told = record["objects"]
        size = len(told["label"])
        owner += [i] * size
        bbox += list(told["bbox"])
        label += list(told["label"])
        crowd += list(told.get("is_crowd", [False] * size))
        ids.append(int(record.get("image/id", i)))
        area += list(told["area"]) if "area" in told else [np.nan] * size
        if "area" not in told:
            height, width = size_of(record["image"], f"{records.name}, image {i}")
            flat += [float(height * width)] * size
    corners = np.array(bbox, np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
    pixels = np.array(area, np.float64)
    if flat:
        pixels = np.prod(corners[:, 2:] - corners[:, :2], axis=1) * np.array(flat)
    images = [Stored(records, i, "image") for i in range(len(records))]
    for i in ends(images):
        size_of(images[i])
    part, counts = tidy(
        np.array(owner, np.int64), corners, np.array(label, np.int64), np.array(crowd, bool), pixels, len(records), c
    )
    return {"image": objects(images), **part, "id": np.array(ids, np.int64)}, counts
