"""Decoding of image files to tensors, with one error type for every fault of a file.

For data sets of 8-bit gray or RGB images, files are decoded here, except for NPY and NPZ. `moco.data.bands` decodes the
rest.

Color profiles are ignored, as torchvision and the published pipelines do.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from moco.config import ConfigError
from moco.data.bands import TooLarge, WrongFormat, bands_of, deep_png, is_array, read_bands
from moco.data.headers import (
    deep_white_is_zero,
    has_deep_color,
    inverted,
    largest_page,
    misreads_bands,
    open_image,
    orientation_of,
    stated_bits,
    stated_type,
    stated_values,
    tiff_pages,
    upright,
)
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.walk import BROKEN_LINK, IMAGE_FORMATS

# The faults of a file (`ImageError.kind`) and their meaning.
FAULTS = {
    "unreadable": "the file cannot be read: no permission, or it was removed",
    "broken link": "the target of the link does not exist",
    "empty": "the file has no bytes",
    "no image": "the content has no known image format, whatever the name suggests",
    "unsupported": "a known format with a kind of pixels that is not read, or other channels or depth than configured",
    "too large": "the header declares more pixels or bytes than the limit",
    "truncated": "the end is missing",
    "damaged": "the decoder failed, or the values have an unknown scale",
}
# PIL's own limit. It is checked before decoding, because a header of a few bytes can declare an image of several GB.
MAX_PIXELS = 178_956_970

# Keep PIL's warnings about damaged files and unusual headers out of stderr: each fault that matters is an ImageError.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
# A JPEG of at least this many pixels may be decoded at a fraction of its size. For smaller ones this saves nothing:
# PIL, which can do it, is slower than torchvision, which cannot (measured in docs/benchmarks.md).
SCALED_FROM = 1_500_000
Shrink = Callable[[int, int], int]  # (height, width) of the full image -> by which factor it may shrink: 1, 2, 4 or 8


class Decoded(NamedTuple):
    """A decoded image, possibly at a fraction of its size."""

    pixels: Tensor  # (C, h, w) with h = ceil(H / factor), w = ceil(W / factor)
    size: tuple[int, int]  # H, W of the full image, upright
    factor: int = 1

    @classmethod
    def full(cls, pixels: Tensor) -> "Decoded":
        """Return an image (C, H, W) at its full size."""
        return cls(pixels, (pixels.shape[1], pixels.shape[2]))


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file and the reason in one sentence.

    `kind` is one of `FAULTS`, or "" if no single file is at fault; `reason` is the message without the file's name.
    """

    def __init__(self, sentence: str, kind: str = "", reason: str = "") -> None:
        super().__init__(sentence)
        self.kind, self.reason = kind, reason or sentence


def decode(path: str | Path, pixel_format: PixelFormat = RGB) -> Tensor:
    """Read an image file in any of `IMAGE_FORMATS`, NPY or NPZ, upright (EXIF orientation applied).

    If a file has several frames, the first one is read. If a TIFF has several pages, the largest one is read; but in a
    data set of other images than 8-bit gray or RGB, pages of equal size are the bands of one image.

    JPEGs are decoded by torchvision: it takes a quarter less time than PIL and returns the same pixels, also for gray,
    CMYK and Adobe-inverted files (measured; both libraries treat every CMYK JPEG as inverted, as all common programs
    write them). PIL decodes the rest. The file's content decides, not its ending: ImageNet contains a PNG that is named
    .JPEG.

    Args:
        path: the file.
        pixel_format: the channels and the type of the result.

    Returns:
        Shape (C, H, W), of the format's type; three channels of uint8 are red, green and blue. Except for NPY and NPZ,
        such RGB images are in channels-last memory format, as decoders write them: with this format, resizing a crop is
        up to four times faster and gives the same bits.

    Raises:
        ImageError: if the file cannot be read, or is empty, truncated, damaged, too large, unsupported, or no image.
    """
    return decode_bytes(path, read_bytes(path), pixel_format)


def read_bytes(path: str | Path) -> bytes:
    """Read a file; raise an ImageError if it cannot be read, or is empty."""
    return _read(path, Path.read_bytes)


def check_readable(path: str | Path) -> None:
    """Raise the ImageErrors of `read_bytes` without reading the complete file."""

    def first_byte(file: Path) -> bytes:
        with file.open("rb") as opened:
            return opened.read(1)

    _read(path, first_byte)


def _read(path: str | Path, read: Callable[[Path], bytes]) -> bytes:
    try:
        data = read(Path(path))
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in BROKEN_LINK and Path(path).is_symlink():
            raise _refusal(path, "broken link", f"a link to {Path(path).readlink()}: {reason}") from error
        raise _refusal(path, "unreadable", reason) from error
    if not data:
        raise _refusal(path, "empty", "the file is empty")
    return data


def pil_reason(error: Exception, data: bytes) -> str:
    """Return why PIL cannot open the content of a file.

    For an unknown format, PIL's own message is not used: it names a BytesIO object instead of the file.
    """
    unknown = isinstance(error, UnidentifiedImageError)
    return f"no known image format, it begins with {data[:12]!r}" if unknown else str(error) or type(error).__name__


