"""Boxes and masks from a json in COCO's format: the lists images, annotations and categories.

Every ConfigError is a sentence that begins with FIELD=PATH of the file, or with PATH if no field is given.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from moco.config import ConfigError, require
from moco.data.file_names import existing_path
from moco.data.labels import first_names
from moco.detection.box_check import BoxCheck
from moco.detection.images import BoxedImage, BoxedImages, split_of
from moco.untrusted import refuse_special_file


def read_coco(
    path: Path, root: Path, masks: bool, drop: bool, classes: Sequence[str] = (), field: str = ""
) -> BoxedImages:
    """Read a json in COCO's format.

    Args:
        path: the json.
        root: the folder below which the images are.
        masks: whether every object needs a mask.
        drop: leave out boxes that cannot be used (see `BoxCheck.clipped`), instead of refusing them.
        classes: the classes of the training split, in the order of their numbers; empty: those of this file.
        field: the field that names the file, for errors.

    Raises:
        ConfigError: for a file that cannot be read or is incomplete, an id that is used twice or unknown, a missing
            mask, or, without `drop`, a box that cannot be used.
        ImageError: for an image that has an unusable box, if the image is unreadable or its size differs from the json.
    """
    file = f"{field}={path}" if field else str(path)
    content = _load(path, file)
    images, annotations, categories = (_by_id(file, name, content) for name in ("images", "annotations", "categories"))
    names, numbers = _classes(file, categories, classes)
    objects: dict[int, list[tuple[Any, ...]]] = {each: [] for each in images}
    check, dropped = BoxCheck(), Counter[int]()
    known = f"and the categories are {first_names([str(each) for each in numbers])}"
    for number, entry in annotations.items():
        where = f"{file}: annotation {number}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if not _is_id(image) or image not in images:
            raise ConfigError(f"{where} has image_id {image!r}, which no image has: correct it, or add the image")
        if not _is_id(category) or category not in numbers:
            fix = "add it to the categories, or correct the annotation"
            raise ConfigError(f"{where} has category_id {category!r}, {known}: {fix}")
        box = _box(where, number, entry, images[image], check)
        dropped[image] += box is None
        if box is not None:
            crowd = entry.get("iscrowd") or 0
            require(crowd in (0, 1), f"{where} has iscrowd {crowd!r:.80}, neither 0 nor 1: correct it")
            mask = _segmentation(where, entry, images[image]) if masks else None
            objects[image].append((box, numbers[category], bool(crowd), mask))
    made = [_image(images[each], root, objects[each], masks, dropped[each]) for each in images]
    for each in made:
        if each.dropped:  # perhaps because the file states another size of the image than the image itself
            each.check()
    check.finish(file, drop, "; a box must be [left, top, width, height]")
    return split_of(made, names)


def _image(
    entry: Mapping[str, Any], root: Path, objects: Sequence[tuple[Any, ...]], masks: bool, dropped: int
) -> BoxedImage:
    boxes, labels, crowds, segmentations = zip(*objects, strict=True) if objects else ((), (), (), ())
    return BoxedImage(
        existing_path(str(root / entry["file_name"])),
        entry["width"],
        entry["height"],
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(crowds, dtype=bool),
        tuple(segmentations) if masks else (),
        dropped,
    )


def _load(path: Path, file: str) -> dict[str, Any]:
    require(path.exists(), f"{file} does not exist: give the path of a json in COCO's format")
    try:
        refuse_special_file(path)
        text = path.read_bytes()
        if not text.strip():
            raise ValueError("the file is empty")
        content = json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{file} is not a json in COCO's format (its values are nested too deeply)") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not a json in COCO's format ({error})") from error
    complaint = f"{file} is not a json in COCO's format: it needs the lists images, annotations and categories"
    require(isinstance(content, dict), complaint)
    for name in ("images", "annotations", "categories"):
        require(isinstance(content.get(name), list), f"{complaint}, and {name} is no list")
        require(bool(content[name]), f"{file}: the list {name} is empty: give a json with entries in it")
    assert isinstance(content, dict)
    return content


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int


def _by_id(file: str, name: str, content: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Check the fields that every entry of a list needs, and return the entries by their ids."""
    found: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(content[name]):
        where = f"{file}: entry {position} of {name}"
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_id(number):
            raise ConfigError(f"{where} has the id {number!r:.80}, not a whole number: correct it")
        require(number not in found, f"{file}: the id {number} occurs twice in {name}: renumber one of them")
        if name == "images":
            image, sizes = entry.get("file_name"), [entry.get("width"), entry.get("height")]
            require(isinstance(image, str) and bool(image) and "\0" not in image, f"{where} has no file_name: add it")
            valid = all(type(each) is int and each > 0 for each in sizes)
            stated = f"{sizes[0]!r:.20} and {sizes[1]!r:.20}"
            require(valid, f"{where} ({image}) needs width and height, whole numbers of pixels, not {stated}")
        found[number] = entry
    return found


