"""Learning rate and momentum as functions of the step."""

import math
from collections.abc import Sequence


def scaled_lr(lr: float, batch_size: int, base_batch: int | None) -> float:
    """The linear scaling rule (Goyal et al., 2017): lr x batch / base; without a base, lr as it stands."""
    return lr if base_batch is None else lr * batch_size / base_batch


def lr_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    schedule: str,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
    end: float = 0.0,
    per_epoch: bool = False,
) -> float:
    """What the peak learning rate is multiplied by at a step.

    Args:
        step: 0-based optimizer step.
        steps_per_epoch, epochs: the length of training.
        schedule: "cosine" from 1 to `end`; "step" multiplies by `gamma` at each milestone; "constant".
        milestones: epochs.
        warmup_epochs: linear from 0 in the first epochs; the cosine covers the rest.
        per_epoch: hold the value of the epoch's first step, as facebookresearch/moco does.

    Returns:
        A factor in 0 ... 1.

    Raises:
        ValueError: for an unknown schedule.
    """
    epoch = step // steps_per_epoch if per_epoch else step / steps_per_epoch
    if epoch < warmup_epochs:
        # The first step already learns: at 0 it would be wasted.
        done = epoch + 1 if per_epoch else (step + 1) / steps_per_epoch
        return min(1.0, done / warmup_epochs)  # warm-up may end within a step, or an epoch that is held
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(gamma ** sum(epoch >= milestone for milestone in milestones))
    if schedule == "cosine":
        progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"optim.schedule={schedule!r} must be cosine, step or constant")


def momentum_at(step: int, total_steps: int, start: float, end: float | None) -> float:
    """m of the momentum encoder: constant, or from `start` to `end` along half a cosine (BYOL; MoCo v3)."""
    if end is None:
        return start
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
