"""LARS as published with MoCo v3.

Large Batch Training of Convolutional Networks (You et al., 2017)
facebookresearch/moco-v3, moco/optimizer.py
"""

from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """SGD with momentum in which each weight of two or more dimensions has its own rate.

    For such a weight w with gradient g, where |.| is the Euclidean norm:

        d = g + weight_decay w
        d = d trust_coeff |w| / |d|      unchanged if |w| or |d| is 0
        v = momentum v + d
        w = w - lr v

    Other weights (biases, and the scales of normalization) have d = g. A gradient of 0, as in the
    first steps of zero-initialized residual branches, is no special case: d is then parallel to w.

    timm's LARS divides by |g| + weight_decay |w| instead of |d|, and skips groups without weight decay.

    One step runs a fixed number of operations on lists of tensors. The host does not wait for the device.

    Args:
        params: weights, or groups of them.
        trust_coeff: trust coefficient.
        trust_clip: in the second line, multiply d by min(1, trust_coeff |w| / (lr |d|)) instead, or by min(1, 1 / lr)
            if |w| or |d| is 0, as timm does: a rate of at most lr (LARC; not in MoCo v3).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coeff: float = 0.001,
        trust_clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coeff": trust_coeff, "trust_clip": trust_clip})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. A weight without a gradient stays unchanged."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for w in weights:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            velocities = [self.state[w]["momentum_buffer"] for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, _updates(weights, group))
            torch._foreach_add_(weights, velocities, alpha=-group["lr"])
        return loss


def _updates(weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Return d of each weight; gradients are not changed."""
    updates: list[Any] = [w.grad for w in weights]
    indices = [i for i, w in enumerate(weights) if w.ndim > 1]
    if not indices:
        return updates
    adapted = [weights[i] for i in indices]
    changed = torch._foreach_add([updates[i] for i in indices], adapted, alpha=group["weight_decay"])
    weight_norms, update_norms = (torch.stack(torch._foreach_norm(each)) for each in (adapted, changed))
    ratios = group["trust_coeff"] * weight_norms / update_norms
    ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
    if group["trust_clip"]:
        ratios = (ratios / group["lr"]).clamp(max=1.0)
    torch._foreach_mul_(changed, list(ratios.unbind()))
    for i, update in zip(indices, changed, strict=True):
        updates[i] = update
    return updates
