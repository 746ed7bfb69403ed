"""The properties of an image that matter before a run: whether it can be decoded, and what is unusual about it."""

import contextlib
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from moco.data.bands import NPY, is_array, needs_tifffile
from moco.data.decode import ImageError, decode_bytes, read_bytes
from moco.data.headers import Page, has_deep_color, largest_page, open_image, orientation_of, tiff_pages
from moco.data.pixel_format import RGB, PixelFormat, to_float
from moco.data.video import VideoSource

TINY, LONG, HUGE = 8, 10, 50_000_000  # limits: pixels of a side, ratio of the sides, pixels of an image

# Unusual properties that do not end a run, and how such an image is handled.
ODDITIES = {
    "16 bits": "scaled to 8 bits; data.bits gives the scale",
    "CMYK": "converted to RGB without its color profile; with data.channels=4, read as four bands",
    "palette": "converted to RGB",
    "transparent": "put on a white background; a band that a TIFF marks as alpha, such as infrared, counts as opacity",
    "extra band": "the bands after the color or gray channels are not used",
    "rotated by EXIF": "used upright",
    "white is zero": "inverted, so that black is zero",
    "several frames": "the first one is used; with other data.channels or data.dtype, pages of a TIFF are bands",
    "several sizes": "of its pages, the largest one is used",
    "rotated": "the frames of the video are used upright, as its metadata say",
    "oblong pixels": "the frames of the video are enlarged to square pixels, as its metadata say",
    "interlaced": "odd and even rows of a frame were recorded at different times; used as it is",
    "tiny": f"a side has fewer than {TINY} pixels: its crops are strongly enlarged",
    "long": f"one side is more than {LONG} times the other: its crops show only a part",
    "huge": f"more than {HUGE // 10**6} megapixels, decoded in every epoch: store a smaller copy",
    "misnamed": "the format of the content is not that of the name; the content decides",
    "name": "not ASCII: other tools may not support it",
}
_ARRAYS = {".npy": "NPY", ".npz": "NPZ"}
# Oddities that are reported only for files that are converted to 8-bit gray or RGB.
_CONVERTED = ("16 bits", "palette", "transparent", "extra band")
_SAME_FORMAT = {"MPO": "JPEG"}  # a JPEG that contains a second image, as phones write it


