"""Parts of the losses: similarities in full precision, and checks of arguments.

Legend: N anchors (queries), M candidates, C dimension, E candidates of one anchor.
"""

import math

import torch
from torch import Tensor

Temperature = float | Tensor  # a tensor of shape () if it is learned, see `LearnedTemperature`

ABSENT = float("-inf")  # the logit of an excluded candidate


def full_precision(x: Tensor) -> Tensor:
    """Convert half precision to float32. Call it before x is used twice, so that gradients are added in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return the inner products of (N, C) with (M, C), shape (N, M), or with (N, E, C) row by row, shape (N, E).

    Uses float32 (or float64) even under autocast: at temperature 0.07 a logit in bf16 has an error of up to 0.06.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = full_precision(anchors)
        candidates = candidates.to(anchors.dtype)
        if candidates.ndim == 3:
            return (candidates @ anchors[:, :, None]).squeeze(2)  # (N, E)
        return anchors @ candidates.T  # (N, M)


def paired_similarity(anchors: Tensor, partners: Tensor) -> Tensor:
    """Return the inner product of each anchor with the partner in the same row: (N, C), (N, C) -> (N, 1).

    The precision is that of `similarity`.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = full_precision(anchors)
        return (anchors * partners.to(anchors.dtype)).sum(dim=1, keepdim=True)


def check_temperature(temperature: Temperature, name: str = "temperature") -> None:
    """Raise ValueError unless T is above 0 and finite. A tensor is not checked: the host would wait for its value."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"{name}={temperature} must be above 0 and finite")


def check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Raise ValueError unless each tensor has its shape, such as "NC": each letter is one size, at least 1."""
    sizes: dict[str, int] = {}
    for tensor, shape in tensors.values():
        lengths = zip(shape, tensor.shape, strict=False)
        if tensor.ndim != len(shape) or any(not 0 < n == sizes.setdefault(letter, n) for letter, n in lengths):
            found = ", ".join(f"{name} {tuple(each.shape)}" for name, (each, _) in tensors.items())
            expected = ", ".join(f"({', '.join(each)})" for _, each in tensors.values())
            raise ValueError(f"{found} must have the shapes {expected}, each size at least 1")


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold real floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be floating-point")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the mask is None, or boolean with the given shape or one row for all."""
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in (shape, (1, shape[1]))):
        raise ValueError(
            f"{name} is {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}; "
            f"it must be bool of shape {shape} or {(1, shape[1])}"
        )
