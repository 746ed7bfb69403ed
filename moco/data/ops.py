"""Image operations on a batch, each with one parameter a sample.

Each equals its namesake in torchvision.transforms.v2.functional on float images to 1e-5. On uint8 images torchvision
turns the result of each operation into whole levels; with ours cut to whole levels too, they are at most one apart (in
contrast and saturation the gray image is cut as well, so there it holds up to a factor of 2).

All are built from operations that round once a number (multiply, add, minimum, floor, ...) and from exact sums, so the
result for a sample has the same bits whatever batch it is in, however many threads work, and wherever their shares end
(law 2). That rules out `lerp`, `addcmul` and `add(alpha=)`, which fuse in the vector loop but not in its tail, plain
float `mean`, whose order depends on the threads, and matrix products, whose order depends on the batch.

Legend: n samples, S x S pixels, values in 0 ... 1; a trailing underscore means in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the digits that torchvision uses


def grayscale(x: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 1, S, S)."""
    gray = x[:, 0:1] * _LUMA[0]
    gray.add_(x[:, 1:2] * _LUMA[1])
    return gray.add_(x[:, 2:3] * _LUMA[2])


def brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale toward black (below 1) or beyond (above 1). x (n, 3, S, S), factor (n,)."""
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


def hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by a fraction of the full circle, -0.5 ... 0.5. x (n, 3, S, S), shift (n,).

    HSV is used without its S and without cases. With low, high and chroma = high - low, the hue in sixths of the
    circle is +-(green + blue - red + high - 2 low) / chroma, negative where blue exceeds green: check it on each
    sixth. Back again, a channel is low + chroma * ramp(hue), each ramp rising and falling once around the circle.
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
    torch.sub(hue, 2, out=ramp).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
    torch.add(ramp, low, out=green)
    torch.sub(hue, 4, out=ramp).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)
    torch.add(ramp, low, out=blue)
    return x


def blur(x: Tensor, half_kernel: Tensor) -> Tensor:
    """Separable symmetric filter with one kernel a sample, borders reflected.

    A sum over shifted images: on a CPU it beats grouped convolution (which must prepare new weights each time) and the
    banded matrix product at 224 px, and unlike those its order of summation never varies.

    Args:
        x: shape (n, 3, S, S).
        half_kernel: weights of the taps at distance 0, 1, ..., r < S, shape (n, r + 1).

    Returns:
        A new tensor, shape (n, 3, S, S).
    """
    radius = half_kernel.shape[1] - 1
    weights = half_kernel.t().reshape(radius + 1, -1, 1, 1, 1)  # (r + 1, n, 1, 1, 1)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")  # (n, 3, S + 2r, S + 2r)
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
    """Invert the values from `threshold` on. x (n, 3, S, S); returns a new tensor."""
    return torch.where(x >= threshold, 1 - x, x)


def affine(x: Tensor, theta: Tensor) -> Tensor:
    """Bilinear affine map; what comes from outside the image is 0.

    Equal to torchvision's `affine(fill=None)`. Its `fill=0` multiplies by the coverage a second time, which darkens
    pixels that lie half outside; on a black border the two agree.

    Args:
        x: shape (n, 3, S, S).
        theta: output to input map, from centered pixels to units of half the image side, shape (n, 6).

    Returns:
        A new tensor, shape (n, 3, S, S).
    """
    size = x.shape[-1]
    axis = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2  # (S,)
    a, b, c, d, e, f = theta.view(-1, 6, 1, 1).unbind(1)  # each (n, 1, 1)
    across, down = axis.view(1, 1, size), axis.view(1, size, 1)
    # Written out, not as a matrix product: see the module's docstring.
    grid = torch.stack([a * across + b * down + c, d * across + e * down + f], dim=-1)  # (n, S, S, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _column(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to broadcast over a batch of images."""
    return values.view(-1, 1, 1, 1)
