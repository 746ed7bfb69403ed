"""Parts of the losses: similarities in full precision, a cross entropy over positives, and checks of arguments.

Legend: N anchors (queries), M candidates, C dimension, E candidates of one anchor.
"""

import math

import torch
import torch.nn.functional as F
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
    """Return the inner product of each row with its partner, as `similarity`: (N, C), (N, C) -> (N, 1)."""
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = full_precision(anchors)
        return (anchors * partners.to(anchors.dtype)).sum(dim=1, keepdim=True)


def mean_over_positives(logits: Tensor, positive: Tensor) -> Tensor:
    """Compute the cross entropy with any number of positives: L_out of SupCon (Khosla et al., 2020), Eq. 2.

    The loss of an anchor is the mean over its positives p of -log(exp(logits_p) / sum over candidates of exp(logits)).
    The result is the mean over the anchors that have a positive, shape (); 0 without any.

    Args:
        logits: shape (N, M); -inf for an excluded candidate. Each row has a candidate.
        positive: boolean, shape (N, M), False where the logit is -inf.
    """
    log_p = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)  # a product would make 0 * -inf = nan
    count = positive.sum(dim=1)  # (N,)
    loss = -log_p.sum(dim=1) / count.clamp(min=1)  # (N,), 0 without a positive
    return loss.sum() / (count > 0).sum().clamp(min=1)


def check_temperature(temperature: Temperature) -> None:
    """Raise ValueError unless T is above 0 and finite. A tensor is not checked: the host would wait for its value."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be above 0 and finite")


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
