"""Galleries of images as one HTML file that needs no other file; contact_sheet.py writes them as PNG."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moco.reporting.markup import resource, write_page

TILE = 168  # pixels, side of a displayed image


@dataclass(frozen=True)
class Tile:
    """One image of a gallery."""

    image: Tensor | None  # uint8 (3, H, W); None: it can no longer be read
    headline: str  # such as its similarity
    caption: str  # its path and class
    detail: str = ""  # such as its size
    marked: bool = False  # the query, or the image to keep

    @property
    def small(self) -> bool:
        """Whether it is enlarged with visible pixels."""
        return self.image is not None and max(self.image.shape[1:]) <= TILE // 2


@dataclass(frozen=True)
class Section:
    """A query with its neighbors, a group of near-duplicates, or a list of outliers."""

    title: str
    tiles: Sequence[Tile]


def write_html(path: Path, title: str, about: str, sections: Iterable[Section]) -> None:
    """Write a page that contains all images. One section is in memory at a time."""
    write_page(path, "gallery.html", resource("gallery.css"), title=title, about=about, sections=sections)