def _classes(
    file: str, categories: Mapping[int, Mapping[str, Any]], classes: Sequence[str]
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Return the names of the classes, and the number of the class, from 1, of each category."""
    names = {}
    for number in sorted(categories):
        name = categories[number].get("name")
        valid = isinstance(name, str) and bool(name)
        require(valid, f"{file}: category {number} has the name {name!r:.80}: set the name to a text in quotes")
        names[number] = str(name)
    twice = [name for name in names.values() if list(names.values()).count(name) > 1]
    require(not twice, f"{file}: the name {first_names(twice[:1])} belongs to two categories: rename one of them")
    order = list(classes) or list(names.values())
    unknown = [name for name in names.values() if name not in order]
    listed = f"the categories {first_names(unknown)} are not those of the training images, {first_names(order)}"
    require(not unknown, f"{file}: {listed}: correct one of the files")
    return tuple(order), {number: 1 + order.index(name) for number, name in names.items()}


def _box(
    where: str, number: int, entry: Mapping[str, Any], image: Mapping[str, Any], check: BoxCheck
) -> tuple[float, ...] | None:
    """Return left, top, right and bottom, clipped to the image; None for a box that cannot be used."""
    box = entry.get("bbox")
    valid = isinstance(box, list) and len(box) == 4 and all(_is_number(each) for each in box)
    require(valid, f"{where} has the bbox {box!r:.80}, not four numbers: correct it to [left, top, width, height]")
    assert isinstance(box, list)
    left, top, width, height = box
    name = f"annotation {number}, a box {box} in {image['file_name']},"
    return check.clipped(name, (left, top, left + width, top + height), (image["width"], image["height"]))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _segmentation(where: str, entry: Mapping[str, Any], image: Mapping[str, Any]) -> Any:
    """Check that pycocotools can decode the mask of an annotation, and return the mask: polygons, or run lengths."""
    found = entry.get("segmentation")
    fix = "correct it, or choose a detector without masks, such as detector=faster_rcnn_fpn"
    require(bool(found), f"{where} has no mask (segmentation), which Mask R-CNN needs for every object: {fix}")
    error = f"{where} has a segmentation that is"
    if isinstance(found, list):
        polygons = all(
            isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 and all(map(_is_number, each))
            for each in found
        )
        require(polygons, f"{error} no list of polygons, each of three points or more: {fix}")
        # pycocotools needs memory for every pixel that an edge passes, also outside of the image.
        far = 3 * max(image["width"], image["height"])
        require(max(abs(each) for one in found for each in one) <= far, f"{error} far outside its image: {fix}")
        return found
    valid = isinstance(found, dict) and found.get("size") == [image["height"], image["width"]]
    require(valid, f"{error} neither polygons nor run lengths of the size of its image: {fix}")
    assert isinstance(found, dict)
    counts: Any = found.get("counts")
    try:
        runs: Any = list(_runs(counts)) if isinstance(counts, str) else counts
        valid = isinstance(runs, list) and all(type(each) is int and each >= 0 for each in runs)
        valid = valid and sum(runs) == image["height"] * image["width"]
    except IndexError:
        valid = False
    require(valid, f"{where} has run lengths that do not fill its image: {fix}")
    return {"size": found["size"], "counts": counts}


def _runs(text: str) -> Iterator[int]:
    """Yield the run lengths of COCO's compressed text: numbers in groups of 5 bits.

    From the fourth run on, the text holds the difference between a run and the second run before it. The run lengths
    are decoded here only to check that they fill the image: pycocotools leaves pixels after the last run undefined.
    """
    at, runs = 0, list[int]()
    while at < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[at]) - 48
            value |= (bits & 31) << shift
            more, at, shift = bool(bits & 32), at + 1, shift + 5
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        yield runs[-1]
