"""Optimizers and their parameter groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moco.config import OptimConfig
from moco.losses import LearnedTemperature
from moco.models.norm import GroupedBatchNorm

_NORMS = (GroupedBatchNorm, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(module: nn.Module, weight_decay: float, exclude: Sequence[str]) -> list[dict[str, object]]:
    """Return the trainable parameters in two groups: with weight decay, and without ("bias", "norm" in `exclude`).

    A learned temperature is never decayed: its parameter is log 1/T, for which 0 is not a preferred value.
    """
    decayed, excluded = list[nn.Parameter](), list[nn.Parameter]()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                skip = ("norm" in exclude and isinstance(layer, _NORMS)) or ("bias" in exclude and name == "bias")
                skip = skip or isinstance(layer, LearnedTemperature)
                (excluded if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": excluded, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict; the optimizer state then uses the memory format of its parameter.

    Fused kernels iterate over both in memory order: state from a run with another `channels_last` would be mixed up.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def build_optimizer(module: nn.Module, optim: OptimConfig, lr: float = 0.0) -> torch.optim.Optimizer:
    """Build SGD, AdamW or LARS (timm's; it adapts only decayed parameters, as in MoCo v3).

    Args:
        optim: of which this uses `name`, `momentum` (SGD, LARS), `betas` (AdamW), `weight_decay`, `exclude`, `trust`
            and `trust_clip`. In LARS a layer's rate is lr x trust x |w| / |gradient|; with `trust_clip` it is the
            smaller of lr and trust x |w| / |gradient|, as in solo-learn (LARC).

    Raises:
        ValueError: for an unknown name.
    """
    groups = parameter_groups(module, optim.weight_decay, optim.exclude)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, fused=True)  # the same bits, in half the time
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(optim.betas[0], optim.betas[1]), fused=True)
    if optim.name == "lars":
        from timm.optim.lars import Lars  # timm costs a second at start-up, so only where it is used

        return Lars(groups, lr=lr, momentum=optim.momentum, trust_coeff=optim.trust, trust_clip=optim.trust_clip)
    raise ValueError(f"optim.name={optim.name!r} must be sgd, lars or adamw")
