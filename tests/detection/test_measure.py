"""The average precision agrees with pycocotools on the same detections, and with cases worked out by hand."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco.config import ConfigError
from moco.config.base import optional_module
from moco.detection import images as images_module
from moco.detection.coco import read_coco
from moco.detection.images import BoxedImages
from moco.detection.measure import average_precision, metrics_library
from moco.detection.training import Detections
from scripts.canvases import write_canvases


def noisy(images: BoxedImages, seed: int) -> list[Detections]:
    """Return detections like those of a half-trained network: shifted boxes, wrong classes, missed and false ones."""
    rng, found = np.random.default_rng(seed), []
    for image in images.images:
        boxes, labels, masks = [], [], []
        for box, label, mask in zip(image.boxes, image.labels, image.masks().numpy(), strict=True):
            for _ in range(rng.integers(0, 3)):
                boxes.append(box + rng.normal(0, 3, 4).clip(-6, 6))
                labels.append(label if rng.random() < 0.8 else rng.integers(1, 11))
                masks.append(np.roll(mask, rng.integers(-4, 5, 2), (0, 1)))
        scores = np.sort(rng.random(len(boxes)))[::-1].astype(np.float32)
        corners = np.array(boxes, np.float32).reshape(-1, 4)
        encoded = tuple(coco.encode(np.asfortranarray(each)) for each in masks)
        found.append(Detections(corners, scores, np.array(labels, np.int64), encoded))
    return found


def of_pycocotools(truth: Path, images: BoxedImages, found: list[Detections], kind: str) -> np.ndarray:
    """Return AP, AP50 and AP75 in percent from the json file, without this project's reader."""
    results = []
    for number, each in enumerate(found):
        for i, (left, top, right, bottom) in enumerate(each.boxes.astype(float)):
            mask = each.masks[i] | {"counts": each.masks[i]["counts"].decode()}
            about = {"image_id": number, "category_id": int(each.labels[i]), "score": float(each.scores[i])}
            shape = {"bbox": [left, top, right - left, bottom - top]} if kind == "bbox" else {"segmentation": mask}
            results.append(about | shape)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        evaluation = COCOeval(known, known.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures: np.ndarray = 100 * evaluation.stats[:3]
    return figures


def test_the_figures_are_those_of_pycocotools(tmp_path: Path) -> None:
    write_canvases(tmp_path, 30, 1)
    path = tmp_path / "train/boxes.json"
    content = json.loads(path.read_text())
    for each in content["annotations"][::7]:
        each["iscrowd"] = 1
    path.write_text(json.dumps(content))
    images = read_coco(path, tmp_path / "train/images", masks=True, drop=False)
    found = noisy(images, 0)
    result = average_precision(found, images, masks=True)
    names = ("AP", "AP50", "AP75")
    boxes, masks = ([result.figures[prefix + name] for name in names] for prefix in ("", "mask_"))
    assert boxes == pytest.approx(of_pycocotools(path, images, found, "bbox"), abs=1e-4)
    assert masks == pytest.approx(of_pycocotools(path, images, found, "segm"), abs=1e-4)
    assert 1 < boxes[0] < 99
    assert boxes == pytest.approx([average_precision(found, images, masks=False).figures[name] for name in names])


def test_perfect_detections_have_100_percent_and_none_0(tmp_path: Path) -> None:
    write_canvases(tmp_path, 12, 1)
    images = read_coco(tmp_path / "train/boxes.json", tmp_path / "train/images", masks=False, drop=False)
    perfect = [Detections(each.boxes, np.ones(len(each.boxes), np.float32), each.labels) for each in images.images]
    result = average_precision(perfect, images, masks=False)
    assert result.figures == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    occurring = images.count() > 0
    assert [each is not None for each in result.per_class] == occurring.tolist()
    assert result.count == 12
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert average_precision([nothing] * 12, images, masks=False).figures == {"AP": 0, "AP50": 0, "AP75": 0}


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, purpose: str, extra: str) -> object:
        return optional_module("no_such_module", purpose, extra)

    monkeypatch.setattr(images_module, "optional_module", missing)
    message = r"moco\.detect needs torchmetrics, pycocotools: pip install torchmetrics pycocotools \(extra 'detect'\)"
    with pytest.raises(ConfigError, match=message):
        metrics_library()
