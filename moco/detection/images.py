"""Images with the boxes, classes and masks of the objects in them.

Legend: n objects of an image, H x W its size after the rotation that EXIF states, L classes.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco.config.base import optional_module
from moco.data.decode import ImageError, decode_bytes, pil_reason, read_bytes
from moco.data.headers import orientation_of
from moco.data.walk import IMAGE_FORMATS
from moco.data.workers import in_order
from moco.runtime.console import progress_bar

WORKERS = "boxes.workers"  # the field for the number of loader processes, named in errors


@dataclass(frozen=True, eq=False)
class BoxedImage:
    """An image file and its objects.

    Attributes:
        path: The file.
        width: W, as the annotations state it.
        height: H.
        boxes: Left, top, right and bottom in pixels, (n, 4).
        labels: The class of each box, from 1; (n,). 0 is the background.
        ignored: Whether a detection of the object counts neither as right nor as wrong, (n,): COCO's crowds, VOC's
            difficult objects.
        segmentations: Each object's `segmentation` in COCO's format; empty if masks are not needed.
        dropped: Number of boxes that `boxes.bad_boxes=drop` left out.
    """

    path: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    segmentations: tuple[Any, ...] = ()
    dropped: int = 0

    def without_ignored(self) -> "BoxedImage":
        kept = np.flatnonzero(~self.ignored)
        segmentations = tuple(self.segmentations[i] for i in kept) if self.segmentations else ()
        arrays = {name: getattr(self, name)[kept] for name in ("boxes", "labels", "ignored")}
        return replace(self, **arrays, segmentations=segmentations)

    def pixels(self) -> Tensor:
        """Return the pixels, uint8 (3, H, W); raise ImageError if the file cannot be read or has another size."""
        image = decode_bytes(self.path, read_bytes(self.path))
        self._check_size(image.shape[2], image.shape[1])
        return image

    def check(self) -> None:
        """Read the header of the file; raise ImageError if it cannot be read or states another size."""
        data = read_bytes(self.path)
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                size = image.size[::-1] if orientation_of(image, data) in (5, 6, 7, 8) else image.size
        except Exception as error:  # PIL raises many types
            raise ImageError(f"cannot read the image {self.path}: {pil_reason(error, data)}") from error
        self._check_size(*size)

    def _check_size(self, width: int, height: int) -> None:
        if (width, height) != (self.width, self.height):
            stated, found = f"{self.width} x {self.height}", f"{width} x {height}"
            raise ImageError(f"{self.path} has {found} pixels, and its annotations state {stated}: correct one of them")

    def masks(self) -> Tensor:
        """Return the mask of each object, uint8 (n, H, W)."""
        return self.stacked([decode_mask(each, self.height, self.width) for each in self.segmentations])

    def stacked(self, masks: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return masks (H, W) as one tensor, uint8 (masks, H, W)."""
        return torch.from_numpy(np.array(masks, np.uint8).reshape(-1, self.height, self.width))


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """The images of one split, and the names of the classes 1, 2, ..."""

    images: tuple[BoxedImage, ...]
    classes: tuple[str, ...]
    dropped: int = 0  # boxes left out, including those of images that `with_boxes` removed

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Sequence[int]) -> "BoxedImages":
        return split_of([self.images[row] for row in rows], self.classes)

    def with_boxes(self) -> "BoxedImages":
        """Return the images to train on: remove ignored objects, and then the images without a box."""
        images = (each.without_ignored() for each in self.images)
        return replace(self, images=tuple(each for each in images if len(each.boxes)))

    def count(self) -> NDArray[np.int64]:
        """Return the number of objects of each class that are not ignored, (L,)."""
        labels = [each.labels[~each.ignored] for each in self.images]
        return np.bincount(np.concatenate([*labels, []]).astype(np.int64), minlength=len(self.classes) + 1)[1:]


def split_of(images: Sequence[BoxedImage], classes: Sequence[str]) -> BoxedImages:
    """Return images as one split; `dropped` is the sum over these images."""
    return BoxedImages(tuple(images), tuple(classes), sum(each.dropped for each in images))


def coco_masks() -> Any:
    """Return pycocotools' functions for masks; raise ConfigError if pycocotools is not installed."""
    return optional_module("pycocotools.mask", "moco.detect", "detect")


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask (H, W) of a `segmentation` in COCO's format: polygons, or run lengths."""
    library = coco_masks()
    if isinstance(segmentation, list):
        segmentation = library.merge(library.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = library.frPyObjects(segmentation, height, width)
    mask: NDArray[np.uint8] = library.decode(segmentation)
    return mask


def check_images(images: BoxedImages, workers: int | None, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Read the headers of all images, to find unreadable files and wrong sizes before the training.

    Raises:
        ImageError: for the first image that cannot be used.
    """
    checked = closing(in_order(_Checked(images), range(len(images)), workers, WORKERS))
    with progress_bar("reading images", heartbeat) as progress, checked as errors:
        for done, error in enumerate(errors, start=1):
            if error is not None:
                raise error
            progress(done, len(images))


@dataclass(frozen=True)
class _Checked:
    """Checks an image in a loader process, and returns the error; None for an image without errors."""

    images: BoxedImages

    def __call__(self, row: int) -> ImageError | None:
        try:
            self.images.images[row].check()
        except ImageError as error:
            return error
        return None
