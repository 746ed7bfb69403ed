"""Image files to uint8 RGB tensors: one function, and one error for all that can be wrong with a file.

Color profiles are ignored, as torchvision and the published pipelines do.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from moco.data.walk import GONE, IMAGE_FORMATS

# What can be wrong with a file, as `ImageError.kind` says it, and what that means.
FAULTS = {
    "unreadable": "the system does not give the file: no permission, or gone",
    "broken link": "the file that it leads to is not there",
    "empty": "no bytes in it",
    "no image": "the content is of no known format, whatever the name says",
    "too large": "the header declares more pixels than are decoded",
    "truncated": "the end is missing",
    "damaged": "the decoder gave up, or values of no known scale",
}
MAX_PIXELS = 178_956_970  # PIL's own limit

_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_ORIENTATION = 0x0112  # EXIF's tag
# From this many pixels on, a JPEG may be decoded at a fraction of its size. Below, that saves little or nothing: PIL,
# which can do it, is slower than torchvision, which cannot. docs/benchmarks.md has the figures.
SCALED_FROM = 1_500_000
Shrink = Callable[[int, int], int]  # (height, width) of the whole picture -> by how much it may shrink: 1, 2, 4 or 8


class Decoded(NamedTuple):
    """A picture, and how it relates to the one in the file."""

    pixels: Tensor  # uint8 (3, h, w) with h = ceil(H / factor), w = ceil(W / factor)
    size: tuple[int, int]  # H, W of the whole picture, upright
    factor: int = 1

    @classmethod
    def whole(cls, pixels: Tensor) -> "Decoded":
        """A picture (3, H, W) in its own size."""
        return cls(pixels, (pixels.shape[1], pixels.shape[2]))


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file and the reason in one sentence.

    Args:
        sentence: the message.
        kind: one of `FAULTS`; "" for what is no fault of a file.
        reason: the message without the file's name.
    """

    def __init__(self, sentence: str, kind: str = "", reason: str = "") -> None:
        super().__init__(sentence)
        self.kind, self.reason = kind, reason or sentence


