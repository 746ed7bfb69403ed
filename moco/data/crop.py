"""Stage 1 of a view: the random resized crop, uint8 in, uint8 out. Stage 2 is `moco.data.augment`.

Two routes return the same bits. The streamed route crops and resizes single images, read in a loader process, with ATen
(`resized_crop`). The resident route crops a batch of images in memory, on its device, by two matrix products per sample
(`resized_crops`), with the integer weights that ATen uses for uint8. So the key (seed, epoch, sample index, stream) of
the random numbers (see `moco.data.keyed`) determines a view on either route.

Both routes scale a crop down in one of two ways. With antialiasing, an output pixel is the weighted mean of all input
pixels that it covers. Without antialiasing, an output pixel is interpolated between the two nearest input pixels along
each axis. When a crop is enlarged, both ways agree. Pixels outside the box of the crop have no influence.

Images deeper than 8 bits take the same two routes, through `moco.data.deep_crop`.

Legend: N samples, n of them in a part, C channels, H x W image, S output size, K weights (taps) per output pixel,
L pixels of an axis, T = TRIES, D = CROP_DRAWS.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moco.data.deep_crop import (
    Taps,
    is_deep,
    resized_deep,
    resized_deep_center,
    resized_deep_crops,
    samples_per_part,
)
from moco.distributed import copy_to_device
from moco.kernels import fused

TRIES = 10  # area and ratio are drawn at most this often before the central fallback, as in torchvision
CROP_DRAWS = 2 * TRIES + 2  # uniform numbers per crop: T for the area, T for the log ratio, 1 for top, 1 for left

_LARGEST_TABLE = 2**24  # numbers in a table of weights; for larger images, each crop is resized alone
_LARGEST_RESIZED = 2**24  # pixels of an image that is resized as a whole before its center is cut out


def crop_boxes(
    uniforms: NDArray[np.float32],
    heights: ArrayLike,
    widths: ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int64]:
    """Draw the boxes of random resized crops: torchvision's `RandomResizedCrop.make_params`, for a batch.

    T pairs of area and log aspect ratio are drawn. The first box that fits into the image is placed uniformly. If none
    fits, the box is the largest central one within the limits of the ratio.

    Args:
        uniforms: numbers in [0, 1), shape (N, D), in the order that `CROP_DRAWS` describes.
        heights, widths: of the images in pixels, shape (N,) or a scalar.
        scale: lowest and highest area, as a fraction of the image's.
        ratio: lowest and highest width / height.

    Returns:
        Top, left, height, width in pixels, shape (N, 4).

    Raises:
        ValueError: if `uniforms` is not (N, D).
    """
    if uniforms.ndim != 2 or uniforms.shape[1] != CROP_DRAWS:
        raise ValueError(f"uniforms has shape {uniforms.shape}; pass (N, {CROP_DRAWS}), as draw_crop returns")
    draws = uniforms.astype(np.float64)
    count = len(draws)
    height = np.broadcast_to(np.asarray(heights, dtype=np.int64), count)  # (N,)
    width = np.broadcast_to(np.asarray(widths, dtype=np.int64), count)  # (N,)

    area = (height * width)[:, None] * (scale[0] + draws[:, :TRIES] * (scale[1] - scale[0]))  # (N, T)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + draws[:, TRIES : 2 * TRIES] * (high - low))  # (N, T)
    tried_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)  # (N, T); rint rounds half to even, as Python does
    tried_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)  # (N, T)
    fits = (tried_w > 0) & (tried_w <= width[:, None]) & (tried_h > 0) & (tried_h <= height[:, None])  # (N, T)
    first = (np.arange(count), fits.argmax(axis=1))

    # The fallback: the full image, narrowed along the side that breaks the ratio.
    wide, tall = width / height > max(ratio), width / height < min(ratio)
    fallback_w = np.where(wide, np.rint(height * max(ratio)).astype(np.int64), width)
    fallback_h = np.where(tall, np.rint(width / min(ratio)).astype(np.int64), height)

    found = fits.any(axis=1)
    box_h = np.where(found, tried_h[first], fallback_h)
    box_w = np.where(found, tried_w[first], fallback_w)
    # floor(u * (room + 1)) is uniform over 0 ... room, inclusive.
    top = np.where(found, (draws[:, -2] * (height - box_h + 1)).astype(np.int64), (height - box_h) // 2)
    left = np.where(found, (draws[:, -1] * (width - box_w + 1)).astype(np.int64), (width - box_w) // 2)
    return np.stack([top, left, box_h, box_w], axis=1)


def resized_crop(image: Tensor, box: ArrayLike, size: int, antialias: bool = True) -> Tensor:
    """Crop one box (top, left, height, width) from an image (C, H, W) on the CPU and resize it to (C, S, S).

    This is the streamed route. It calls ATen directly: torchvision's `resized_crop` makes the same call on CPUs with
    AVX2 (or ARM). On other CPUs torchvision rounds a float result, which differs by up to one level, so views would
    depend on the machine.
    """
    top, left, height, width = (int(value) for value in np.asarray(box))
    window = image[None, :, top : top + height, left : left + width]
    if is_deep(image):
        return resized_deep_crops(window, np.array([[0, 0, height, width]]), size, _taps(antialias))[0]
    return F.interpolate(window, size=(size, size), mode="bilinear", antialias=antialias)[0]


def shrunk_box(box: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    """Convert a box of the full image to the image that was decoded at 1 / factor of its size.

    Both boxes are (top, left, height, width) in pixels of their image; height and width must be at least `factor`.
    Edges are rounded to whole pixels. The error is at most half a pixel of the view if the returned box has at least S
    pixels per side.
    """
    start, stop = ((edge + factor // 2) // factor for edge in (box[:2], box[:2] + box[2:]))
    return np.concatenate([start, stop - start])


def resized_crops(images: Tensor, boxes: NDArray[np.int64], size: int, antialias: bool = True) -> Tensor:
    """Crop a box from each image and resize it: the resident route, equal to `resized_crop` bit for bit.

    Each axis is resized by one matrix product with the sample's own weights. As in ATen, the horizontal axis comes
    first, and its result is rounded to integers before the vertical axis follows. Weights are ATen's integers times a
    power of two and pixels are integers, so all sums are exact, in any order, on any device, unless the products are
    reduced to TF32 or bfloat16 (see `_exact_dtype`).

    Args:
        images: uint8, uint16 or float32, shape (N, C, H, W), on any device with float64.
        boxes: top, left, height, width in pixels, shape (N, 4), on the host.
        size: S.
        antialias: as in `resized_crop`.

    Returns:
        Shape (N, C, S, S), of the type and on the device of the images.
    """
    if is_deep(images):
        return resized_deep_crops(images, boxes, size, _taps(antialias))
    count, channels, height, width = images.shape
    device = images.device
    extent = max(height, width)
    if extent * size * (2 * extent // size + 3 if antialias else 2) > _LARGEST_TABLE:
        crops = (resized_crop(image.cpu(), box, size, antialias) for image, box in zip(images, boxes, strict=True))
        return torch.stack(list(crops)).to(device)
    dtype = _exact_dtype(device, extent, size, antialias)
    where = copy_to_device(torch.from_numpy(boxes), device)  # (N, 4)
    if fused(device):
        from moco.kernels import crop as kernels

        across = _tap_table(width, size, antialias, device, dtype)
        down = _tap_table(height, size, antialias, device, dtype)
        return kernels.resized_crops(images, where, across, down, size)
    out = torch.empty(count, channels, size, size, dtype=torch.uint8, device=device)
    part = samples_per_part(images, size)
    for start in range(0, count, part):
        rows = slice(start, start + part)
        top, left, box_h, box_w = where[rows].unbind(1)
        by_column = _weights(left, box_w, width, size, antialias, dtype).transpose(1, 2)  # (n, W, S)
        by_row = _weights(top, box_h, height, size, antialias, dtype)  # (n, S, H)
        n = len(top)
        # Rows come before channels, so that both products are plain batched ones.
        pixels = images[rows].permute(0, 2, 1, 3).to(dtype)  # (n, H, C, W)
        with torch.autocast(device.type, enabled=False):  # autocast would compute the products in bfloat16
            pixels = pixels.reshape(n, height * channels, width).bmm(by_column)  # (n, H*C, S)
            pixels = pixels.add_(0.5).floor_().view(n, height, channels * size)  # (n, H, C*S)
            pixels = by_row.bmm(pixels).add_(0.5).view(n, size, channels, size)  # (n, S, C, S)
        out[rows] = pixels.permute(0, 2, 1, 3)  # the conversion truncates: with the 0.5, it rounds as ATen does
    return out


def resized(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize an image (C, H, W) on the CPU to a height and width, with antialiasing: (C, *shape)."""
    if is_deep(image):
        return resized_deep(image, shape, antialiased_taps)
    return F.interpolate(image[None], size=shape, mode="bilinear", antialias=True)[0]


