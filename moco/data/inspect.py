"""What there is to know of an image file before a run: whether it can be decoded, and what is odd about it."""

import contextlib
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moco.data.decode import ImageError, decode_bytes, read_bytes
from moco.data.walk import IMAGE_FORMATS

TINY, LONG, HUGE = 8, 10, 50_000_000

# What does not stop a run, and what becomes of it.
ODDITIES = {
    "16 bits": "the upper 8 of each value are used",
    "CMYK": "converted to RGB without its color profile",
    "palette": "converted to RGB",
    "transparent": "laid on white",
    "rotated by EXIF": "shown upright",
    "several frames": "the first one is used",
    "tiny": f"a side is below {TINY} pixels: crops of it are enlarged to blots",
    "long": f"one side is more than {LONG} times the other: crops show a strip of it",
    "huge": f"more than {HUGE // 10**6} megapixels, which are decoded in every epoch: keep a smaller copy",
    "misnamed": "the content is of another format than the name says; the content counts",
    "name": "not all ASCII, which other tools may not take",
}
_SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG with a second picture behind the first, as telephones write it


@dataclass(frozen=True)
class Facts:
    """What was found; nothing of an unreadable file but its fault."""

    length: int = 0  # bytes
    digest: bytes = b""  # 16 bytes of BLAKE2b of the content
    size: tuple[int, int] = (0, 0)  # width and height, upright
    format: str = ""  # such as "JPEG RGB"
    odd: tuple[str, ...] = ()  # of `ODDITIES`
    fault: str = ""  # of `moco.data.decode.FAULTS`
    reason: str = ""


def inspect(path: str) -> Facts:
    """Reads and decodes one file, as training would."""
    try:
        data = read_bytes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's: what matters of them is in the facts
            pixels = decode_bytes(path, data)
            form, odd = _header(data)
    except ImageError as error:
        return Facts(fault=error.kind, reason=error.reason)
    height, width = pixels.shape[1:]
    declared = Image.registered_extensions().get(Path(path).suffix.lower())
    content = form.split()[0]
    found = {
        **odd,
        "tiny": min(width, height) < TINY,
        "long": max(width, height) > LONG * min(width, height),
        "huge": width * height > HUGE,
        "misnamed": declared != _SAME_FORMAT.get(content, content),
        "name": not Path(path).name.isascii(),
    }
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return Facts(len(data), digest, (width, height), form, tuple(kind for kind in ODDITIES if found[kind]))


def _header(data: bytes) -> tuple[str, dict[str, bool]]:
    """Format and mode, and what the header of a picture that decodes has of `ODDITIES`."""
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        # PIL opens PNGs and TIFFs with 16 bits a color as RGB; only how it unpacks them ("RGB;16B") tells.
        layouts = [str(tile[3]) for tile in getattr(image, "tile", [])]
        orientation = 1
        with contextlib.suppress(Exception):  # broken EXIF data
            orientation = image.getexif().get(0x0112, 1)
        return f"{image.format} {image.mode}", {
            "16 bits": image.mode[0] in "IF" or any(";16" in each for each in layouts),
            "CMYK": image.mode == "CMYK",
            "palette": image.mode in ("P", "PA") and image.format != "GIF",  # which has no other
            "transparent": image.has_transparency_data,
            "rotated by EXIF": orientation in range(2, 9),
            "several frames": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
        }