class Moments(NamedTuple):
    """Number, mean (C,) and sum of squared differences from the mean (C,) of the pixels of each channel."""

    pixels: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def joined(self, other: "Moments") -> "Moments":
        """Return the moments of the two sets of pixels taken together (Chan et al., 1979)."""
        count, difference = self.pixels + other.pixels, other.mean - self.mean
        mean = self.mean + difference * (other.pixels / count)
        return Moments(count, mean, self.squares + other.squares + difference**2 * (self.pixels * other.pixels / count))

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviation of each channel, (C,)."""
        std: NDArray[np.float64] = np.sqrt(self.squares / self.pixels)
        return std


@dataclass(frozen=True)
class ImageFacts:
    """The properties of one image; an unreadable one has only `fault` and `reason`."""

    length: int = 0  # bytes of the file; for a video, its first frame has the bytes of the file, the others 0
    digest: bytes = b""  # 16 bytes of BLAKE2b of the content
    size: tuple[int, int] = (0, 0)  # width and height, upright
    format: str = ""  # for example "JPEG RGB"
    odd: tuple[str, ...] = ()  # keys of `ODDITIES`
    moments: "Moments | None" = None
    fault: str = ""  # a key of `moco.data.decode.FAULTS`
    reason: str = ""


def image_facts(path: str, pixel_format: PixelFormat = RGB, stats: bool = False) -> ImageFacts:
    """Read and decode one file as training does, and return its properties; with `stats` also its moments."""
    try:
        data = read_bytes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's warnings: the relevant ones are among the facts
            pixels = decode_bytes(path, data, pixel_format)
            form, odd = _header(data, pixel_format)
    except ImageError as error:
        return ImageFacts(fault=error.kind, reason=error.reason)
    ending = Path(path).suffix.lower()
    format_of_name = _ARRAYS.get(ending) or Image.registered_extensions().get(ending)
    content = form.split()[0]
    found = odd | _oddities(pixels, path) | {"misnamed": format_of_name != _SAME_FORMAT.get(content, content)}
    return _facts(pixels, data, len(data), form, found, stats)


def frame_facts(source: VideoSource, i: int, stats: bool = False) -> ImageFacts:
    """Decode a frame of a video as training does, and return its properties; with `stats` also its moments."""
    try:
        frame, pixels = source.frame(i), source.image(i)
    except ImageError as error:
        return ImageFacts(fault=error.kind, reason=error.reason)
    found = dict.fromkeys(frame.odd, True) | _oddities(pixels, source.file_of(i))
    length = source.bytes_if_first(i)
    return _facts(pixels, pixels.contiguous().numpy().tobytes(), length, frame.form, found, stats)


def _oddities(pixels: Tensor, path: str) -> dict[str, bool]:
    """Return the `ODDITIES` of the size of an image (C, H, W), and of the name of its file."""
    height, width = pixels.shape[1:]
    return {
        "tiny": min(width, height) < TINY,
        "long": max(width, height) > LONG * min(width, height),
        "huge": width * height > HUGE,
        "name": not Path(path).name.isascii(),
    }


def _facts(
    pixels: Tensor, content: bytes, length: int, form: str, found: Mapping[str, bool], stats: bool
) -> ImageFacts:
    """Return the properties of a readable image (C, H, W)."""
    height, width = pixels.shape[1:]
    digest = hashlib.blake2b(content, digest_size=16).digest()
    kinds = tuple(kind for kind in ODDITIES if found.get(kind))
    return ImageFacts(length, digest, (width, height), form, kinds, moments=moments_of(pixels) if stats else None)


def moments_of(image: Tensor) -> Moments:
    """Return the moments of the pixels of an image (C, H, W), in the range of `to_float`."""
    values = to_float(image).double().flatten(1).numpy()  # (C, H * W)
    mean = values.mean(axis=1)
    return Moments(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(axis=1))


def _header(data: bytes, pixel_format: PixelFormat) -> tuple[str, dict[str, bool]]:
    """Return format and mode of a readable image, and the `ODDITIES` that its header shows."""
    if is_array(data):
        return f"{'NPY' if data.startswith(NPY) else 'NPZ'} {pixel_format}", {}
    pages = tiff_pages(data)
    try:
        form, odd = _pil_header(data, pages, pixel_format)
    except UnidentifiedImageError:  # a TIFF that tifffile reads
        form, odd = "TIFF", {}
    if form.startswith("TIFF") and not pixel_format.is_8bit_gray_or_rgb:
        form = f"TIFF {pixel_format}"  # PIL's mode shows one band or three
    if pages:
        page = pages[largest_page(pages)]
        odd["rotated by EXIF"] = page.orientation in range(2, 9)
        odd["white is zero"] = page.white_is_zero
        odd["several sizes"] = len({each.size for each in pages}) > 1
    return form, odd if pixel_format.is_8bit_gray_or_rgb else {kind: odd[kind] for kind in odd.keys() - set(_CONVERTED)}


def _pil_header(data: bytes, pages: list[Page], pixel_format: PixelFormat) -> tuple[str, dict[str, bool]]:
    with open_image(data) as image:
        deep = image.mode[0] in "IF" or has_deep_color(image)
        # Where tifffile reads a TIFF, the pages are bands, not frames.
        bands_in_pages = not pixel_format.is_8bit_gray_or_rgb and needs_tifffile(image, data, pixel_format.channels)
        frames, transparent = 2, False  # 2 stays if PIL cannot count the frames, because a later one is damaged
        with contextlib.suppress(Exception):
            frames = getattr(image, "n_frames", 1)
        if pages:
            frames = sum(each.size == image.size for each in pages)
        with contextlib.suppress(Exception):
            transparent = image.has_transparency_data
        bands = getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLESPERPIXEL, 0)
        return f"{image.format} {image.mode}", {
            "16 bits": deep,
            "CMYK": image.mode == "CMYK",
            "palette": image.mode in ("P", "PA") and image.format != "GIF",  # every GIF has a palette
            "transparent": transparent,
            "extra band": bands > len(image.getbands()),
            "rotated by EXIF": orientation_of(image, data) in range(2, 9),
            "several frames": image.format != "MPO" and frames > 1 and not bands_in_pages,
        }
