"""Average precision (AP) of detections, by torchmetrics with pycocotools.

Legend: M images.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moco.config.base import optional_module
from moco.detection.images import BoxedImage, BoxedImages, coco_masks
from moco.detection.training import Detections, predict
from moco.detection.views import ViewSettings
from moco.distributed import all_gather_object, on_rank_zero, rank, world_size

# pycocotools' values. torchmetrics' defaults are rounded to float32, so a recall of exactly 0.1 would not count at 0.1.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALL_THRESHOLDS = np.linspace(0, 1, 101).tolist()
# COCO's names, and torchmetrics' names. AP is the mean over IoU 0.5 ... 0.95, AP50 is at IoU 0.5, AP75 at IoU 0.75.
METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


@dataclass(frozen=True)
class AveragePrecision:
    """The AP of one detector on one split, in percent: the mean over the classes with true boxes, as COCO does."""

    figures: dict[str, float]  # AP, AP50, AP75; for masks also mask_AP, mask_AP50, mask_AP75
    per_class: list[float | None]  # AP of the boxes; None for a class without true boxes
    count: int  # M

    def to_json(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return self.figures | {"per_class": self.per_class, "count": self.count}


def evaluate(
    network: nn.Module,
    images: BoxedImages,
    settings: ViewSettings,
    workers: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AveragePrecision:
    """Return the AP on a split. Each rank predicts for a part of the images, and all ranks return the same result.

    Raises:
        ConfigError: if torchmetrics or pycocotools is not installed.
        ImageError: if an image cannot be used; on every rank.
    """
    rows = range(rank(), len(images), world_size())

    def part() -> list[Detections]:
        found = list[Detections]()
        for each in predict(network, images, rows, settings, workers):
            found.append(each)
            progress(len(found), len(rows))
        return found

    parts = all_gather_object(part)
    found = [parts[row % len(parts)][row // len(parts)] for row in range(len(images))]
    return on_rank_zero(lambda: average_precision(found, images, settings.masks))


def average_precision(found: Sequence[Detections], images: BoxedImages, masks: bool) -> AveragePrecision:
    """Compute the AP on a split; `found` holds the detections in each of its images, in the order of `images`."""
    library = metrics_library()
    kinds = ("bbox", "segm") if masks else ("bbox",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics', about more than 100 detections per image
        metric = library.MeanAveragePrecision(
            "xyxy",
            kinds,
            iou_thresholds=IOU_THRESHOLDS,
            rec_thresholds=RECALL_THRESHOLDS,
            class_metrics=True,
            sync_on_compute=False,
        )
        for detections, image in zip(found, images.images, strict=True):
            metric.update([_predicted(detections, image, masks)], [_true(image, masks)])
        result = metric.compute()
    figures = {}
    for kind in kinds:
        prefix = f"{kind}_" if masks else ""
        for name, key in METRICS.items():
            figures[f"{'mask_' * (kind == 'segm')}{name}"] = 100 * float(result[prefix + key])
    values = result["bbox_map_per_class" if masks else "map_per_class"].reshape(-1).tolist()
    known = dict(zip(result["classes"].reshape(-1).tolist(), values, strict=True))
    per_class = [known.get(number, -1.0) for number in range(1, 1 + len(images.classes))]
    return AveragePrecision(figures, [None if each < 0 else 100 * each for each in per_class], len(images))


def metrics_library() -> Any:
    """Return torchmetrics' detection metrics; raise ConfigError if they or pycocotools are not installed."""
    coco_masks()  # raises without pycocotools
    return optional_module("torchmetrics.detection", "moco.detect", "detect")


def _predicted(detections: Detections, image: BoxedImage, masks: bool) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(getattr(detections, name)) for name in ("boxes", "scores", "labels")}
    if masks:
        decoded = [coco_masks().decode(each) for each in detections.masks]
        found["masks"] = image.stacked(decoded).bool()
    return found


def _true(image: BoxedImage, masks: bool) -> dict[str, torch.Tensor]:
    names = {"boxes": image.boxes, "labels": image.labels, "iscrowd": image.ignored.astype(np.int64)}
    objects = {name: torch.from_numpy(each) for name, each in names.items()}
    return objects | ({"masks": image.masks().bool()} if masks else {})
