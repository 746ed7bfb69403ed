"""Galleries of images as one self-contained HTML file; contact_sheet.py writes a PNG file instead.

Legend: M images, D dimension.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.data.base import Source, classes_of
from moco.data.pixel_format import preview
from moco.reporting.markup import resource, write_page

TILE = 168  # pixels, side of a displayed image


@dataclass(frozen=True)
class Tile:
    """One image of a gallery."""

    image: Tensor | None  # uint8 (3, H, W); None if it cannot be read
    headline: str  # such as its similarity
    caption: str  # its path and class
    detail: str = ""  # such as its size
    marked: bool = False  # the query, or the image to keep

    @property
    def small(self) -> bool:
        """Whether the page enlarges the image, with visible pixels."""
        return self.image is not None and max(self.image.shape[1:]) <= TILE // 2


@dataclass(frozen=True)
class Section:
    """A query with its neighbors, a group of near-duplicates, or a list of outliers."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of a source with their features."""

    source: Source
    rows: NDArray[np.int64]  # (M,), position of each image in the source
    features: NDArray[Any]  # (M, D)

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, i: int) -> Tensor:
        """Return the image as it is stored, (C, H, W)."""
        return self.source.image(int(self.rows[i]))

    def image(self, i: int) -> Tensor:
        """Return the image as it is shown, uint8 (3, H, W)."""
        return preview(self.pixels(i), self.source.pixel_format.preview)

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def classes(self, i: int) -> list[str] | None:
        """Return the names of the image's classes: one, or any number if images can have several; None if unlabeled."""
        found = classes_of(self.source, int(self.rows[i]))
        return None if found is None else [self.source.classes[each] for each in found]

    def label(self, i: int) -> str | None:
        """Return the names of the image's classes as one text; None if unlabeled."""
        classes = self.classes(i)
        return None if classes is None else ", ".join(classes) or "no label"

    def caption(self, i: int) -> str:
        label = self.label(i)
        return self.name(i) + (f" · {label}" if label is not None else "")

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.features).all())


def write_html(path: Path, title: str, about: str, sections: Iterable[Section]) -> None:
    """Write a page that contains all images. One section is in memory at a time."""
    write_page(path, "gallery.html", resource("gallery.css"), title=title, about=about, sections=sections)
