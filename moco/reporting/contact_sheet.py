"""Galleries of images as one PNG file, for slides or a terminal without a browser.

PIL draws the file, because matplotlib would resample the images.
"""

from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from moco.files import atomic_write
from moco.reporting.gallery import TILE, Section, Tile
from moco.reporting.markup import plain_utf8, thumbnail

_GAP, _LINE = 12, 18  # pixels: between tiles, and the height of a line of text
_TEXT, _SECONDARY_TEXT, _MARKED_BORDER, _BORDER, _BACKGROUND = "#1c1c1e", "#6b6b70", "#0a6cce", "#dcdce0", "#f2f2f4"


def write_png(path: Path, title: str, about: str, sections: Iterable[Section], columns: int = 8) -> None:
    """Write all tiles as one image, which is drawn in memory."""
    width = _GAP + columns * (TILE + _GAP)
    strips = [_text(width, title, 24, _TEXT), _text(width, about, 12, _SECONDARY_TEXT)]
    for section in sections:
        strips.append(_text(width, section.title, 13, _TEXT))
        for start in range(0, len(section.tiles), columns):
            strip = Image.new("RGB", (width, TILE + 3 * _LINE), "white")
            for i, tile in enumerate(section.tiles[start : start + columns]):
                _draw_tile(strip, _GAP + i * (TILE + _GAP), tile)
            strips.append(strip)
    *tops, height = accumulate((strip.height for strip in strips), initial=0)
    sheet = Image.new("RGB", (width, height + _GAP), "white")
    for strip, top in zip(strips, tops, strict=True):
        sheet.paste(strip, (0, top))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _text(width: int, text: str, size: int, color: str) -> Image.Image:
    strip, font = Image.new("RGB", (width, size + 16), "white"), ImageFont.load_default(size)
    ImageDraw.Draw(strip).text((_GAP, 8), _fit(text, font, width - 2 * _GAP), color, font)
    return strip


def _draw_tile(strip: Image.Image, left: int, tile: Tile) -> None:
    draw = ImageDraw.Draw(strip)
    border, line_width = (_MARKED_BORDER, 2) if tile.marked else (_BORDER, 1)
    draw.rectangle((left - 2, 0, left + TILE + 1, TILE + 3), _BACKGROUND, border, line_width)
    if tile.image is not None:
        small = thumbnail(tile.image, TILE)  # smaller images are enlarged with visible pixels
        strip.paste(ImageOps.pad(small, (TILE, TILE), Image.Resampling.NEAREST, _BACKGROUND), (left, 2))
    headline = f"{tile.headline} · {tile.detail}" if tile.detail else tile.headline
    name = Path(tile.caption).name
    rows = [(headline, ImageFont.load_default(13), _TEXT), (name, ImageFont.load_default(12), _SECONDARY_TEXT)]
    for i, (text, font, color) in enumerate(rows):
        draw.text((left, TILE + 5 + i * _LINE), _fit(text, font, TILE), color, font)


def _fit(text: str, font: Any, width: int) -> str:
    """Drop characters from the start until a text fits: the end of a path distinguishes files."""
    shown = plain_utf8(text).replace("×", "x")  # missing from PIL's font
    shortened = (f"…{shown[i:]}" for i in range(len(shown) + 1))
    return next(each for each in chain([shown], shortened) if font.getlength(each) <= width)
