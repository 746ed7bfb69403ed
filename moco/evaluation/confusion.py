"""An image of a confusion matrix."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moco.files import atomic_write

_MOST_NUMBERS = 30  # classes; more numbers would not fit into their cells


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> bool:
    """Write counts (L, L) as a PNG: rows are true classes, columns predictions, dark cells large shares of their row.

    Returns False, without a file, if matplotlib is not installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    count = len(classes)
    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))  # (L, L)
    side = max(5.0, 0.45 * count if count <= _MOST_NUMBERS else 0.16 * count)  # inches
    font = 8 if count <= _MOST_NUMBERS else 6
    figure = figures.Figure(figsize=(side + 1, side + 1), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the root makes a confusion of 1 % visible
    scale = figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    percents = np.array([0, 1, 5, 25, 50, 100])
    scale.set_ticks(np.sqrt(percents / 100).tolist(), labels=[f"{each} %" for each in percents])
    axes.set(title=title, xlabel="prediction", ylabel="true class")
    axes.set_xticks(range(count), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(count), classes, fontsize=font)
    if count <= _MOST_NUMBERS:
        for row, column in zip(*confusion.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.4 else "black"
            number = str(confusion[row, column])
            axes.text(column, row, number, ha="center", va="center", fontsize=font - 1, color=color)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
