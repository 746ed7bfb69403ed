"""Small data sets with boxes, and small encoders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco.detection.coco import read_coco
from moco.detection.images import BoxedImages
from moco.interop.encoder_file import EncoderFile
from moco.models.backbones import build_backbone

SQUARE = [[4, 4, 12, 4, 12, 10, 4, 10]]  # a polygon


def write_json(folder: Path, both: bool = False, **changes: Any) -> Path:
    """Write two images of 24 x 16 pixels with three objects, and a json; `changes` replace its lists.

    The only object of the second image is a crowd, unless `both`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / name)
    content = {
        "images": [{"id": each, "file_name": f"{'ab'[each]}.png", "width": 24, "height": 16} for each in range(2)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 3, "bbox": [4, 4, 8, 6], "segmentation": SQUARE},
            {"id": 2, "image_id": 0, "category_id": 7, "bbox": [0, 0, 24.4, 16], "segmentation": SQUARE},
            {
                "id": 3,
                "image_id": 1,
                "category_id": 7,
                "bbox": [1, 2, 3, 4],
                "segmentation": SQUARE,
                "iscrowd": int(not both),
            },
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    } | changes
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def write_voc(root: Path, year: str, split: str, objects: str, name: str = "000001") -> None:
    """Add an image to a split, with the given XML of its objects."""
    base = root / f"VOC{year}"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(base / f"JPEGImages/{name}.jpg")
    size = "<size><width>30</width><height>20</height></size>"
    (base / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    listed = base / f"ImageSets/Main/{split}.txt"
    names = listed.read_text().split() if listed.exists() else []
    listed.write_text("".join(f"{each}\n" for each in dict.fromkeys([*names, name])))


def voc_object(name: str, box: tuple[int | str, ...], difficult: int = 0) -> str:
    sides = "".join(
        f"<{side}>{each}</{side}>" for side, each in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def canvases(folder: Path, masks: bool = False) -> BoxedImages:
    """Return the canvases that scripts/canvases.py wrote to a folder of a split."""
    return read_coco(folder / "boxes.json", folder / "images", masks, drop=False).with_boxes()


def encoder_file(name: str, **options: Any) -> EncoderFile:
    torch.manual_seed(0)
    return EncoderFile("x.pt", "plain", name, options, dict(build_backbone(name, options).state_dict()))
