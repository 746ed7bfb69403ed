"""Parts of the losses: similarities in full precision, and a cross entropy averaged over positives.

Legend: N anchors (queries), M candidates, C dimension, E candidates of one anchor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor  # a tensor of shape () if it is learned, see `LearnedTemperature`

ABSENT = float("-inf")  # the logit of an excluded candidate


def full_precision(x: Tensor) -> Tensor:
    """Convert half precision to float32. Convert x before using it twice, so that its gradients add up in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return the inner products of (N, C) with (M, C), shape (N, M), or with each anchor's own (N, E, C), shape (N, E).

    Computed in float32 (or float64) even under autocast: at temperature 0.07 the logit of a bf16 similarity has an
    error of up to 0.06.
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

    For each anchor the mean over its positives p of -log(exp(logits_p) / sum over all candidates of exp(logits)). The
    mean over anchors excludes those without a positive.

    Args:
        logits: shape (N, M); -inf for an excluded candidate, never for all of a row.
        positive: boolean, shape (N, M), False where the logit is -inf.

    Returns:
        Shape (); 0 if no anchor has a positive.
    """
    log_p = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)  # a product would make 0 * -inf = nan
    count = positive.sum(dim=1)  # (N,)
    loss = -log_p.sum(dim=1) / count.clamp(min=1)  # (N,), 0 without a positive
    return loss.sum() / (count > 0).sum().clamp(min=1)


def check_temperature(temperature: Temperature) -> None:
    """Raise ValueError unless the temperature is above 0.

    Tensors are not checked: the host would wait for the device, and `LearnedTemperature` has bounds.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the mask is None, or boolean with the given shape or one row for all."""
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in (shape, (1, shape[1]))):
        raise ValueError(
            f"{name} is {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}; "
            f"it must be bool of shape {shape} or {(1, shape[1])}"
        )
