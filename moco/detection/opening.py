"""Open the training and the held-out images that a configuration names."""

from pathlib import Path

from moco.config import require
from moco.config.detect import BoxesConfig
from moco.data.labels import first_names
from moco.detection.coco import read_coco
from moco.detection.images import BoxedImage, BoxedImages, split_of
from moco.detection.voc import VOC_CLASSES, read_voc
from moco.evaluation.subsets import split_copies


def open_boxed(config: BoxesConfig, masks: bool) -> tuple[BoxedImages, BoxedImages]:
    """Return the images to train on, each with at least one box, and the held-out images. No image is decoded.

    Raises:
        ConfigError: if files are missing or invalid (see `read_coco` and `read_voc`), or a split has no boxes.
        ImageError: see `read_coco` and `split_copies`.
    """
    root, drop = Path(config.root), config.bad_boxes == "drop"
    require(root.is_dir(), f"boxes.root={root} is not a folder: set it to the folder of the data set")
    if config.layout == "voc":
        classes = config.classes or VOC_CLASSES
        train = read_voc(root, config.split or ["2007/trainval", "2012/trainval"], classes, drop, training=True)
        held_out = read_voc(root, config.eval_split or ["2007/test"], classes, drop, training=False)
    elif config.layout == "coco":
        train = _coco_splits(root, config.split or ["train2017"], masks, drop, ())
        held_out = _coco_splits(root, config.eval_split or ["val2017"], masks, drop, train.classes)
    else:
        train, held_out = _of_files(config, root, masks, drop)
    train = train.with_boxes()
    for split, found in (("training", train), ("held-out", held_out)):
        error = f"no {split} image has a box, apart from ignored objects: add boxes, or choose other images"
        require(bool(found.count().sum()), error)
    _check_files("boxes.root", train)
    _check_files("boxes.eval_root" if config.eval_file else "boxes.root", held_out)
    return train, held_out


def _of_files(config: BoxesConfig, root: Path, masks: bool, drop: bool) -> tuple[BoxedImages, BoxedImages]:
    train = read_coco(Path(config.file), root, masks, drop, field="boxes.file")
    if config.eval_file:
        eval_root = Path(config.eval_root or config.root)
        fix = "set it to the folder of the held-out images"
        require(eval_root.is_dir(), f"boxes.eval_root={eval_root} is not a folder: {fix}")
        return train, read_coco(Path(config.eval_file), eval_root, masks, drop, train.classes, "boxes.eval_file")
    _check_files("boxes.root", train)
    rest, held = split_copies([each.path for each in train.images], config.hold_out)
    error = f"boxes.hold_out={config.hold_out} of {len(train)} images leaves a split empty"
    require(bool(rest and held), f"{error}: change it, or name held-out images with boxes.eval_file")
    return train.subset(rest), train.subset(held)


def _check_files(field: str, images: BoxedImages) -> None:
    missing = [each.path for each in images.images if not Path(each.path).is_file()]
    problem = f"{len(missing)} of {len(images)} images do not exist, such as {first_names(missing[:1])}"
    require(not missing, f"{problem}: add them, or set {field} to their folder")


def _coco_splits(root: Path, splits: list[str], masks: bool, drop: bool, classes: tuple[str, ...]) -> BoxedImages:
    images: tuple[BoxedImage, ...] = ()
    for split in splits:
        file = root / "annotations" / f"instances_{split}.json"
        found = read_coco(file, root / split, masks, drop, classes)
        images, classes = images + found.images, found.classes
    return split_of(images, classes)
