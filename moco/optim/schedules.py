"""Learning rate, momentum and temperature as pure functions of the step: a resumed run needs no saved state of them."""

import math

from moco.config import OptimConfig, TrainConfig
from moco.data.plan import Plan
from moco.losses import temperature_at


def scaled_lr(lr: float, batch_size: int, base_batch: int | None) -> float:
    """Return lr x batch / base, the linear scaling rule (Goyal et al., 2017); without a base, lr."""
    return lr if base_batch is None else lr * batch_size / base_batch


def lr_factor(step: int, steps_per_epoch: int, epochs: int, optim: OptimConfig) -> float:
    """Return the learning rate at a step as a fraction of its peak, in 0 ... 1.

    Args:
        step: 0-based optimizer step.
        steps_per_epoch, epochs: the length of training.
        optim: uses its `schedule` ("cosine" from 1 to `lr_end`; "step", multiplied by `gamma` at each of
            the epochs `milestones`; or "constant"), `warmup_epochs` (linear; the cosine covers the rest),
            `warmup_from_zero`, and `per_epoch` (the value is constant within an epoch, as in facebookresearch/moco:
            the value at the epoch's first step or, in a warm-up that does not start from 0, at its last step).

    Raises:
        ValueError: for an unknown schedule.
    """
    epoch = step // steps_per_epoch if optim.per_epoch else step / steps_per_epoch
    if epoch < optim.warmup_epochs:
        offset = 0 if optim.warmup_from_zero else 1  # 1: no step has learning rate 0
        done = epoch + offset if optim.per_epoch else (step + offset) / steps_per_epoch
        return min(1.0, done / optim.warmup_epochs)  # the ratio exceeds 1 if the warm-up ends within this step or epoch
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "step":
        return float(optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones))
    if optim.schedule == "cosine":
        progress = (epoch - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
        return optim.lr_end + (1 - optim.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"optim.schedule={optim.schedule!r} must be cosine, step or constant")


def momentum_at(step: int, total_steps: int, start: float, end: float | None) -> float:
    """Return m of the momentum encoder after `step` of `total_steps` steps.

    It is constant, or goes from `start` to `end` along half a cosine (BYOL; MoCo v3).
    """
    if end is None:
        return start
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def schedule_values(config: TrainConfig, plan: Plan, peak_lr: float, step: int) -> dict[str, float]:
    """Return lr, momentum and, with a cosine schedule of the temperature, temperature of a step, counted from 0."""
    optim, method = config.optim, config.method
    factor = lr_factor(step, plan.steps_per_epoch, plan.epochs, optim)
    # The official code of MoCo v3 updates the momentum encoder at the start of step s + 1. Here it is updated at the
    # end of step s, with the same m.
    momentum = momentum_at(step + 1, plan.total_steps, method.momentum, method.momentum_end)
    values = {"lr": peak_lr * factor, "momentum": momentum}
    if method.temperature_schedule == "cosine":
        epoch = step / plan.steps_per_epoch
        values["temperature"] = temperature_at(
            epoch, method.temperature_period, method.temperature_low, method.temperature_high
        )
    return values
