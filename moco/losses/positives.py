"""Cross entropies with several positives. Options: the mean inside the logarithm; no positives in the denominator.

Legend: N anchors, M candidates.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.similarity import ABSENT

PositivesMean = Literal["outside", "inside"]


def cross_entropy_over_positives(
    logits: Tensor, positive: Tensor, mean: PositivesMean = "outside", decoupled: bool = False
) -> Tensor:
    """Compute the cross entropy of anchors with any number of positives.

    With the logits s, the positives p of an anchor, and D = sum over its candidates of exp(s):

        outside:  mean over p of -log(exp(s_p) / D)       L_out of Khosla et al. (2020), Eq. 2
        inside:   -log(mean over p of exp(s_p) / D)       L_in, Eq. 3; at most L_out

    With one positive, both are equal. `decoupled` removes the positives from D (Yeh et al., 2022, "Decoupled
    contrastive learning", Eq. 6, which has one positive). Then the gradient does not vanish for a positive that is
    already close, and the loss can be below 0. For equal logits the loss is the log of the number of candidates, or
    with `decoupled` the log of the number of negatives.

    Args:
        logits: shape (N, M); -inf for an excluded candidate. Each row has a candidate.
        positive: boolean, shape (N, M), False where the logit is -inf.

    Returns:
        The mean loss over the anchors that have a positive, shape (); 0 if no anchor has a positive. With `decoupled`,
        an anchor without a negative has loss 0.
    """
    check_positives_mean(mean)
    count = positive.sum(dim=1)  # (N,)
    has_positive = count > 0
    if mean == "outside" and not decoupled:
        log_p = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)  # a product would make 0 * -inf = nan
        losses = -log_p.sum(dim=1) / count.clamp(min=1)  # (N,), 0 without a positive
        return losses.sum() / has_positive.sum().clamp(min=1)
    if mean == "outside":
        pull = logits.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp(min=1)  # (N,)
    else:  # for an anchor without a positive, excluded below, all candidates count: this keeps the gradient finite
        chosen = logits.masked_fill(~positive & has_positive[:, None], ABSENT)
        pull = chosen.logsumexp(dim=1) - count.clamp(min=1).to(logits.dtype).log()
        own = logits.detach().masked_fill(~positive, 0.0).sum(dim=1)
        pull = pull + (own - own)  # 0; nan for a positive at -inf, which logsumexp would hide
    has_negative = torch.ones_like(has_positive)
    if decoupled:
        logits = logits.masked_fill(positive, ABSENT)
        has_negative = ~(logits == ABSENT).all(dim=1)
        logits = torch.where(has_negative[:, None], logits, 0.0)
    losses = torch.where(has_positive & has_negative, logits.logsumexp(dim=1) - pull, 0.0)
    return losses.sum() / has_positive.sum().clamp(min=1)


def check_positives_mean(mean: str) -> None:
    """Raise ValueError for an unknown place of the mean."""
    if mean not in ("outside", "inside"):
        raise ValueError(f"positives_mean={mean!r} must be 'outside' or 'inside' (the logarithm)")
