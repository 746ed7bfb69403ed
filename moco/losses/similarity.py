"""What the losses are made of: similarities in full precision, and a cross entropy averaged over positives.

Legend: N anchors (queries), M candidates, C dimension, E candidates of each anchor alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor  # a tensor of shape () where it is learned, see `LearnedTemperature`

ABSENT = float("-inf")  # the logit of a candidate that takes no part


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32. Whoever uses x twice converts it first, so that its gradients add up in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Inner products in float32 (or float64) whatever autocast says.

    At temperature 0.07 a bf16 similarity is off by up to 0.06 in the logit.

    Args:
        anchors: shape (N, C).
        candidates: shape (M, C), shared by all anchors, or (N, E, C), each anchor's own.

    Returns:
        Shape (N, M) or (N, E).
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = full_precision(anchors)
        candidates = candidates.to(anchors.dtype)
        if candidates.ndim == 3:
            return (candidates @ anchors[:, :, None]).squeeze(2)  # (N, E)
        return anchors @ candidates.T  # (N, M)


def paired_similarity(anchors: Tensor, partners: Tensor) -> Tensor:
    """Inner product of each row with its partner, as `similarity`: (N, C), (N, C) -> (N, 1)."""
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = full_precision(anchors)
        return (anchors * partners.to(anchors.dtype)).sum(dim=1, keepdim=True)


def mean_over_positives(logits: Tensor, positive: Tensor) -> Tensor:
    """The cross entropy with any number of positives: L_out of SupCon (Khosla et al., 2020), Eq. 2.

    For each anchor the mean over its positives p of -log(exp(logits_p) / sum over all candidates of exp(logits)).
    An anchor without a positive has no term and is left out of the mean over anchors.

    Args:
        logits: shape (N, M); -inf for a candidate that takes no part, which is never all of a row.
        positive: boolean, shape (N, M), nowhere True where the logit is -inf.

    Returns:
        Shape (); 0 if no anchor has a positive.
    """
    log_p = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)  # a product would make 0 * -inf = nan
    count = positive.sum(dim=1)  # (N,)
    loss = -log_p.sum(dim=1) / count.clamp(min=1)  # (N,), 0 without a positive
    return loss.sum() / (count > 0).sum().clamp(min=1)


def check_temperature(temperature: Temperature) -> None:
    """Raises a ValueError unless the temperature is above 0.

    A tensor is not looked at: the host would wait for the device, and `LearnedTemperature` has bounds.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises a ValueError unless the mask is None, or boolean and of the given shape or with one row for all."""
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in (shape, (1, shape[1]))):
        raise ValueError(
            f"{name} is {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}; "
            f"it must be bool of shape {shape} or {(1, shape[1])}"
        )