def decode_bytes(path: str | Path, data: bytes, pixel_format: PixelFormat = RGB) -> Tensor:
    """Decode the content of a file as `decode` does; `path` names it in errors."""
    return decode_scaled(path, data, lambda height, width: 1, pixel_format).pixels


def decode_scaled(path: str | Path, data: bytes, shrink: Shrink, pixel_format: PixelFormat = RGB) -> Decoded:
    """Decode like `decode_bytes`, but a large JPEG may come at a fraction of its size (libjpeg's scaled decoding).

    A pixel is then about the mean of factor x factor pixels of the full image.

    Args:
        path: names the file in errors.
        data: its content.
        shrink: called for JPEGs of at least `SCALED_FROM` pixels.
        pixel_format: as for `decode`.
    """
    try:
        if is_array(data) or not pixel_format.is_8bit_gray_or_rgb:
            return Decoded.full(read_bands(data, pixel_format))
        decoded = _decode_color(path, data, shrink, pixel_format.bits)
        return decoded if pixel_format.channels == 3 else decoded._replace(pixels=to_gray(decoded.pixels))
    except ImageError:
        raise
    except (WrongFormat, ConfigError) as error:  # a ConfigError names a package that is missing
        raise _refusal(path, "unsupported", str(error)) from error
    except UnidentifiedImageError as error:
        if reason := _unknown_tiff(data):
            raise _refusal(path, "unsupported", reason) from error
        known = ", ".join((*IMAGE_FORMATS, "NPY", "NPZ"))
        raise _refusal(path, "no image", f"no known image format ({known}), it begins with {data[:12]!r}") from error
    except (TooLarge, Image.DecompressionBombError) as error:  # PIL checks its own limit first
        raise _refusal(path, "too large", str(error)) from error
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, IndexError and others for a damaged file
        reason = str(error) or type(error).__name__
        raise _refusal(path, "truncated" if "truncated" in reason.lower() else "damaged", reason) from error


def _decode_color(path: str | Path, data: bytes, shrink: Shrink, bits: int) -> Decoded:
    """Decode to uint8 (3, h, w)."""
    with open_image(data) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            declared = f"its header declares {width} x {height} = {width * height:,} pixels"
            fix = f"and at most {MAX_PIXELS:,} are read: shrink or remove the file"
            raise _refusal(path, "too large", f"{declared}, {fix}")
        if misreads_bands(image):
            raise UnidentifiedImageError
        scaled = _decode_jpeg_scaled(image, data, shrink)
        if scaled is not None:
            return scaled
        pixels = _decode_jpeg(path, data) if data.startswith(_JPEG) else None
        if pixels is None:
            deep = bits < 16 and has_deep_color(image)
            image.load()
            pixels = pil_to_tensor(_deep_to_eight_bits(image, data, bits) if deep else image, bits)
        return Decoded.full(pixels)


def to_gray(pixels: Tensor) -> Tensor:
    """Convert uint8 (3, H, W) to (1, H, W) as PIL does: gray images keep their values."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    return torch.from_numpy(np.array(image))[None]


def _unknown_tiff(data: bytes) -> str:
    """Describe a TIFF that PIL does not read, and a fix; "" for another file, or if its tags cannot be read."""
    if not (pages := tiff_pages(data)):
        return ""
    page = pages[largest_page(pages)]
    bits = "/".join(map(str, sorted(set(page.bits))))
    how = f"{bits} bits{', stored band by band' * page.by_band}"
    fix = f"set data.channels={page.bands} data.dtype={page.dtype}, or store it as a gray or RGB image"
    if page.dtype == RGB.dtype and page.bands in (1, 3):  # these fields would not change how it is read
        fix = "store it as a gray or RGB image"
    return f"a TIFF with {page.bands} band{'s' * (page.bands > 1)} of {how}, which is not read as RGB: {fix}"


def _decode_jpeg_scaled(image: Image.Image, data: bytes, shrink: Shrink) -> Decoded | None:
    """Decode a large JPEG at a fraction of its size; return None if it must be decoded in full.

    PIL accepts a file that was cut off and filled up with zeros. So only a file that ends with JPEG's end marker is
    decoded here; the others (some cameras append data) are left to torchvision's decoder.
    """
    width, height = image.size
    if width * height < SCALED_FROM or not (data.startswith(_JPEG) and data.endswith(_JPEG_END)):
        return None
    image.info.pop("xmp", None)  # PIL would use an orientation in it, torchvision does not
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data, which the two decoders read differently
        return None
    if orientation in (5, 6, 7, 8):  # rotated by 90 degrees
        width, height = height, width
    factor = shrink(height, width)
    # If the factor does not divide the size, the last row and column average fewer pixels. Rotation may make them the
    # first, where `Decoded` does not expect them.
    if factor == 1 or (orientation != 1 and (height % factor or width % factor)):
        return None
    image.draft("RGB", (image.size[0] // factor, image.size[1] // factor))
    image.load()
    pixels = pil_to_tensor(image)
    assert pixels.shape[1:] == (-(-height // factor), -(-width // factor)), (pixels.shape, height, width, factor)
    return Decoded(pixels, (height, width), factor)


def _refusal(path: str | Path, kind: str, reason: str) -> ImageError:
    return ImageError(f"cannot read image {path}: {reason}", kind, reason)


def _decode_jpeg(path: str | Path, data: bytes) -> Tensor | None:
    """Return (3, H, W); None if torchvision fails and PIL should try."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a bytearray, because torch needs writable memory
    try:
        pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return pixels
    except RuntimeError as error:
        # PIL must not try here: if a file ends in zeros, as after an interrupted download, PIL invents the missing
        # pixels. (Neither decoder notices a file that is cut off but has an end marker.)
        if "truncated" in str(error):
            raise _refusal(path, "truncated", "the JPEG is truncated") from error
        return None


