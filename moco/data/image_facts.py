"""The properties of an image file that matter before a run: whether it can be decoded, and what is unusual about it."""

import contextlib
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, TiffImagePlugin

from moco.data.decode import ImageError, decode_bytes, has_deep_color, read_bytes
from moco.data.walk import IMAGE_FORMATS

TINY, LONG, HUGE = 8, 10, 50_000_000  # pixels of a side, ratio of the sides, pixels of an image

# Unusual properties that do not end a run, and how such an image is handled.
ODDITIES = {
    "16 bits": "scaled to 8 bits; data.bits gives the scale",
    "CMYK": "converted to RGB without its color profile",
    "palette": "converted to RGB",
    "transparent": "put on a white background; a band that a TIFF marks as alpha, such as infrared, counts as opacity",
    "extra band": "the last band is not used",
    "rotated by EXIF": "used upright",
    "several frames": "the first one is used",
    "tiny": f"a side has fewer than {TINY} pixels: its crops are strongly enlarged",
    "long": f"one side is more than {LONG} times the other: its crops show only a part",
    "huge": f"more than {HUGE // 10**6} megapixels, decoded in every epoch: store a smaller copy",
    "misnamed": "the content has another format than its name; the content counts",
    "name": "not ASCII: other tools may not support it",
}
_SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG that contains a second image, as phones write it


@dataclass(frozen=True)
class ImageFacts:
    """The properties of one file; an unreadable file has only `fault` and `reason`."""

    length: int = 0  # bytes
    digest: bytes = b""  # 16 bytes of BLAKE2b of the content
    size: tuple[int, int] = (0, 0)  # width and height, upright
    format: str = ""  # for example "JPEG RGB"
    odd: tuple[str, ...] = ()  # keys of `ODDITIES`
    fault: str = ""  # a key of `moco.data.decode.FAULTS`
    reason: str = ""


def image_facts(path: str, bits: int = 16) -> ImageFacts:
    """Read and decode one file as training does, and return its properties."""
    try:
        data = read_bytes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's warnings: the relevant ones are among the facts
            pixels = decode_bytes(path, data, bits=bits)
            form, odd = _header(data)
    except ImageError as error:
        return ImageFacts(fault=error.kind, reason=error.reason)
    height, width = pixels.shape[1:]
    format_of_name = Image.registered_extensions().get(Path(path).suffix.lower())
    content = form.split()[0]
    found = {
        **odd,
        "tiny": min(width, height) < TINY,
        "long": max(width, height) > LONG * min(width, height),
        "huge": width * height > HUGE,
        "misnamed": format_of_name != _SAME_FORMAT.get(content, content),
        "name": not Path(path).name.isascii(),
    }
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return ImageFacts(len(data), digest, (width, height), form, tuple(kind for kind in ODDITIES if found[kind]))


def _header(data: bytes) -> tuple[str, dict[str, bool]]:
    """Return format and mode of a readable image, and the `ODDITIES` that its header shows."""
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        deep = image.mode[0] in "IF" or has_deep_color(image)
        orientation, frames, transparent = 1, 2, False
        with contextlib.suppress(Exception):  # broken EXIF data
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        with contextlib.suppress(Exception):  # there is more after the first frame, but it is damaged
            frames = getattr(image, "n_frames", 1)
        with contextlib.suppress(Exception):
            transparent = image.has_transparency_data
        bands = getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLESPERPIXEL, 0)
        return f"{image.format} {image.mode}", {
            "16 bits": deep,
            "CMYK": image.mode == "CMYK",
            "palette": image.mode in ("P", "PA") and image.format != "GIF",  # every GIF has a palette
            "transparent": transparent,
            "extra band": bands == len(image.getbands()) + 1,
            "rotated by EXIF": orientation in range(2, 9),
            "several frames": image.format != "MPO" and frames > 1,
        }
