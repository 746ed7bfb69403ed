"""What the headers of image files state and PIL does not apply: pages, number types and WhiteIsZero of a TIFF.

Legend: H x W pixels.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from moco.data.walk import IMAGE_FORMATS

# The first bytes of a TIFF or BigTIFF.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO = 0  # a value of the tag PhotometricInterpretation
_SEPARATE = 2  # a value of the tag PlanarConfiguration
_KINDS = {1: "u", 2: "i"}  # values of the tag SampleFormat; others are floats and complex numbers
_EXIF = (b"eXIf", b"com.adobe.xmp")  # in a PNG: marks of the data that may state its orientation


class Page(NamedTuple):
    """The description of a page of a TIFF."""

    size: tuple[int, int]  # width and height, as stored
    bands: int
    bits: tuple[int, ...]  # of each band
    dtype: str  # the value of data.dtype that holds the pixels
    by_band: bool  # whether each band is stored separately
    white_is_zero: bool
    orientation: int  # as in EXIF; 1: upright


def tiff_pages(data: bytes) -> list[Page]:
    """Return the pages of a TIFF, up to the first one whose description is damaged; [] for another format."""
    pages = []
    with contextlib.suppress(Exception):  # PIL raises errors of many types
        for tags in _directories(data):
            pages.append(_page(tags))  # noqa: PERF401  # the pages before the damaged one are kept
    return pages


def _page(tags: TiffImagePlugin.ImageFileDirectory_v2) -> Page:
    bits = tuple(map(int, tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
    unsigned = set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) == {1}
    return Page(
        (int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH])),
        int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)),
        bits,
        "float32" if not unsigned or max(bits) > 16 else "uint16" if max(bits) > 8 else "uint8",
        _by_band(tags),
        tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO,
        int(tags.get(ExifTags.Base.Orientation, 1)),
    )


def _by_band(tags: Any) -> bool:
    separate = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == _SEPARATE
    return bool(separate and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 1)


def _directories(data: bytes) -> Iterator[TiffImagePlugin.ImageFileDirectory_v2]:
    """Yield the tags of each page of a TIFF."""
    if not data.startswith(TIFF):
        return
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
    file, seen = io.BytesIO(data), set()
    while tags.next and tags.next not in seen:
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        yield tags


def largest_page(pages: list[Page]) -> int:
    """Return the number of the page with the most pixels, the first of several; 0 without pages."""
    return max(range(len(pages)), key=lambda i: (pages[i].size[0] * pages[i].size[1], -i), default=0)


def open_image(data: bytes) -> Image.Image:
    """Open an image file with PIL; of a TIFF, the largest page.

    Raises:
        UnidentifiedImageError: if PIL does not know the format of the file, or of the pixels of that page.
        Exception: whatever PIL raises for a damaged file.
    """
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if page := largest_page(tiff_pages(data)):
        try:
            image.seek(page)
        except SyntaxError as error:
            raise UnidentifiedImageError(str(error)) from error
    return image


def raw_modes(image: Image.Image) -> list[str]:
    """Return PIL's names of the formats in which the file stores pixels; [] once an image is loaded."""
    return [str(tile[3]) for tile in getattr(image, "tile", [])]


def has_deep_color(image: Image.Image) -> bool:
    """Return whether an image that is not loaded has color of 16 bits per channel: PIL reads only the upper 8."""
    return not image.mode.startswith("I") and any(";16" in mode for mode in raw_modes(image))


def misreads_bands(image: Image.Image) -> bool:
    """Return whether PIL would misread a TIFF that stores band after band; call it before loading.

    If the bands are not the channels of a color image, PIL reads only the first one. PIL reads uncompressed color of
    16 bits as color of 8 bits.
    """
    if not _by_band(getattr(image, "tag_v2", {})):
        return False
    return len(image.getbands()) < 3 or (stated_bits(image) > 8 and not has_deep_color(image))


def stated_bits(image: Image.Image) -> int:
    """Return the bits per channel that a TIFF states; 16 for other formats."""
    return int(getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])


def stated_type(image: Image.Image) -> "np.dtype[Any] | None":
    """Return the integer type that a TIFF states for its only band; None for other images.

    PIL reads gray of 32 bits and of signed 16 bits as int32, and signed numbers of 8 bits as uint8.
    """
    tags, bits = getattr(image, "tag_v2", {}), stated_bits(image)
    kind = _KINDS.get(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0])
    gray = image.mode == "L" or image.mode.startswith("I")
    return np.dtype(f"{kind}{bits // 8}") if tags and gray and kind and bits in (8, 16, 32) else None


def stated_values(image: Image.Image) -> NDArray[Any]:
    """Return the pixels of a loaded image, (H, W) or (H, W, bands), in the number type that its file states."""
    values, kind = np.asarray(image), stated_type(image)
    return values if kind is None else values.astype(kind)


def deep_white_is_zero(image: Image.Image) -> bool:
    """Return whether zero is white in a loaded image of more than 8 bits.

    PIL inverts images of up to 8 bits when it loads them.
    """
    photometric = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    return photometric == _WHITE_IS_ZERO and image.mode[0] in "IF"


def inverted(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Return 2**bits - 1 - values: unsigned numbers in which zero is white become numbers in which zero is black.

    Raises:
        ValueError: for signed numbers and floats, which have no defined value of black.
    """
    if values.dtype.kind != "u":
        raise ValueError(
            f"white is zero in it (WhiteIsZero), but its {values.dtype.name} pixels have no highest value: store it "
            "with black as zero"
        )
    result: NDArray[Any] = values.dtype.type(2**bits - 1) - values
    return result


def orientation_of(image: Image.Image, data: bytes = b"") -> int:
    """Return the orientation in the EXIF data or XMP of an image, 1 ... 8; without one, 1: upright.

    `data` is the content of its file. With it, a PNG without EXIF data and XMP is not decoded: PIL would decode it to
    search for them.
    """
    if image.format == "PNG" and data and not any(each in data for each in _EXIF):
        return 1
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return a view of an array (H, W, ...), rotated and flipped upright by its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
