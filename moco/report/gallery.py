"""Galleries of pictures: one HTML file that loads nothing from elsewhere, or one PNG."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

THUMBNAIL = 320  # pixels of the longer side at most: twice what the page shows, for dense displays
_TILE = 168  # pixels of the shown picture
_STYLE = """
:root { color-scheme: light dark; --back: #fafafa; --card: #fff; --ink: #1c1c1e; --soft: #6b6b70; --line: #dcdce0;
  --mark: #0a6cce; }
@media (prefers-color-scheme: dark) { :root { --back: #161618; --card: #222225; --ink: #ececee; --soft: #a0a0a6;
  --line: #38383c; --mark: #5eb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 1700px; background: var(--back);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
.about { color: var(--soft); margin: 0 0 1.5rem; max-width: 75ch; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: 1rem 0 1.25rem; }
h2 { font-size: 1rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: .75rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure.mark { border-color: var(--mark); box-shadow: 0 0 0 1px var(--mark); }
img { display: block; width: 100%; height: 168px; object-fit: contain; background: var(--back); }
img.small { image-rendering: pixelated; }
figcaption { padding: .4rem .55rem .5rem; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
figcaption b { display: block; color: var(--ink); font-variant-numeric: tabular-nums; }
figcaption i { display: block; font-style: normal; font-variant-numeric: tabular-nums; }
figure.mark figcaption b { color: var(--mark); }
"""


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


def write_html(path: Path, title: str, about: str, sections: Iterable[Section]) -> None:
    """A page with every picture inside it. One section is in memory at a time.

    All text is escaped, and the page's own policy forbids scripts and anything from elsewhere: a file's name
    can hold markup.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    temporary = path.with_name(f"{path.name}.tmp")
    # A name that is no UTF-8 shows its odd bytes as \\udcXX.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
            f'<h1>{_text(title)}</h1>\n<p class="about">{_text(about)}</p>\n'
        )
        for section in sections:
            file.write(f'<section><h2>{_text(section.title)}</h2>\n<div class="grid">\n')
            file.writelines(_figure(tile) for tile in section.tiles)
            file.write("</div></section>\n")
        file.write("</body></html>\n")
    temporary.replace(path)


def _figure(tile: Tile) -> str:
    picture = "<img alt='cannot be read'>"
    if tile.image is not None:
        small = ' class="small"' if max(tile.image.shape[1:]) <= _TILE // 2 else ""
        data = base64.b64encode(_jpeg(_thumbnail(tile.image, THUMBNAIL))).decode()
        picture = f'<img{small} loading="lazy" alt="{_text(tile.caption)}" src="data:image/jpeg;base64,{data}">'
    detail = f"<i>{_text(tile.detail)}</i>" if tile.detail else ""
    return (
        f'<figure{" class=mark" if tile.marked else ""} title="{_text(tile.caption)}">{picture}'
        f"<figcaption><b>{_text(tile.headline)}</b>{detail}{_breaking(tile.caption)}</figcaption></figure>\n"
    )


def _text(text: str) -> str:
    """Escaped; characters that steer the display (line ends, the direction of writing) become visible."""
    return html.escape("".join(each if _is_plain(each) else "\N{REPLACEMENT CHARACTER}" for each in text))


def _breaking(text: str) -> str:
    """Escaped, with the places at which a long path may go on in the next line."""
    return _text(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _is_plain(character: str) -> bool:
    return character.isprintable() or "\udc80" <= character <= "\udcff"  # the latter: bytes that are no UTF-8


def _thumbnail(image: Tensor, side: int) -> Image.Image:
    """A PIL picture whose longer side is at most `side`."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((side, side))
    return picture


def _jpeg(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()


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
                colour = "#0a6cce" if tile.marked else "#dcdce0"
                draw.rectangle((left - 2, 0, left + _TILE + 1, _TILE + 3), "#f2f2f4", colour, 2 if tile.marked else 1)
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
    temporary = path.with_name(f"{path.name}.tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def _headline(tile: Tile) -> str:
    return f"{tile.headline} · {tile.detail}" if tile.detail else tile.headline


def _fitted(image: Tensor, side: int) -> Image.Image:
    """The longer side to `side` exactly: small pictures grow, with their pixels visible."""
    if max(image.shape[1:]) >= side:
        return _thumbnail(image, side)
    picture = _thumbnail(image, side)
    times = side / max(picture.size)
    return picture.resize((round(picture.width * times), round(picture.height * times)), Image.Resampling.NEAREST)


def _lines(
    width: int, gap: int, texts: Sequence[tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont, int, str]]
) -> Image.Image:
    """A strip with lines of text: (text, font, height, colour)."""
    strip = Image.new("RGB", (width, gap + sum(height for _, _, height, _ in texts)), "white")
    draw, top = ImageDraw.Draw(strip), gap // 2
    for text, font, height, colour in texts:
        draw.text((gap, top), _cut(text, font, width - 2 * gap), colour, font)
        top += height
    return strip


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the end of a text as fits: the end of a path tells files apart."""
    text = "".join(each if _is_plain(each) else "\N{REPLACEMENT CHARACTER}" for each in text)
    text = text.encode("utf-8", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"
