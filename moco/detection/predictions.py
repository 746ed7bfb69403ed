"""predictions.png: images with their true boxes, and with those that a detector finds."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco.detection.images import BoxedImage, coco_masks
from moco.detection.training import Detections
from moco.evaluation.strips import tile, voc_colors, write_strips

DASH = 5  # pixels of a dash, and of the gap after it
SHOWN_SCORE = 0.5  # detections with a lower score are not drawn


def write_predictions(path: Path, rows: Iterable[tuple[BoxedImage, Detections]], classes: tuple[str, ...]) -> None:
    """Write a PNG. Each image has a row that shows it twice: with its true boxes, and with the detections and scores.

    Each class has a color of Pascal VOC. The boxes of ignored objects are dashed, and labeled as ignored. If the
    detections have masks, the masks are drawn too.
    """
    strips = []
    for image, found in rows:
        pixels = image.pixels().permute(1, 2, 0).numpy()  # (H, W, 3)
        names = [
            classes[label - 1] + " (ignored)" * bool(ignored)
            for label, ignored in zip(image.labels, image.ignored, strict=True)
        ]
        true = _drawn(pixels, image.boxes, image.labels, names, image.ignored)
        shown = found.scores >= SHOWN_SCORE
        boxes, labels, scores = (each[shown] for each in (found.boxes, found.labels, found.scores))
        texts = [f"{classes[label - 1]}: {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        masks = [coco_masks().decode(each) for each, kept in zip(found.masks, shown, strict=False) if kept]
        found_tile = _drawn(_masked(pixels, masks, labels), boxes, labels, texts, np.zeros(len(boxes), bool))
        strips.append([true, found_tile])
    write_strips(path, strips)


def _masked(pixels: np.ndarray, masks: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, 3), blended half and half with the color of the class where a mask (H, W) is set."""
    colors, out = voc_colors(), pixels.copy()
    for mask, label in zip(masks, labels, strict=False):
        out[mask > 0] = out[mask > 0] // 2 + colors[label % 256] // 2
    return out


def _drawn(
    pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, texts: list[str], dashed: np.ndarray
) -> Image.Image:
    image = tile(pixels, Image.Resampling.BILINEAR)
    draw, scale = ImageDraw.Draw(image), image.height / pixels.shape[0]
    for box, label, text, with_gaps in zip(boxes * scale, labels, texts, dashed, strict=True):
        color = tuple(int(each) for each in voc_colors()[label % 256])
        corners = [float(each) for each in box]
        if with_gaps:
            _draw_dashed(draw, corners, color)
        else:
            draw.rectangle(corners, outline="white", width=4)  # so that a dark box is visible on a dark image
            draw.rectangle(corners, outline=color, width=2)
        shown = text.encode("ascii", "replace").decode()  # the font may lack characters outside of ASCII
        draw.text((corners[0] + 4, corners[1] + 2), shown, fill=color, stroke_width=2, stroke_fill="white")
    return image


def _draw_dashed(draw: ImageDraw.ImageDraw, corners: Sequence[float], color: tuple[int, ...]) -> None:
    """Draw a box with dashed sides; each dash lies on a wider white dash."""
    left, top, right, bottom = corners
    for outline, width in (("white", 4), (color, 2)):
        for x in np.arange(left, right, 2 * DASH):
            for y in (top, bottom):
                draw.line([x, y, min(x + DASH, right), y], fill=outline, width=width)
        for y in np.arange(top, bottom, 2 * DASH):
            for x in (left, right):
                draw.line([x, y, x, min(y + DASH, bottom)], fill=outline, width=width)
