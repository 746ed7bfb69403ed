"""Render the templates in templates/ as self-contained pages; all text is escaped."""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

from moco.files import atomic_write

THUMBNAIL = 320  # maximum of the longer side in pixels: about twice the displayed size, for high-density displays


def plain(text: str) -> str:
    """Replace characters that are not printable, such as line ends and changes of writing direction, by U+FFFD.

    U+DC80 to U+DCFF stay, because they represent bytes of a file name that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or "\udc80" <= each <= "\udcff" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def plain_utf8(text: str) -> str:
    """Return the result of `plain` as text that can be encoded in UTF-8: bytes that are not UTF-8 become escapes."""
    return plain(text).encode("utf-8", "backslashreplace").decode()


def breakable(text: str) -> Markup:
    """Escape a text and let a browser break its line after each _ and /."""
    return escape(plain(text)).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))


def thumbnail(image: Tensor, side: int = THUMBNAIL) -> Image.Image:
    """Return an image (3, H, W) uint8 as a PIL image whose longer side is at most `side`."""
    small = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    small.thumbnail((side, side))
    return small


def jpeg_url(image: Tensor, side: int = THUMBNAIL) -> str:
    """Return a thumbnail as a data URL."""
    data = io.BytesIO()
    thumbnail(image, side).save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{_base64(data.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_ENVIRONMENT = Environment(
    loader=PackageLoader("moco.reporting"),
    autoescape=True,
    # A file name can contain HTML and control characters. A `Markup`, a subclass of str, is HTML of ours: unchanged.
    finalize=lambda value: plain(value) if type(value) is str else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "breakable": breakable,
    "percent_signs": lambda text: escape(plain(text)).replace(" %", Markup("&nbsp;%")),
    "jpeg_url": jpeg_url,
    "png_url": lambda data: f"data:image/png;base64,{_base64(data)}",
    "sha256": lambda script: _base64(hashlib.sha256(script.encode()).digest()),
}
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
_PARTS: Any = _ENVIRONMENT.get_template("parts.html").module


def part(name: str, *values: Any, **options: Any) -> Markup:
    """Call a macro of parts.html and return its markup."""
    markup: Markup = getattr(_PARTS, name)(*values, **options)
    return markup


def resource(name: str) -> str:
    """Return the text of a style sheet or script."""
    return (Path(__file__).parent / name).read_text()


def write_page(path: Path, template: str, style: str, scripts: tuple[str, ...] = (), **values: Any) -> None:
    """Render a template and write the page atomically. If a value is an iterator, only one of its items is in memory.

    The page's Content-Security-Policy forbids every request and every script except the given ones, identified by
    their digests. Bytes of file names that are not UTF-8 become escapes.
    """
    values |= {"style": Markup(style), "scripts": [Markup(each) for each in scripts]}
    pieces = _ENVIRONMENT.get_template(template).generate(values)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(pieces)