def decode(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image file in any of `IMAGE_FORMATS`, upright (EXIF orientation applied), first frame only.

    JPEGs take torchvision's decoder: a quarter less time than PIL's, and the same pixels, gray, CMYK and
    Adobe-inverted files included (measured; both take every CMYK JPEG as inverted, which is how all common
    programs write them). The rest goes through PIL. The file's content decides, not its ending: ImageNet holds
    a PNG that is named .JPEG.

    Args:
        path: the file.
        max_pixels: the largest width x height that is decoded. The header is checked first, for a file of a few
            hundred kB can declare a picture of several GB. The default is PIL's own limit.

    Returns:
        uint8, shape (3, H, W), in red, green, blue. In memory the channels come last, as decoders write
        them: resizing a crop is up to four times faster so, with the same bits.

    Raises:
        ImageError: if the file cannot be read, is empty, truncated, too large, or not an image.
    """
    return decode_bytes(path, read_bytes(path), max_pixels)


def read_bytes(path: str | Path) -> bytes:
    """A file's content.

    Raises:
        ImageError: if it cannot be read, or is empty.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in GONE and Path(path).is_symlink():
            raise _refusal(path, "broken link", f"a link to {Path(path).readlink()}: {reason}") from error
        raise _refusal(path, "unreadable", reason) from error
    if not data:
        raise _refusal(path, "empty", "the file is empty")
    return data


def decode_bytes(path: str | Path, data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """`decode` of a file whose content has been read; `path` names it in errors."""
    return decode_scaled(path, data, lambda height, width: 1, max_pixels).pixels


def decode_scaled(path: str | Path, data: bytes, shrink: Shrink, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`decode_bytes`, but a large JPEG may come smaller, straight from its frequencies (libjpeg's scaled decoding).

    A pixel is then about the mean of factor x factor pixels of the whole picture.

    Args:
        path: names the file in errors.
        data: its content.
        shrink: asked for pictures of `SCALED_FROM` pixels and more.
        max_pixels: as for `decode`.

    Raises:
        ImageError: as `decode`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(path, image.size, max_pixels)
            scaled = _decode_scaled(image, data, shrink)
            if scaled is not None:
                return scaled
            pixels = _decode_jpeg(path, data) if data.startswith(_JPEG) else None
            if pixels is None:
                image.load()
                pixels = _pil_to_tensor(image)
            return Decoded.whole(pixels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_FORMATS)
        raise _refusal(path, "no image", f"no known image format ({known}), it begins with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:  # PIL's own limit, which comes before ours
        raise _refusal(path, "too large", str(error)) from error
    except Exception as error:  # PIL's readers raise whatever a broken file leads to: OSError, SyntaxError, IndexError
        reason = str(error) or type(error).__name__
        raise _refusal(path, "truncated" if "truncated" in reason.lower() else "damaged", reason) from error


def _decode_scaled(image: Image.Image, data: bytes, shrink: Shrink) -> Decoded | None:
    """A large JPEG made smaller in decoding, or None where that is not to be, or the whole must be decoded to judge it.

    PIL takes a file that was cut short and filled up with zeros for a whole one. So only a file that ends as a JPEG
    does comes this way; the others (some cameras write more behind it) are left to torchvision's decoder.
    """
    width, height = image.size
    if width * height < SCALED_FROM or not (data.startswith(_JPEG) and data.endswith(_JPEG_END)):
        return None
    image.info.pop("xmp", None)  # PIL would look for an orientation there too, torchvision does not
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data, which the decoders read differently
        return None
    if orientation in (5, 6, 7, 8):  # lies on its side
        width, height = height, width
    factor = shrink(height, width)
    # The last row and column stand for fewer pixels where the factor does not divide. Turned, they would come first.
    if factor == 1 or (orientation != 1 and (height % factor or width % factor)):
        return None
    image.draft("RGB", (image.size[0] // factor, image.size[1] // factor))
    image.load()
    pixels = _pil_to_tensor(image)
    assert pixels.shape[1:] == (-(-height // factor), -(-width // factor)), (pixels.shape, height, width, factor)
    return Decoded(pixels, (height, width), factor)


def _refusal(path: str | Path, kind: str, reason: str) -> ImageError:
    return ImageError(f"cannot read image {path}: {reason}", kind, reason)


def _check_size(path: str | Path, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _refusal(
            path,
            "too large",
            f"its header declares {width} x {height} = {width * height:,} pixels, more than max_pixels={max_pixels:,}; "
            "shrink or remove the file",
        )


def _decode_jpeg(path: str | Path, data: bytes) -> Tensor | None:
    """(3, H, W), or None where torchvision cannot say and PIL should."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a bytearray, as torch wants writable memory
    try:
        pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return pixels
    except RuntimeError as error:
        # PIL must not have the last word here: it fills the missing part of a file that ends in zeros, as an
        # interrupted download leaves it, with rubbish. (A file cut short but closed with an end marker deceives both.)
        if "truncated" in str(error):
            raise _refusal(path, "truncated", "the JPEG is truncated") from error
        return None


def _pil_to_tensor(image: Image.Image) -> Tensor:
    """A loaded picture of any mode to uint8 RGB (3, H, W)."""
    with contextlib.suppress(Exception):  # broken EXIF data says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        # What lies under transparent pixels is arbitrary (often black, sometimes leftovers), and most such pictures
        # are drawings, logos and products made for a white page.
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    array = np.array(image.convert("RGB"))  # (H, W, 3), a copy: torch wants writable memory
    return torch.from_numpy(array).permute(2, 0, 1)  # (3, H, W)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits (modes I;16, I) or float (F, 0 ... 1) to 8 bits; PIL's own conversion saturates at 255.

    The scale is the format's, never the picture's: stretching each picture to its own range would remove differences
    in brightness between pictures. Values outside the range are refused instead of guessed at.
    """
    values = np.asarray(image)  # (H, W)
    top = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN is refused too
        raise ValueError(
            f"its {image.mode} pixels lie in {values.min()} ... {values.max()}, but only 0 ... {top} is understood: "
            "convert it to 8 bits"
        )
    if image.mode == "F":
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    # The upper byte, as PIL and libpng do it for 16-bit color: the same picture in gray and color stays the same.
    return Image.fromarray((values >> 8).astype(np.uint8))
