"""Galleries of pictures: one HTML file that loads nothing from elsewhere, or one PNG."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moco.files import atomic_write
from moco.reporting import html
from moco.reporting.html import breaking, plain, text, thumbnail

THUMBNAIL = 320  # pixels of the longer side at most: twice what the page shows, for dense displays
_TILE = 168  # pixels of the shown picture


@dataclass(frozen=True)
class Tile:
    """One picture of a gallery."""

    image: Tensor | None  # uint8 (3, H, W); None: it can no longer be read
    headline: str  # its similarity, or why it stands there
    caption: str  # its path, its class
    detail: str = ""  # its size
    marked: bool = False  # the query, or the one to keep


@dataclass(frozen=True)
class Section:
    """A query with what it found, a group of duplicates, a list of outliers."""

    title: str
    tiles: Sequence[Tile]


def style() -> str:
    """The style sheet of galleries, on which other pages build."""
    return (html.DIRECTORY / "gallery.css").read_text()


def write_html(path: Path, title: str, about: str, sections: Iterable[Section]) -> None:
    """A page with every picture inside it. One section is in memory at a time.

    All text is escaped, and the page's own policy forbids scripts and anything from elsewhere: a file's name
    can hold markup.
    """

    def parts() -> Iterator[str]:
        yield html.opening(title, style())
        yield f'<h1>{text(title)}</h1>\n<p class="about">{text(about)}</p>\n'
        for section in sections:
            yield f"<section><h2>{text(section.title)}</h2>\n{grid(section.tiles)}</section>\n"
        yield html.closing()

    html.write(path, parts())


def grid(tiles: Iterable[Tile]) -> str:
    """Pictures side by side."""
    figures = "".join(map(_figure, tiles))
    return f'<div class="grid">\n{figures}</div>'


def _figure(tile: Tile) -> str:
    picture = "<img alt='cannot be read'>"
    if tile.image is not None:
        small = ' class="small"' if max(tile.image.shape[1:]) <= _TILE // 2 else ""
        source = html.jpeg(thumbnail(tile.image, THUMBNAIL))
        picture = f'<img{small} loading="lazy" alt="{text(tile.caption)}" src="{source}">'
    detail = f"<i>{text(tile.detail)}</i>" if tile.detail else ""
    return (
        f'<figure{" class=mark" if tile.marked else ""} title="{text(tile.caption)}">{picture}'
        f"<figcaption><b>{text(tile.headline)}</b>{detail}{breaking(tile.caption)}</figcaption></figure>\n"
    )


def write_png(path: Path, title: str, about: str, sections: Iterable[Section], columns: int = 8) -> None:
    """The same as one picture, for a report or a terminal without a browser; all of it is in memory."""
    big, bold, plain = (ImageFont.load_default(size) for size in (24, 13, 12))
    gap, line = 12, 18
    width = gap + columns * (_TILE + gap)
    rows: list[Image.Image] = [_lines(width, gap, [(title, big, 32, "#1c1c1e"), (about, plain, line, "#6b6b70")])]
    for section in sections:
        rows.append(_lines(width, gap, [(section.title, bold, line + 6, "#1c1c1e")]))
        for start in range(0, len(section.tiles), columns):
            row = Image.new("RGB", (width, _TILE + 3 * line), "white")
            draw = ImageDraw.Draw(row)
            for i, tile in enumerate(section.tiles[start : start + columns]):
                left = gap + i * (_TILE + gap)
                color = "#0a6cce" if tile.marked else "#dcdce0"
                draw.rectangle((left - 2, 0, left + _TILE + 1, _TILE + 3), "#f2f2f4", color, 2 if tile.marked else 1)
                if tile.image is not None:
                    picture = _fitted(tile.image, _TILE)
                    row.paste(picture, (left + (_TILE - picture.width) // 2, 2 + (_TILE - picture.height) // 2))
                draw.text((left, _TILE + 5), _cut(_headline(tile), bold, _TILE), "#1c1c1e", bold)
                draw.text((left, _TILE + 5 + line), _cut(Path(tile.caption).name, plain, _TILE), "#6b6b70", plain)
            rows.append(row)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + gap), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _headline(tile: Tile) -> str:
    return f"{tile.headline} · {tile.detail}" if tile.detail else tile.headline


def _fitted(image: Tensor, side: int) -> Image.Image:
    """The longer side to `side` exactly: small pictures grow, with their pixels visible."""
    if max(image.shape[1:]) >= side:
        return thumbnail(image, side)
    picture = thumbnail(image, side)
    times = side / max(picture.size)
    return picture.resize((round(picture.width * times), round(picture.height * times)), Image.Resampling.NEAREST)


def _lines(
    width: int, gap: int, texts: Sequence[tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont, int, str]]
) -> Image.Image:
    """A strip with lines of text: (text, font, height, color)."""
    strip = Image.new("RGB", (width, gap + sum(height for _, _, height, _ in texts)), "white")
    draw, top = ImageDraw.Draw(strip), gap // 2
    for line, font, height, color in texts:
        draw.text((gap, top), _cut(line, font, width - 2 * gap), color, font)
        top += height
    return strip


def _cut(raw: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the end of a text as fits: the end of a path tells files apart."""
    shown = plain(raw).encode("utf-8", "replace").decode()
    if font.getlength(shown) <= width:
        return shown
    while shown and font.getlength(f"…{shown}") > width:
        shown = shown[1:]
    return f"…{shown}"
