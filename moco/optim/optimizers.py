"""Optimizers and their parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moco.config import OptimConfig
from moco.losses import LearnedTemperature
from moco.models.norm import GroupedBatchNorm
from moco.optim.lars import Lars
from moco.runtime.sharding import is_sharded, load_optimizer_state

_NORMS = (GroupedBatchNorm, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(module: nn.Module, weight_decay: float, exclude: Sequence[str]) -> list[dict[str, object]]:
    """Return the trainable parameters in up to two groups: with weight decay, and without weight decay.

    If `exclude` contains "bias", the biases have no weight decay; if it contains "norm", the parameters of
    normalization layers have none. A learned temperature is never decayed: its parameter is log 1/T, for which 0 is not
    a preferred value.
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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], module: nn.Module | None = None) -> None:
    """Load a state dict; each tensor of the state then has the memory format of its parameter.

    Fused kernels read parameters and moments in memory order: moments from a run with another `channels_last` would
    update the wrong weights. `module` is the network with the optimizer's parameters; it is needed if the network is
    sharded.
    """
    built = [dict(group) for group in optimizer.param_groups]
    load_optimizer_state(module, optimizer, state)
    for group, settings in zip(optimizer.param_groups, built, strict=True):
        # Keep the settings that the saved state lacks, and the implementation ("fused"), which sharding may change.
        group.update({name: value for name, value in settings.items() if name not in group or name == "fused"})
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def build_optimizer(
    module: nn.Module, optim: OptimConfig, lr: float = 0.0, saved: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Build SGD, AdamW, MoCo v3's LARS (`lars`) or timm's (`lars_timm`).

    Args:
        optim: uses its `name`, `momentum` (SGD, LARS), `betas` (AdamW), `weight_decay`, `exclude`, `trust` and
            `trust_clip`. In LARS a layer's rate is lr x trust x |w| / |update|; with `trust_clip` it is the smaller of
            lr and trust x |w| / |update|, as in solo-learn (LARC).
        saved: the state dict that will be loaded. If timm's LARS wrote it, this returns timm's LARS: `lars` was timm's
            in earlier versions.

    Raises:
        ValueError: for an unknown name.
    """
    groups = parameter_groups(module, optim.weight_decay, optim.exclude)
    if optim.name == "sgd":
        fused = not is_sharded(module)  # the same bits, in half the time; torch has no fused SGD for shards
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, fused=fused)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(optim.betas[0], optim.betas[1]), fused=True)
    if optim.name in ("lars", "lars_timm"):
        kind: Any = Lars
        of_timm = saved is not None and any("always_adapt" in group for group in saved["param_groups"])
        if optim.name == "lars_timm" or of_timm:
            from timm.optim.lars import Lars as TimmLars  # takes a second to import

            kind = TimmLars
        optimizer: torch.optim.Optimizer = kind(
            groups, lr=lr, momentum=optim.momentum, trust_coeff=optim.trust, trust_clip=optim.trust_clip
        )
        return optimizer
    raise ValueError(f"optim.name={optim.name!r} must be sgd, lars, lars_timm or adamw")
