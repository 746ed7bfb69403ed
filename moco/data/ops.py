"""Image operations on a batch, each with one parameter per sample.

Except for `channel_brightness_` and `channel_contrast_`, each equals its counterpart in
torchvision.transforms.v2.functional on float images to 1e-5. On uint8 images torchvision truncates the result of each
operation to integers; if the result here is truncated as well, the two results differ by at most one level. For
contrast and saturation this holds for factors up to 2, because torchvision truncates the gray image too.

The result for a sample has the same bits in any batch and with any number of threads. Therefore this module uses, apart
from `grid_sample`, only exact sums, and operations that round each number once (multiply, add, minimum, floor, ...). It
does not use `lerp`, `addcmul` and `add(alpha=)`, which torch fuses in the vector loop but not in the rest of the loop;
plain float `mean`, whose order depends on the threads; and matrix products, whose order depends on the batch.

Legend: n samples, C channels, S x S pixels, values in 0 ... 1; a trailing underscore means in place. Operations on
(n, 3, S, S) need red, green and blue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the digits that torchvision uses


def grayscale(x: Tensor) -> Tensor:
    """Convert (n, 3, S, S) to gray, (n, 1, S, S)."""
    gray = x[:, 0:1] * _LUMA[0]
    gray.add_(x[:, 1:2] * _LUMA[1])
    return gray.add_(x[:, 2:3] * _LUMA[2])


def brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale toward black (factor below 1) or away from it (above 1). x (n, 3, S, S), factor (n,)."""
    return x.mul_(_column(factor)).clamp_(0, 1)


def contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the sample's gray image. x (n, 3, S, S), factor (n,)."""
    # Values in 1 ... 2 are multiples of 2**-23 in float32, so this sum is exact in float64, in any order.
    total = grayscale(x).add_(1).sum(dim=(1, 2, 3), dtype=torch.float64)  # (n,)
    mean = total.div_(x.shape[-1] * x.shape[-2]).sub_(1).to(x.dtype)  # (n,)
    return x.mul_(_column(factor)).add_(_column(mean * (1 - factor))).clamp_(0, 1)


def saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the sample's gray image. x (n, 3, S, S), factor (n,)."""
    gray = grayscale(x).mul_(_column(1 - factor))
    return x.mul_(_column(factor)).add_(gray).clamp_(0, 1)


def channel_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale each channel, without a limit: bands have no common white. x (n, C, S, S), factor (n,) or (n, C)."""
    return x.mul_(_column(factor))


def channel_contrast_(x: Tensor, factor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Blend each channel with its own mean. x (n, C, S, S), factor (n,) or (n, C).

    `mean` and `std`, (1, C, 1, 1), are those of the data set, and serve only to make the sum exact: pixels are
    normalized with them and rounded to multiples of 2**-20, whose integer sum is exact in any order.
    """
    steps = ((x - mean) / std).mul_(2**20).round_().to(torch.int64)
    total = steps.sum(dim=(2, 3), keepdim=True).to(torch.float64)  # (n, C, 1, 1)
    own = total.div_(2**20 * x.shape[-1] * x.shape[-2]).to(x.dtype).mul_(std).add_(mean)
    return x.mul_(_column(factor)).add_(own * (1 - _column(factor)))


def hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by a fraction of the full circle, -0.5 ... 0.5. x (n, 3, S, S), shift (n,).

    HSV without S and without case distinctions: with low, high and chroma = high - low, the hue in sixths of the
    circle is +-(green + blue - red + high - 2 low) / chroma, negative where blue exceeds green. Back in RGB, a channel
    is low + chroma * ramp(hue), each ramp rising and falling once around the circle.
    """
    red, green, blue = x.unbind(1)  # (n, S, S)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    hue = torch.add(green, blue).sub_(red).add_(high).sub_(low).sub_(low)
    chroma = high.sub_(low)
    hue.div_(chroma.clamp(min=1e-20)).copysign_(green - blue)  # -3 ... 3; on a gray pixel 0 / 1e-20
    hue.add_((shift * 6).view(-1, 1, 1))  # -6 ... 6
    hue.sub_(torch.div(hue, 6).floor_().mul_(6))  # 0 ... 6
    ramp = torch.empty_like(hue)
    torch.sub(hue, 3, out=ramp).abs_().sub_(1).clamp_(0, 1).mul_(chroma)
    torch.add(ramp, low, out=red)
    for center, channel in ((2, green), (4, blue)):
        torch.sub(hue, center, out=ramp).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
        torch.add(ramp, low, out=channel)
    return x


def blur(x: Tensor, half_kernel: Tensor) -> Tensor:
    """Apply a separable symmetric filter with one kernel per sample; borders are reflected.

    A sum over shifted images is faster on a CPU than grouped convolution (which must prepare new weights each time) and
    than a banded matrix product at 224 px, and its order of summation is fixed.

    Args:
        x: shape (n, C, S, S); it is not changed.
        half_kernel: weights of the taps at distance 0, 1, ..., r < S, shape (n, r + 1).
    """
    radius = half_kernel.shape[1] - 1
    weights = half_kernel.t().reshape(radius + 1, -1, 1, 1, 1)  # (r + 1, n, 1, 1, 1)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")  # (n, C, S + 2r, S + 2r)
    for dim in (3, 2):
        length = x.shape[dim] - 2 * radius
        total = x.narrow(dim, radius, length) * weights[0]
        pair = torch.empty_like(total)
        for distance in range(1, radius + 1):
            before, after = x.narrow(dim, radius - distance, length), x.narrow(dim, radius + distance, length)
            total.add_(torch.add(before, after, out=pair).mul_(weights[distance]))
        x = total
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above `threshold`. x (n, C, S, S); returns a new tensor."""
    return torch.where(x >= threshold, 1 - x, x)


def affine(x: Tensor, theta: Tensor) -> Tensor:
    """Apply a bilinear affine map; pixels from outside the image are 0.

    Equal to torchvision's `affine(fill=None)`. With `fill=0`, torchvision multiplies by the coverage a second time,
    which darkens pixels that lie half outside. If the border of the image is black, both values of `fill` agree.

    Args:
        x: shape (n, C, S, S); it is not changed.
        theta: output to input map, from centered pixels to units of half the image side, shape (n, 6).
    """
    size = x.shape[-1]
    axis = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2  # (S,)
    a, b, c, d, e, f = theta.view(-1, 6, 1, 1).unbind(1)  # each (n, 1, 1)
    across, down = axis.view(1, 1, size), axis.view(1, size, 1)
    # Not a matrix product: see the module's docstring.
    grid = torch.stack([a * across + b * down + c, d * across + e * down + f], dim=-1)  # (n, S, S, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _column(values: Tensor) -> Tensor:
    """Reshape (n,) to (n, 1, 1, 1), or (n, C) to (n, C, 1, 1), to broadcast over a batch of images."""
    return values.view(len(values), -1, 1, 1)
