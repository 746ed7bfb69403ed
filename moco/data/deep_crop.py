"""Cropping and resizing of images that are deeper than 8 bits: uint16 and float32.

ATen resizes them in float32, whose sums depend on the device and on the batch. Here each output pixel is a weighted sum
in float64 whose terms are added one after the other, in the order of the input pixels. So a crop has the same bits
alone or in a batch, on any device, and a crop that is not resized keeps the bits of the image. Values of uint16 images
are rounded once, at the end.

Legend: N samples, n of them in a part, C channels, H x W image, S output size, K weights (taps) per output pixel.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.distributed import copy_to_device

Taps = Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]]  # `antialiased_taps` or `plain_taps`
# Largest number of tensor elements in a part of a batch, to bound memory. On a CPU, a part also fits into the cache.
_PART_CPU, _PART_ELSEWHERE = 2**21, 2**26


def is_deep(images: Tensor) -> bool:
    """Return whether images are uint16 or float32, so that this module resizes them."""
    return images.dtype != torch.uint8


def samples_per_part(images: Tensor, size: int) -> int:
    """Return how many of the images (N, C, H, W) to crop to S x S at once."""
    _, channels, height, width = images.shape
    largest = channels * max(height, size) * max(width, size)
    return max(1, (_PART_CPU if images.device.type == "cpu" else _PART_ELSEWHERE) // largest)


def resized_deep_crops(images: Tensor, boxes: NDArray[np.int64], size: int, taps: Taps) -> Tensor:
    """Crop a box from each image and resize it to S x S, as `moco.data.crop.resized_crops` does with uint8.

    Args:
        images: uint16 or float32, shape (N, C, H, W), on any device with float64.
        boxes: top, left, height, width in pixels, shape (N, 4), on the host.
        size: S.
        taps: the function that returns the weights of the interpolation.

    Returns:
        Shape (N, C, S, S), of the type and on the device of the images.
    """
    count, channels = images.shape[:2]
    out = torch.empty(count, channels, size, size, dtype=images.dtype, device=images.device)
    part = samples_per_part(images, size)
    for start in range(0, count, part):
        rows = slice(start, start + part)
        top, left, box_h, box_w = boxes[rows].T
        across = _indices_and_weights(left, box_w, size, taps, images.device)
        down = _indices_and_weights(top, box_h, size, taps, images.device)
        out[rows] = _rounded(_resized(images[rows], down, across), images.dtype)
    return out


def resized_deep_center(image: Tensor, shape: tuple[int, int], size: int, taps: Taps) -> Tensor:
    """Resize an image (C, H, W) to `shape` and return its center, (C, S, S); only the center is computed."""
    down, across = (
        _center_weights(length, resized, size, taps) for length, resized in zip(image.shape[1:], shape, strict=True)
    )
    return _rounded(_resized(image[None], down, across), image.dtype)[0]


def resized_deep(image: Tensor, shape: tuple[int, int], taps: Taps) -> Tensor:
    """Resize an image (C, H, W) to `shape`, (C, *shape)."""
    down, across = (
        _indices_and_weights(np.zeros(1, np.int64), np.array([length]), size, taps, image.device)
        for length, size in zip(image.shape[1:], shape, strict=True)
    )
    return _rounded(_resized(image[None], down, across), image.dtype)[0]


def _center_weights(length: int, resized: int, size: int, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return indices and weights (1, S, K) of the central pixels of an axis that is resized."""
    outputs = round((resized - size) / 2) + np.arange(size)
    first, weights = (each[0] for each in taps(np.array([[float(length)]]), resized, outputs))  # (S,), (S, K)
    indices = np.minimum(first.astype(np.int64)[:, None] + np.arange(weights.shape[1]), length - 1)
    return torch.from_numpy(indices)[None], torch.from_numpy(weights)[None]


def _indices_and_weights(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], size: int, taps: Taps, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the pixels of an axis on which each output pixel depends, int64 (n, S, K), and their weights (n, S, K)."""
    found = [_taps_of(int(length), size, taps) for length in lengths]
    most = max(weights.shape[1] for _, weights in found)
    indices = np.zeros((len(found), size, most), np.int64)
    padded = np.zeros((len(found), size, most))  # a weight of 0 changes no sum
    for row, (start, (first, weights)) in enumerate(zip(starts, found, strict=True)):
        used = weights.shape[1]
        last = start + lengths[row] - 1
        indices[row, :, :used] = np.minimum(start + first[:, None] + np.arange(used), last)
        padded[row, :, :used] = weights
    return copy_to_device(torch.from_numpy(indices), device), copy_to_device(torch.from_numpy(padded), device)


@functools.lru_cache(maxsize=4096)
def _taps_of(length: int, size: int, taps: Taps) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first pixel (S,) and the weights (S, K) of each output pixel, for an axis of `length` pixels.

    Each length is computed alone, so that K does not depend on the batch.
    """
    first, weights = taps(np.array([[float(length)]]), size)
    return first[0].astype(np.int64), weights[0]


def _resized(images: Tensor, down: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor]) -> Tensor:
    """Resize images (n, C, H, W), vertically first, to float64 (n, C, S, S).

    The resized axis is always the second one, so that `_weighted_sum` reads contiguous rows.
    """
    count, channels, height, width = images.shape
    x = images.permute(0, 2, 1, 3).to(torch.float64).reshape(count, height, channels * width)
    x = _weighted_sum(x, *down).view(count, -1, channels, width)  # (n, S, C, W)
    x = x.permute(0, 3, 1, 2).reshape(count, width, -1)  # (n, W, S * C)
    x = _weighted_sum(x, *across)  # (n, S, S * C)
    return x.view(count, x.shape[1], -1, channels).permute(0, 3, 2, 1)


def _weighted_sum(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return S weighted sums of K of the L rows of x: x (n, L, R), indices and weights (n, S, K) -> (n, S, R)."""
    samples = torch.arange(len(x), device=x.device)[:, None]
    total = x.new_zeros(len(x), indices.shape[1], x.shape[2])
    for tap in range(indices.shape[2]):
        total.add_(x[samples, indices[:, :, tap]].mul_(weights[:, :, tap, None]))
    return total


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.add_(0.5).floor_() if dtype == torch.uint16 else values).to(dtype)
