"""A picture of a confusion matrix."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_SIDE = 480  # pixels of the matrix, about
_MARGIN = 12
_BLUE = np.array([31, 78, 140])


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> None:
    """Writes a PNG: a row a true class, a column a predicted one, the darker the larger its part of the row.

    Args:
        confusion: counts (L, L), L at least 1.
        classes: L names, for the legend below.
        title: one line above.
        path: the file.
    """
    cell = max(4, _SIDE // len(confusion))
    part = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))  # (L, L)
    shade = np.sqrt(part)  # a confusion of one in a hundred shows too
    color = 255 - shade[..., None].repeat(cell, 0).repeat(cell, 1) * (255 - _BLUE)  # (L cell, L cell, 3)
    matrix = Image.fromarray(color.round().astype(np.uint8))
    side = matrix.width
    legend = textwrap.wrap(f"rows: truth; columns: prediction; from the top left: {', '.join(classes)}", side // 6)
    canvas = Image.new("RGB", (side + 2 * _MARGIN, side + 40 + 14 * len(legend) + _MARGIN), "white")
    canvas.paste(matrix, (_MARGIN, 28))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((_MARGIN - 1, 27, _MARGIN + side, 28 + side), outline="gray")
    pen.text((_MARGIN, 8), title, fill="black")
    pen.multiline_text((_MARGIN, side + 36), "\n".join(legend), fill="black")
    canvas.save(path)
