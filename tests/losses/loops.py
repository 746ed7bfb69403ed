"""What the loss tests share: unit vectors, and the losses as loops over python floats."""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

Vector = list[float]


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors of the given shape, the last number of which is C."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def coins(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    """A random boolean mask, True for about the given share."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(logits: list[float], positives: Collection[int]) -> float:
    """Mean over the positives of -log softmax: one row of SupCon's Eq. 2."""
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits))
    return sum(log_sum - logits[p] for p in positives) / len(positives)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
