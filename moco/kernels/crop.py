"""Random resized crops of uint8 images on a GPU in two launches: rows, then columns, rounded in between, as in ATen.

The results are those of `moco.data.crop.resized_crops`, bit for bit: weights are integers times a power of two, so all
sums are exact.

Legend: N images, C channels, H x W pixels of an image, h x w of its box, S output size, K weights per output pixel, L
pixels of an axis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # pixels per program


@triton.jit
def _resize(
    source,
    boxes,
    firsts,
    taps,
    out,
    channels,
    source_plane,
    source_row,
    out_plane,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Resize one axis of each box to S pixels.

    Along the rows, from planes (H, W) to (H, S), of which the first h rows are written; along the columns, from (H, S)
    to (S, S).
    """
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    box = boxes + image * 4  # top, left, h, w
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    y, x = at // SIZE, at % SIZE
    top, left, height, width = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    if ROWS:
        inside, length, pixel, step, start = y < height, width, x, 1, (top + y) * source_row + left
    else:
        inside, length, pixel, step, start = y < SIZE, height, y, source_row, x
    first = tl.load(firsts + length * SIZE + pixel, inside, 0)
    weights = taps + (length * SIZE + pixel) * TAPS
    start += (image * channels + channel) * source_plane + first * step
    # The sum starts from 0.5, because the conversion to uint8 truncates: so the result is rounded as in ATen.
    total = tl.full((BLOCK,), 0.5, taps.dtype.element_ty)
    for tap in range(TAPS):
        used = inside & (first + tap < length)  # unused taps at the border have no pixel
        total += tl.load(weights + tap, inside, 0.0) * tl.load(source + start + tap * step, used, 0).to(total.dtype)
    tl.store(out + (image * channels + channel) * out_plane + at, total.to(tl.uint8), inside)


def resized_crops(
    images: Tensor, boxes: Tensor, across: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], size: int
) -> Tensor:
    """Crop a box from each image and resize it, on the device.

    Args:
        images: uint8, (N, C, H, W).
        boxes: top, left, height, width in pixels, int64 (N, 4).
        across, down: two tables each, for the width and the height of boxes; row l is for a box of l pixels. The first,
            int64 (L + 1, S), holds the first source pixel of each output pixel. The second, (L + 1, S, K), holds the
            weights of this pixel and the next ones; all sums must be exact in its type.
        size: S.

    Returns:
        uint8, (N, C, S, S).
    """
    count, channels, height, _ = images.shape
    images = images.contiguous()
    rows = torch.empty(count, channels, height, size, dtype=torch.uint8, device=images.device)
    out = torch.empty(count, channels, size, size, dtype=torch.uint8, device=images.device)
    with torch.cuda.device_of(images):
        for source, (first, taps), to, is_row in ((images, across, rows, True), (rows, down, out, False)):
            blocks = triton.cdiv(to.shape[2] * size, _BLOCK)
            _resize[(count, channels, blocks)](
                source, boxes, first, taps, to, channels,
                source.shape[2] * source.shape[3], source.shape[3], to.shape[2] * size,
                size, taps.shape[2], is_row, _BLOCK,
            )  # fmt: skip
    return out
