"""Image files to uint8 RGB tensors: one function, and one error for all that can be wrong with a file.

Colour profiles are ignored, as torchvision and the published pipelines do.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# What can be wrong with a file, as `ImageError.kind` says it, and what that means.
FAULTS = {
    "unreadable": "the system does not give the file: no permission, or gone",
    "empty": "no bytes in it",
    "no image": "the content is of no known format, whatever the name says",
    "too large": "the header declares more pixels than are decoded",
    "truncated": "the end is missing",
    "damaged": "the decoder gave up, or values of no known scale",
}
MAX_PIXELS = 178_956_970  # PIL's own limit


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
    """Read an image file in any format that PIL knows, upright (EXIF orientation applied), first frame only.

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
        raise _refusal(path, "unreadable", error.strerror or str(error)) from error
    if not data:
        raise _refusal(path, "empty", "the file is empty")
    return data


def decode_bytes(path: str | Path, data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """`decode` of a file whose content has been read; `path` names it in errors."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(path, image.size, max_pixels)
            if data.startswith(b"\xff\xd8\xff"):
                pixels = _decode_jpeg(path, data)
                if pixels is not None:
                    return pixels
            image.load()
            return _pil_to_tensor(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _refusal(path, "no image", f"no known image format, it begins with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:  # PIL's own limit, which comes before ours
        raise _refusal(path, "too large", str(error)) from error
    except Exception as error:  # PIL's readers raise whatever a broken file leads to: OSError, SyntaxError, IndexError
        reason = str(error) or type(error).__name__
        raise _refusal(path, "truncated" if "truncated" in reason.lower() else "damaged", reason) from error


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
    # The upper byte, as PIL and libpng do it for 16-bit colour: the same picture in gray and colour stays the same.
    return Image.fromarray((values >> 8).astype(np.uint8))
