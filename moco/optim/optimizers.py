"""Optimizers, and schedules as pure functions of the step: nothing of them has to be saved (law 2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moco.losses import LearnedTemperature
from moco.models.norm import GroupedBatchNorm

_NORMS = (
    GroupedBatchNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)


def parameter_groups(module: nn.Module, weight_decay: float, exclude: Sequence[str]) -> list[dict[str, object]]:
    """Trainable parameters in two groups: decayed, and those that `exclude` ("bias", "norm") keeps out.

    A learned temperature is never decayed: its parameter is log 1/T, and 0 is no better than any other.
    """
    kept: list[nn.Parameter] = []
    left_out: list[nn.Parameter] = []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                skip = ("norm" in exclude and isinstance(layer, _NORMS)) or ("bias" in exclude and name == "bias")
                skip = skip or isinstance(layer, LearnedTemperature)
                (left_out if skip else kept).append(parameter)
    groups = [{"params": kept, "weight_decay": weight_decay}, {"params": left_out, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, with each moment laid out in memory as its parameter is.

    A fused kernel walks over both as they lie; a checkpoint of a run with another `channels_last` would mix them up.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def build_optimizer(
    module: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    betas: Sequence[float],
    weight_decay: float,
    exclude: Sequence[str],
    trust: float = 0.001,
    trust_clip: bool = False,
) -> torch.optim.Optimizer:
    """SGD, LARS (timm's; adapts only what is decayed, as in MoCo v3) or AdamW over the trainable parameters.

    Args:
        module: whose parameters.
        name: sgd, lars or adamw.
        lr: of the first step, until a schedule sets it.
        momentum: of sgd and lars.
        betas: of adamw.
        weight_decay, exclude: see `parameter_groups`.
        trust: LARS's coefficient: a layer's rate is lr x trust x |w| / |gradient|.
        trust_clip: in place of that the smaller of lr and trust x |w| / |gradient|, as solo-learn has it (LARC).

    Raises:
        ValueError: for an unknown name.
    """
    groups = parameter_groups(module, weight_decay, exclude)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)  # the same bits, in half the time
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)
    if name == "lars":
        from timm.optim.lars import Lars  # timm costs a second at start-up, so only where it is used

        return Lars(groups, lr=lr, momentum=momentum, trust_coeff=trust, trust_clip=trust_clip)
    raise ValueError(f"optim.name={name!r} must be sgd, lars or adamw")