def resize_center_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Make the evaluation view of an image (C, H, W) on the CPU: (C, S, S). For uint8, torchvision gives the same.

    The shorter side is resized to `resize` pixels, and the central square of `size` pixels is cut out.

    Raises:
        ValueError: if `size` exceeds `resize`.
    """
    if size > resize:
        raise ValueError(f"size={size} exceeds resize={resize}, the shorter side before the crop: lower size")
    height, width = image.shape[-2:]
    if min(height, width) != resize:
        shorter = min(height, width)
        height, width = (resize * height // shorter, resize * width // shorter)
        if is_deep(image):
            return resized_deep_center(image, (height, width), size, antialiased_taps)
        if shorter < resize and height * width > _LARGEST_RESIZED:
            return _enlarged_center(image, (height, width), size)
        image = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
    top, left = _center(height, size), _center(width, size)
    return image[:, top : top + size, left : left + size]


def _taps(antialias: bool) -> Taps:
    return antialiased_taps if antialias else plain_taps


def _center(length: int, size: int) -> int:
    return round((length - size) / 2)  # rounds half to even, as in torchvision


def _enlarged_center(image: Tensor, shape: tuple[int, int], size: int) -> Tensor:
    """Return the center (C, S, S) of an image enlarged to `shape`. To save memory, only the center is computed.

    The result equals `F.interpolate` and a crop, bit for bit: the weights and the order of axes are those of
    `resized_crops`.
    """
    rows, down = _center_weights(image.shape[1], shape[0], size)  # (S, h)
    columns, across = _center_weights(image.shape[2], shape[1], size)  # (S, w)
    pixels = image[:, rows, columns].double() @ across.T  # (C, h, S)
    return (down @ pixels.add_(0.5).floor_()).add_(0.5).to(torch.uint8)


def _center_weights(length: int, resized: int, size: int) -> tuple[slice, Tensor]:
    """Return the n pixels of an axis on which the center of the enlarged axis depends: a slice, and weights (S, n)."""
    outputs = _center(resized, size) + np.arange(size)
    first, taps = (each[0] for each in antialiased_taps(np.array([[float(length)]]), resized, outputs))  # (S,), (S, K)
    start, stop = int(first[0]), min(int(first[-1]) + taps.shape[1], length)
    weights = np.zeros((size, stop - start + taps.shape[1]))  # the last K columns hold unused taps
    columns = (first - start).astype(np.int64)[:, None] + np.arange(taps.shape[1])
    np.put_along_axis(weights, columns, _quantized(taps, np.ones(())), axis=1)  # 1: the largest weight of the axis
    return slice(start, stop), torch.from_numpy(weights[:, : stop - start])


def _exact_dtype(device: torch.device, extent: int, size: int, antialias: bool) -> torch.dtype:
    """Return the number type in which the sums of `resized_crops` are exact.

    A sum is at most 255 * 2**precision, so float32's 24 bits suffice for a precision of up to 16. With antialiasing,
    the precision is at most 16 if a side is reduced by a factor of at most 2. Without antialiasing, it is at most 15,
    because the larger of two weights is at least 1/2. On a CPU, float32 is about 3 times as fast as float64. On other
    devices float64 is hardly slower at this size, and TF32 settings do not affect it.
    """
    full_precision = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    fits = extent <= 2 * size or not antialias
    return torch.float32 if device.type == "cpu" and full_precision and fits else torch.float64


def _weights(start: Tensor, length: Tensor, extent: int, size: int, antialias: bool, dtype: torch.dtype) -> Tensor:
    """Return the weight matrices that resize `length` pixels from `start` on, both int64 (n,), to `size`.

    Shape (n, S, L), L = `extent`, on the device of `start`; each row sums to about 1.
    """
    first, taps = _tap_table(extent, size, antialias, start.device, dtype)  # (L + 1, S), (L + 1, S, K)
    width = taps.shape[-1]
    columns = (first[length] + start[:, None])[:, :, None] + torch.arange(width, device=start.device)  # (n, S, K)
    # K additional columns hold the unused taps at the right border of the image.
    weights = torch.zeros(len(start), size, extent + width, dtype=dtype, device=start.device)
    return weights.scatter_(2, columns, taps[length])[:, :, :extent]


@functools.lru_cache(maxsize=16)
def _tap_table(
    extent: int, size: int, antialias: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ATen's bilinear weights for uint8, for every length up to `extent`.

    Follows `compute_index_ranges_int16_weights` in aten/src/ATen/native/cpu/UpSampleKernel.cpp: weights in float64,
    rounded to multiples of 2**-precision, where precision is the largest for which the axis's largest weight
    fits in an int16.

    Returns the first pixel of each output pixel, int64 (L + 1, S), and its weights (L + 1, S, K). Row 0 is unused.
    """
    lengths = np.arange(1, extent + 1, dtype=np.float64)[:, None]  # (L, 1)
    first, taps = _taps(antialias)(lengths, size)  # (L, S), (L, S, K)
    taps = _quantized(taps, taps.max(axis=(1, 2)))

    first = np.concatenate([np.zeros((1, size)), first]).astype(np.int64)
    taps = np.concatenate([np.zeros((1, *taps.shape[1:])), taps])
    return torch.from_numpy(first).to(device), torch.from_numpy(taps).to(device, dtype)


