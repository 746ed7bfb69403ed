"""Pieces of a page that stands alone: escaped text, pictures inside the page, tables, and the page around them."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from moco.files import atomic_write

DIRECTORY = Path(__file__).parent  # where the style sheets and scripts lie


def plain(text: str) -> str:
    """Characters that steer the display (line ends, the direction of writing) become visible."""
    return "".join(each if _is_plain(each) else "\N{REPLACEMENT CHARACTER}" for each in text)


def text(raw: str) -> str:
    """Plain and escaped: a file's name can hold markup."""
    return html.escape(plain(raw))


def breaking(raw: str) -> str:
    """Escaped, with the places at which a long path may go on in the next line."""
    return text(raw).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _is_plain(character: str) -> bool:
    return character.isprintable() or "\udc80" <= character <= "\udcff"  # the latter: bytes that are no UTF-8


def thumbnail(image: Tensor, side: int) -> Image.Image:
    """A PIL picture of an image (3, H, W) uint8 whose longer side is at most `side`."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((side, side))
    return picture


def jpeg(picture: Image.Image, quality: int = 85) -> str:
    """A picture as an address that holds the picture itself."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def png(data: bytes) -> str:
    """A PNG file as an address that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], quiet: bool = False) -> str:
    """A table of texts; the first cell of a row is its heading. It scrolls within itself where it is too wide.

    Args:
        caption: what it is.
        columns: their headings.
        rows: their texts.
        quiet: caption and headings are for those who do not see the page around the table.
    """
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row">{breaking(row[0])}</th>'
        + "".join(f"<td>{breaking(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table{' class=quiet' * quiet}>"
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>\n"
    )


def details(summary: str, body: str) -> str:
    """Something to unfold; `body` is markup."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>\n"


def data(name: str, value: Any) -> str:
    """A value that a script of the page reads by its name; nothing in it can end the element."""
    inert = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{inert}</script>\n'


def opening(title: str, style: str, scripts: Sequence[str] = ()) -> str:
    """The beginning of a page, up to its body.

    Its own policy forbids anything from elsewhere, and all scripts but the given ones, which it knows by their digest:
    a name with markup in it could do nothing even if it got through.
    """
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    allowed = "; script-src " + " ".join(f"'sha256-{digest}'" for digest in digests) if digests else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style></head>\n<body>\n"
    )


def closing(scripts: Sequence[str] = ()) -> str:
    """The end of a page, with its scripts."""
    return "".join(f"<script>{each}</script>\n" for each in scripts) + "</body></html>\n"


def write(path: Path, parts: Iterable[str]) -> None:
    """The page's parts to a temporary name first: never half a file. A name that is no UTF-8 shows its odd bytes."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(parts)
