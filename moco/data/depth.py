"""The significant bits of images that store 16 bits per channel: cameras and scanners fill 10, 12 or 14 of them.

All images of a data set have one depth. A depth for each image would remove differences in brightness: a dark image
would be stretched, a bright one not. The depth follows from the highest value in a fixed sample of the images. An image
with a value that does not fit in this depth raises an error; it is never saturated.

Metadata in the files is not used, because it gives no common scale: by its standard, a PNG stores values stretched to
16 bits, even if its chunk sBIT states fewer, and TIFF's MaxSampleValue is the highest value of that image only. A TIFF
with fewer than 16 BitsPerSample is the exception: it has its own scale.
"""

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from moco.config import DataConfig, RunWarning
from moco.data.base import Source, Sources
from moco.data.decode import ImageError, highest_value
from moco.data.pixel_format import RGB, PixelFormat
from moco.distributed import is_rank_zero

DEPTHS = (8, 10, 12, 14, 16)
SAMPLE = 32  # number of images, evenly spaced, whose highest value gives the depth


def with_pixel_format(sources: Sources, config: DataConfig) -> Sources:
    """Set the channels, the type and the significant bits of all splits.

    The bits are `config.bits`, or else those of the training images: then a warning names them if they are fewer than
    16. They have no effect with data.dtype=uint16 or float32, which keep the values of the files.

    Raises:
        ValueError: if the source cannot give images of the configured channels and type.
    """
    bits = config.bits
    if bits is None and config.dtype != RGB.dtype:
        bits = 16
    if bits is None:
        highest = _highest_value(sources.train)
        bits = next((depth for depth in DEPTHS if highest < 2**depth), 16) if highest else 16
        if bits < 16 and is_rank_zero():
            warnings.warn(
                f"data.root={config.root}: the 16-bit images have values up to {highest:,}, so 0 is shown as "
                f"black and {2**bits - 1:,} as white (data.bits={bits}); for another scale set data.bits",
                RunWarning,
                stacklevel=2,
            )
    pixel_format = PixelFormat(config.channels, config.dtype, bits, tuple(config.preview))

    def formatted(source: Any) -> Any:
        if source.images is None and "pixel_format" in getattr(source, "__dataclass_fields__", {}):
            return replace(source, pixel_format=pixel_format)
        # A source with images in memory, or with a decoder of its own, has a fixed format.
        if (source.pixel_format.channels, source.pixel_format.dtype) != (config.channels, config.dtype):
            raise ValueError(
                f"data.channels={config.channels} and data.dtype={config.dtype} do not fit data.name={config.name}, "
                f"which has {source.pixel_format}: remove them"
            )
        return source

    return sources.changed(formatted)


def _highest_value(source: Source) -> int:
    """Return the highest value of the 16-bit images in a sample; 0 if there are none."""
    if source.images is not None or source.stream is not None:
        return 0
    highest = 0
    for i in np.unique(np.linspace(0, len(source) - 1, SAMPLE).round().astype(np.int64)).tolist():
        with contextlib.suppress(ImageError):
            highest = max(highest, highest_value(source.content(i) or b""))
    return highest
