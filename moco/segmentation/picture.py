"""One PNG that shows images with their true and predicted masks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moco.data.decode import decode
from moco.files import atomic_write
from moco.segmentation.masks import IGNORED

HEIGHT = 160  # of a row in pixels
_GAP = 4


def voc_colors() -> NDArray[np.uint8]:
    """Return the colors of the classes in Pascal VOC's masks, (256, 3): the bits of the number, spread over RGB."""
    numbers = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def write_picture(path: Path, rows: Iterable[tuple[str, Sequence[NDArray[np.int64]]]]) -> None:
    """Write a PNG with a row for each image: the image, and its masks (H, W) in the colors of Pascal VOC.

    Pixels without a class are white.
    """
    colors = voc_colors()
    colors[IGNORED] = 255
    strips = []
    for name, masks in rows:
        pixels = decode(name).permute(1, 2, 0).numpy()  # (H, W, 3)
        tiles = [Image.fromarray(each) for each in (pixels, *(colors[mask] for mask in masks))]
        width = max(1, round(HEIGHT * pixels.shape[1] / pixels.shape[0]))
        strips.append([tile.resize((width, HEIGHT), Image.Resampling.NEAREST) for tile in tiles])
    size = (max(sum(tile.width + _GAP for tile in strip) for strip in strips), (HEIGHT + _GAP) * len(strips))
    page = Image.new("RGB", size, "white")
    for row, strip in enumerate(strips):
        left = 0
        for tile in strip:
            page.paste(tile, (left, row * (HEIGHT + _GAP)))
            left += tile.width + _GAP
    with atomic_write(path) as temporary:
        page.save(temporary, format="PNG")