def highest_value(data: bytes) -> int:
    """Return the highest value of an image of 16 bits per channel; 0 for another image, or one that is unreadable.

    Of a TIFF in color only the upper bytes are read, so the result can exceed the true value by up to 255.
    """
    with contextlib.suppress(Exception), open_image(data) as image:
        if image.width * image.height > MAX_PIXELS or stated_bits(image) < 16:
            return 0
        if has_deep_color(image):
            if image.format == "PNG":
                return int(deep_png(data)[: 1 if image.mode == "LA" else 3].max())
            return int(np.asarray(image.convert("RGB")).max()) << 8 | 255
        if image.mode.startswith("I"):
            return int(np.asarray(image).max())
    return 0


def _deep_to_eight_bits(image: Image.Image, data: bytes, bits: int) -> Image.Image:
    """Convert a 16-bit PNG with colors below 2**bits to 8 bits; raise ValueError for a TIFF, or for larger values."""
    if image.format != "PNG":
        raise ValueError(
            f"a {image.format} with 16 bits per color: only the upper 8 bits can be read, and data.bits={bits} needs "
            "the lower ones; convert it to 8 bits, or to PNG"
        )
    values = deep_png(data)  # (C, H, W)
    colors = len(values) - (len(values) in (2, 4))
    _check_range("16-bit", values[:colors], 2**bits - 1)
    # Opacity may fill the range of 16 bits, although the colors do not.
    array = (np.minimum(values, 2**bits - 1) >> (bits - 8)).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    small = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array, {2: "LA"}.get(array.shape[2]))
    small.info = {name: value for name, value in image.info.items() if name in ("exif", "xmp")}
    return small


def pil_to_tensor(image: Image.Image, bits: int = 16) -> Tensor:
    """Convert an image of any mode to uint8 RGB (3, H, W), upright."""
    image.load()  # PIL applies the EXIF orientation of a TIFF here
    orientation = orientation_of(image)
    if image.mode[0] in "IF" or stated_type(image) == np.int8:
        stated = stated_bits(image)
        image = _to_eight_bits(image, stated if 8 <= stated < 16 else bits)
    if image.mode in ("P", "PA") and image.palette is None:
        image = image.copy()  # the copy has an empty palette, without which PIL cannot convert it
    if image.has_transparency_data:
        # The color of transparent pixels is arbitrary (often black), and most such images are drawings, logos and
        # products made for a white page.
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    array = upright(np.asarray(image.convert("RGB")), orientation)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)  # a copy, because torch needs writable memory


def convert(image: Image.Image, pixel_format: PixelFormat) -> Tensor:
    """Convert a PIL image as `decode` converts a file, to (C, H, W).

    Raises:
        ValueError: for other channels or another type than those of the format, or values of an unknown scale.
    """
    if not pixel_format.is_8bit_gray_or_rgb:
        return bands_of(image, pixel_format)
    color = pil_to_tensor(image, pixel_format.bits)
    return color if pixel_format.channels == 3 else to_gray(color)


def _to_eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Convert gray of up to 16 bits (modes I;16, I) or float (F, 0 ... 1) to 8 bits; PIL's conversion saturates at 255.

    The scale depends on the format and the data set, never on the image: stretching each image to its own range would
    remove differences in brightness between images. Values outside the range are refused.
    """
    values = stated_values(image)  # (H, W)
    _check_range(values.dtype.name, values, 1 if image.mode == "F" else 2**bits - 1)
    if deep_white_is_zero(image):
        values = inverted(values, bits)
    if image.mode == "F":
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    # The upper 8 of the bits, as PIL and libpng do for 16-bit color, so that gray and color versions of an image agree.
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def _check_range(kind: str, values: NDArray[Any], top: int) -> None:
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN is refused too
        fixes = ["convert it to 8 bits"]
        if 1 < top < values.max() <= 65535:
            fixes.append("set data.bits=16")
        if np.isfinite(values).all():
            fixes.append("keep all values with data.dtype=float32 and, for gray, data.channels=1")
        raise ValueError(
            f"its {kind} pixels are in {values.min()} ... {values.max()}, but only 0 ... {top} is supported: "
            f"{', or '.join(fixes)}"
        )
