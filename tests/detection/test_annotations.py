"""Boxes and masks from COCO's and Pascal VOC's formats; what is refused, in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from moco.config import ConfigError, RunWarning
from moco.config.detect import BoxesConfig
from moco.data.decode import ImageError
from moco.detection.coco import read_coco
from moco.detection.images import check_images
from moco.detection.opening import open_boxed
from moco.detection.voc import VOC_CLASSES, read_voc
from scripts.canvases import write_canvases
from tests.detection.examples import SQUARE, canvases, voc_object, write_json, write_voc


def annotation(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 5, "image_id": 0, "category_id": 3, "bbox": [4, 4, 8, 6], "segmentation": SQUARE} | changes]


def test_boxes_have_corners_and_classes_are_numbered_by_their_ids(tmp_path: Path) -> None:
    found = read_coco(write_json(tmp_path), tmp_path, masks=True, drop=False)
    assert found.classes == ("cat", "dog")
    first, second = found.images
    assert first.boxes.tolist() == [[4, 4, 12, 10], [0, 0, 24, 16]]  # clipped: 0.4 pixels are a rounded box
    assert first.labels.tolist() == [1, 2]
    assert second.ignored.tolist() == [True]
    mask = first.masks()[0].numpy()
    assert mask.sum() == mask[4:10, 4:12].sum() == 48
    assert len(found.with_boxes()) == 1  # the other has a crowd only
    assert found.count().tolist() == [1, 1]


def test_images_are_found_in_either_form_of_unicode(tmp_path: Path) -> None:
    images = [
        {"id": each, "file_name": name, "width": 24, "height": 16} for each, name in enumerate(("\u00fc.png", "b.png"))
    ]
    file = write_json(tmp_path, images=images)
    (tmp_path / "a.png").rename(tmp_path / "u\u0308.png")
    found = read_coco(file, tmp_path, masks=False, drop=False)
    check_images(found, 0)
    assert Path(found.images[0].path).name == "u\u0308.png"
    write_voc(tmp_path, "2007", "train", voc_object("cat", (1, 1, 9, 9)), name="u\u0308")
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("\u00fc\n", encoding="utf-8")
    voc = read_voc(tmp_path, ["2007/train"], VOC_CLASSES, drop=False, training=True)
    assert Path(voc.images[0].path).is_file()


def test_masks_of_all_forms_are_decoded(tmp_path: Path) -> None:
    pixels = np.zeros((16, 24), np.uint8)
    pixels[3:9, 5:20] = 1
    pixels[0, 0] = pixels[15, 23] = 1
    text = coco.encode(np.asfortranarray(pixels))["counts"].decode()
    flat = np.concatenate([[0], pixels.T.ravel(), [2]])
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat))])).tolist()
    for counts in (text, runs):
        runs_of = {"size": [16, 24], "counts": counts}
        found = read_coco(write_json(tmp_path, annotations=annotation(segmentation=runs_of)), tmp_path, True, False)
        assert np.array_equal(found.images[0].masks()[0], pixels)


def test_canvases_have_the_masks_and_boxes_of_their_json(tmp_path: Path) -> None:
    write_canvases(tmp_path, 5, 1)
    for image in canvases(tmp_path / "train", masks=True).images:
        mask = np.asarray(Image.open(tmp_path / "train/masks" / Path(image.path).name))
        assert (image.masks().numpy().any(axis=0) == (mask > 0)).all()
        for box, label, one in zip(image.boxes.astype(int), image.labels, image.masks().numpy(), strict=True):
            assert set(mask[one > 0]) == {label}
            rows, columns = np.flatnonzero(one.any(axis=1)), np.flatnonzero(one.any(axis=0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "the list images is empty"),
        ({"annotations": []}, "the list annotations is empty"),
        ({"categories": None}, "and categories is no list"),
        ({"images": [{"id": 1}]}, r"entry 0 of images has no file_name: add it"),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 4}]},
            r"needs width and height, .* not 0 and 4",
        ),
        ({"images": [{"id": "1"}]}, "entry 0 of images has the id '1', not a whole number: correct it"),
        ({"categories": [{"id": 3, "name": "a"}] * 2}, "the id 3 occurs twice in categories"),
        ({"categories": [{"id": i, "name": "a"} for i in (3, 7)]}, "the name a belongs to two categories"),
        ({"categories": [{"id": 3, "name": 1}]}, "category 3 has the name 1: set the name to a text"),
        ({"annotations": annotation() * 2}, "the id 5 occurs twice in annotations: renumber one"),
        ({"annotations": annotation(image_id=9)}, "annotation 5 has image_id 9, which no image has"),
        (
            {"annotations": annotation(category_id=4)},
            "annotation 5 has category_id 4, and the categories are 3, 7",
        ),
        ({"annotations": annotation(bbox=[1, 2, 3])}, r"annotation 5 has the bbox \[1, 2, 3\], not four numbers"),
        ({"annotations": annotation(bbox=[1, 2, 3, float("nan")])}, "not four numbers"),
        (
            {"annotations": annotation(bbox=[4, 4, 0, 6])},
            r"1 of 1 boxes cannot be used \(1 without an area\), the first: annotation 5, a box \[4, 4, 0, 6\] in",
        ),
        ({"annotations": annotation(bbox=[4, 4, -3, 6])}, "has no area"),
        (
            {"annotations": annotation(bbox=[20, 4, 8, 6])},
            "reaches outside its image of 24 x 16 pixels: correct them",
        ),
        ({"annotations": annotation(iscrowd="1")}, "annotation 5 has iscrowd '1', neither 0 nor 1: correct it"),
        # pycocotools would need gigabytes for its edges.
        ({"annotations": annotation(segmentation=[[0, 0, 1e8, 0, 1e8, 1e8]])}, "that is far outside its image"),
        ({"annotations": annotation(segmentation=[])}, "annotation 5 has no mask .* which Mask R-CNN needs for every"),
        ({"annotations": annotation(segmentation=[[1, 2, 3]])}, "no list of polygons, each of three points or more"),
        (
            {"annotations": annotation(segmentation={"size": [9, 9], "counts": [81]})},
            "neither polygons nor run lengths",
        ),
        ({"annotations": annotation(segmentation={"size": [16, 24], "counts": [999]})}, "run lengths that do not fill"),
        ({"annotations": annotation(segmentation={"size": [16, 24], "counts": "zz"})}, "run lengths that do not fill"),
    ],
)
def test_a_wrong_json_is_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_json(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_coco(path, tmp_path, masks=True, drop=False)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not a json in COCO's format \(the file is empty\)"),
        ('{"images": [', r"is not a json in COCO's format \(Expecting value"),
        ("[1]", "it needs the lists images, annotations and categories"),
        ("[" * 10**5, "its values are nested too deeply"),
    ],
)
def test_a_damaged_json_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_coco(path, tmp_path, masks=False, drop=False)
    with pytest.raises(ConfigError, match=r"gone\.json does not exist: give the path of a json"):
        read_coco(tmp_path / "gone.json", tmp_path, masks=False, drop=False)


def test_bad_boxes_can_be_left_out(tmp_path: Path) -> None:
    boxes = [[4, 4, 0, 6], [20, 4, 8, 6], [1, 1, 5, 5]]
    found = [annotation(id=number, bbox=box)[0] for number, box in enumerate(boxes)]
    with pytest.warns(RunWarning, match=r"bad_boxes=drop leaves out 2 of 3 boxes: .*\[left, top, width, height\]"):
        images = read_coco(write_json(tmp_path, annotations=found), tmp_path, masks=True, drop=True)
    assert images.images[0].boxes.tolist() == [[1, 1, 6, 6]]
    assert len(images.images[0].segmentations) == 1
    assert [each.dropped for each in images.images] == [2, 0]
    assert images.dropped == images.subset([0]).dropped == images.subset([1]).with_boxes().dropped + 2 == 2
    message = r"3 boxes cannot be used \(1 without an area, 1 reaching outside their image\), the first: annotation 0, "
    with pytest.raises(ConfigError, match=rf"boxes\.json: 2 of {message}a box \[4, 4, 0, 6\] in a\.png, has no area: "):
        read_coco(write_json(tmp_path, annotations=found), tmp_path, masks=True, drop=False)
    with pytest.warns(RunWarning, match="leaves out 1 of 1 boxes: 1 reaching outside their image;"):
        images = read_coco(write_json(tmp_path, annotations=found[1:2]), tmp_path, masks=True, drop=True)
    assert images.with_boxes().dropped == 1  # of an image without any other box


def test_bad_boxes_of_voc_are_left_out_and_counted(tmp_path: Path) -> None:
    write_voc(tmp_path, "2007", "train", voc_object("cat", (1, 1, 9, 9)) + voc_object("dog", (5, 5, 4, 4)))
    with pytest.warns(RunWarning, match=r"bad_boxes=drop leaves out 1 of 2 boxes"):
        voc = read_voc(tmp_path, ["2007/train"], VOC_CLASSES, drop=True, training=True)
    assert voc.images[0].labels.tolist() == [8]
    assert voc.dropped == 1
    message = r"boxes\.root=.*: 1 of 2 boxes cannot be used \(1 without an area\), the first: .*\.xml: the box of a dog"
    with pytest.raises(ConfigError, match=message):
        read_voc(tmp_path, ["2007/train"], VOC_CLASSES, drop=False, training=True)


def test_held_out_categories_are_matched_by_name(tmp_path: Path) -> None:
    train = write_json(tmp_path)
    other = write_json(tmp_path / "other", categories=[{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}])
    names: dict[str, Any] = {
        "root": str(tmp_path),
        "file": str(train),
        "eval_root": str(tmp_path / "other"),
        "eval_file": str(other),
    }
    _, held_out = open_boxed(BoxesConfig(**names), masks=False)
    assert held_out.classes == ("cat", "dog")
    assert held_out.images[0].labels.tolist() == [2, 1]
    write_json(tmp_path / "other", categories=[{"id": 3, "name": "dog"}, {"id": 7, "name": "cow"}])
    with pytest.raises(ConfigError, match="the categories cow are not those of the training images, cat, dog: correct"):
        open_boxed(BoxesConfig(**names), masks=False)


def test_missing_images_and_empty_splits_are_one_sentence(tmp_path: Path) -> None:
    path = write_json(tmp_path)
    config = BoxesConfig(root=str(tmp_path), file=str(path), hold_out=0.5)
    with pytest.raises(ConfigError, match=r"no (training|held-out) image has a box"):  # one image has a crowd only
        open_boxed(config, masks=False)
    with pytest.raises(ConfigError, match=r"boxes\.hold_out=0\.1 of 2 images leaves a split empty"):
        open_boxed(replace(config, hold_out=0.1), masks=False)
    other = write_json(tmp_path / "other")
    (tmp_path / "other/b.png").unlink()
    held_out = replace(config, hold_out=0.0, eval_root=str(tmp_path / "other"), eval_file=str(other))
    with pytest.raises(ConfigError, match=r"other/b\.png: add them, or set boxes\.eval_root"):
        open_boxed(held_out, masks=False)
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        ConfigError, match=r"1 of 2 images do not exist, such as .*a\.png: add them, or set boxes\.root"
    ):
        open_boxed(config, masks=False)


def test_an_image_of_another_size_is_one_sentence(tmp_path: Path) -> None:
    images = read_coco(write_json(tmp_path), tmp_path, masks=False, drop=False)
    for workers in (0, 1):
        check_images(images, workers)
    Image.new("RGB", (10, 12)).save(tmp_path / "b.png")
    message = r"b\.png has 10 x 12 pixels, and its annotations state 24 x 16: correct one"
    for workers in (0, 1):
        with pytest.raises(ImageError, match=message):
            check_images(images, workers)
    with pytest.raises(ImageError, match=message):
        images.images[1].pixels()
    outside = write_json(tmp_path, annotations=annotation(image_id=1, bbox=[4, 4, 30, 6]))
    Image.new("RGB", (40, 16)).save(tmp_path / "b.png")  # the box is outside of the stated size only
    for drop in (False, True):
        with pytest.raises(ImageError, match=r"b\.png has 40 x 16 pixels, and its annotations state 24 x 16"):
            read_coco(outside, tmp_path, masks=False, drop=drop)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(
        ImageError, match=r"cannot read the image .*b\.png: no known image format, it begins with b'no image'"
    ):
        check_images(images, 0)


def test_voc_counts_pixels_from_one_and_ignores_difficult_objects_in_the_evaluation(tmp_path: Path) -> None:
    objects = voc_object("cat", (1, 1, 30, 20)) + voc_object("dog", (5, 6, 9, 10), difficult=1)
    for year, split in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        write_voc(tmp_path / "VOCdevkit", year, split, objects)
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        train, held_out = open_boxed(BoxesConfig(layout="voc", root=str(root)), masks=False)
        assert len(train) == 2
        assert [train.classes[label - 1] for label in train.images[0].labels] == ["cat", "dog"]
        assert train.images[1].boxes.tolist() == [[0, 0, 30, 20], [4, 5, 9, 10]]
        assert held_out.images[0].ignored.tolist() == [False, True]
    config = BoxesConfig(
        layout="voc", root=str(tmp_path / "VOCdevkit/VOC2007"), split=["trainval"], eval_split=["test"]
    )
    assert len(open_boxed(config, masks=False)[0]) == 1


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            voc_object("unicorn", (1, 1, 5, 5)),
            r"000001\.xml: an object has the class 'unicorn', and the classes",
        ),
        (voc_object("cat", (5, 5, 4, 9)), r"000001\.xml: the box of a cat has no area"),
        (voc_object("cat", (5, 5, 40, 9)), "reaches outside its image of 30 x 20 pixels"),
        (
            "<object><name>cat</name></object>",
            r"000001\.xml is not an annotation of Pascal VOC \(bndbox/xmin is '', not a",
        ),
        (voc_object("cat", ("nan", 1, 5, 9)), r"bndbox/xmin is 'nan', not a number\): correct it"),
        ("<object>", "is not an annotation of Pascal VOC"),
    ],
)
def test_a_wrong_annotation_of_voc_is_one_sentence(tmp_path: Path, objects: str, message: str) -> None:
    write_voc(tmp_path, "2007", "trainval", objects)
    config = BoxesConfig(layout="voc", root=str(tmp_path), split=["2007/trainval"], eval_split=["2007/test"])
    with pytest.raises(ConfigError, match=message):
        open_boxed(config, masks=False)


def test_the_size_of_an_image_and_the_list_of_a_split_of_voc_are_checked(tmp_path: Path) -> None:
    write_voc(tmp_path, "2007", "train", voc_object("cat", (1, 1, 9, 9)))
    annotation, listed = (
        tmp_path / "VOC2007" / each for each in ("Annotations/000001.xml", "ImageSets/Main/train.txt")
    )
    annotation.write_text(annotation.read_text().replace("<width>30", "<width>0"))
    with pytest.raises(ConfigError, match=r"size/width is '0', not a number of at least 1\): correct it"):
        read_voc(tmp_path, ["2007/train"], VOC_CLASSES, drop=True, training=True)
    for content, message in ((b"\xff\xfe0", "cannot be read as a list of names in UTF-8"), (b" \n", "lists no image")):
        listed.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"train\.txt {message}"):
            read_voc(tmp_path, ["2007/train"], VOC_CLASSES, drop=True, training=True)


def test_missing_parts_of_voc_are_one_sentence(tmp_path: Path) -> None:
    config = BoxesConfig(layout="voc", root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no folder .*VOC2007/JPEGImages: set boxes\.root"):
        open_boxed(config, masks=False)
    write_voc(tmp_path, "2007", "trainval", voc_object("cat", (1, 1, 5, 5)))
    with pytest.raises(ConfigError, match="'test' is not a split of this data set"):
        open_boxed(replace(config, split=["2007/trainval"]), masks=False)
    (tmp_path / "VOC2007/Annotations/000001.xml").unlink()
    with pytest.raises(ConfigError, match=r"000001\.xml does not exist, and the split lists 000001"):
        open_boxed(config, masks=False)
    assert len(VOC_CLASSES) == 20


def test_the_layout_of_coco_has_a_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        path = write_json(tmp_path / split)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path.rename(tmp_path / "annotations" / f"instances_{split}.json")
    train, held_out = open_boxed(BoxesConfig(layout="coco", root=str(tmp_path)), masks=True)
    assert (len(train), len(held_out)) == (1, 2)
    with pytest.raises(ConfigError, match=r"instances_x\.json does not exist"):
        open_boxed(BoxesConfig(layout="coco", root=str(tmp_path), split=["x"]), masks=True)
    content = json.loads((tmp_path / "annotations/instances_val2017.json").read_text())
    assert len(content["images"]) == 2