def _quantized(taps: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round weights (..., S, K) as ATen does, with precisions up to 22; `largest` (...) is the maximum of each axis."""
    too_large = np.trunc(0.5 + largest[..., None] * 2.0 ** np.arange(1, 23)) >= 2**15  # (..., 22)
    precision = np.where(too_large.any(axis=-1), too_large.argmax(axis=-1), 22)  # (...)
    step = 2.0 ** -precision.astype(np.float64)[..., None, None]
    rounded: NDArray[np.float64] = np.trunc(0.5 + taps / step) * step
    return rounded


def antialiased_taps(
    lengths: NDArray[np.float64], size: int, outputs: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of antialiased bilinear interpolation: a triangle over the input pixels around each center.

    `lengths`, shape (M, 1), are numbers of pixels to resize to S = `size`. Returns the first pixel of each output
    pixel, shape (M, S), and its weights, shape (M, S, K), which sum to 1. With `outputs`, only these output pixels
    are computed. The triangle reaches to each side as far as one output pixel is wide, but at least one input pixel.
    """
    scale = lengths / size  # input pixels per output pixel
    support = np.maximum(scale, 1.0)
    center = scale * ((np.arange(size) if outputs is None else outputs) + 0.5)  # (M, S)
    first = np.maximum(np.trunc(center - support + 0.5), 0)  # (M, S)
    after = np.minimum(np.trunc(center + support + 0.5), lengths)  # (M, S)
    offsets = np.arange(int((after - first).max()))  # (K,)

    distance = np.abs((offsets + first[..., None] - center[..., None] + 0.5) * (1.0 / support)[..., None])  # (M, S, K)
    taps = np.where(offsets < (after - first)[..., None], np.maximum(1.0 - distance, 0.0), 0.0)
    taps /= taps.sum(axis=2, keepdims=True)
    return first, taps


def plain_taps(lengths: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of plain bilinear interpolation: the two pixels nearest to the output pixel's center.

    `lengths`, `size` and the result are as in `antialiased_taps`, with K = 2. A center beyond that of the first or last
    pixel uses only this pixel.
    """
    center = np.maximum(lengths / size * (np.arange(size) + 0.5) - 0.5, 0.0)  # (M, S)
    first = np.minimum(np.floor(center), lengths - 1)  # (M, S)
    second = np.where(first < lengths - 1, center - first, 0.0)  # (M, S), the second pixel's weight
    return first, np.stack([1.0 - second, second], axis=2)
