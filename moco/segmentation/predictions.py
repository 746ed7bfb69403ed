"""predictions.png: images with their true and predicted masks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moco.data.decode import decode
from moco.evaluation.strips import tile, voc_colors, write_strips
from moco.segmentation.masks import IGNORED


def write_predictions(path: Path, rows: Iterable[tuple[str, Sequence[NDArray[np.int64]]]]) -> None:
    """Write a PNG with a row for each image: the image, and its masks (H, W) in the colors of Pascal VOC.

    Pixels without a class are white.
    """
    colors = voc_colors()
    colors[IGNORED] = 255
    write_strips(
        path,
        (
            [tile(each) for each in (decode(name).permute(1, 2, 0).numpy(), *(colors[mask] for mask in masks))]
            for name, masks in rows
        ),
    )
