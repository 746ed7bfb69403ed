"""The significant bits of images that store 16 bits per channel: cameras and scanners fill 10, 12 or 14 of them.

One depth for all images of a data set, because a depth for each image would remove differences in brightness between
them: a dark image would be stretched, a bright one not. It is found in a sample that depends on the images only. An
image that exceeds it is an error, never saturated.

The files' own statements are not used. By PNG's standard the values are stretched to 16 bits whatever its chunk sBIT
says, and TIFF's MaxSampleValue is the highest value of the one image; neither gives one scale. Only a TIFF with fewer
than 16 BitsPerSample has its own scale.
"""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from moco.config import DataConfig, RunWarning
from moco.data.base import Source, Sources
from moco.data.decode import ImageError, highest_value
from moco.distributed import is_rank_zero

DEPTHS = (8, 10, 12, 14, 16)
SAMPLE = 32  # images in which the depth is looked for, at equal distances


def with_bits(sources: Sources, config: DataConfig) -> Sources:
    """Set the significant bits of all splits: `config.bits`, or those of the training images; warn if fewer than 16."""
    bits = config.bits
    if bits is None:
        highest = _highest_value(sources.train)
        bits = next((depth for depth in DEPTHS if highest < 2**depth), 16) if highest else 16
        if bits < 16 and is_rank_zero():
            warnings.warn(
                f"data.root={config.root}: the images of 16 bits have values up to {highest:,}, so 0 ... "
                f"{2**bits - 1:,} becomes black ... white (data.bits={bits}); for another scale set data.bits",
                RunWarning,
                stacklevel=2,
            )
    if bits == 16:
        return sources
    changed: dict[int, Any] = {}  # by identity, because train may be the bank as well
    for name in ("train", "bank", "held_out"):
        source: Any = getattr(sources, name)
        # A source of images in memory has no bits, nor has one that always decodes 8 bits.
        if source is not None and source.images is None and "bits" in getattr(source, "__dataclass_fields__", {}):
            changed.setdefault(id(source), replace(source, bits=bits))
            sources = replace(sources, **{name: changed[id(source)]})
    return sources


def _highest_value(source: Source) -> int:
    """Return the highest value of the images of 16 bits in a sample; 0 if there are none."""
    if source.images is not None or source.stream is not None:
        return 0
    highest = 0
    for i in np.unique(np.linspace(0, len(source) - 1, SAMPLE).round().astype(np.int64)).tolist():
        try:
            content = source.content(i)
        except ImageError:
            continue
        highest = max(highest, highest_value(content) if content else 0)
    return highest
