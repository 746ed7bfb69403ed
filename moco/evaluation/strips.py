"""A PNG with a row for each image. The tiles of a row show, for example, ground truth and prediction for that image."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moco.files import atomic_write

HEIGHT = 160  # of a row in pixels
_GAP = 4  # pixels between tiles and between rows


def voc_colors() -> NDArray[np.uint8]:
    """Return the colors of the classes in Pascal VOC's masks, (256, 3).

    Each of R, G and B contains a part of the bits of the class number.
    """
    numbers = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def tile(pixels: NDArray[np.uint8], resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """Return pixels (H, W, 3) as an image of the height of a row."""
    width = max(1, round(HEIGHT * pixels.shape[1] / pixels.shape[0]))
    return Image.fromarray(pixels).resize((width, HEIGHT), resample)


def write_strips(path: Path, strips: Iterable[Sequence[Image.Image]]) -> None:
    """Write a PNG with a row for each strip: its tiles from the left to the right."""
    rows = list(strips)
    size = (max(sum(each.width + _GAP for each in row) for row in rows), (HEIGHT + _GAP) * len(rows))
    page = Image.new("RGB", size, "white")
    for number, row in enumerate(rows):
        left = 0
        for each in row:
            page.paste(each, (left, number * (HEIGHT + _GAP)))
            left += each.width + _GAP
    with atomic_write(path) as temporary:
        page.save(temporary, format="PNG")
