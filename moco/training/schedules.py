"""Learning rate, momentum and temperature as functions of the step."""

from moco.config import TrainConfig
from moco.data.plan import Plan
from moco.losses import temperature_at
from moco.optim.schedules import lr_factor, momentum_at


def schedule_values(config: TrainConfig, plan: Plan, peak_lr: float, step: int) -> dict[str, float]:
    """Return lr, momentum and, if it has a schedule, temperature of a step, counted from 0."""
    optim, method = config.optim, config.method
    factor = lr_factor(step, plan.steps_per_epoch, plan.epochs, optim)
    # The papers update the momentum encoder at the start of step s + 1. Here it is the end of step s, with the same m.
    momentum = momentum_at(step + 1, plan.total_steps, method.momentum, method.momentum_end)
    values = {"lr": peak_lr * factor, "momentum": momentum}
    if method.temperature_schedule == "cosine":
        epoch = step / plan.steps_per_epoch
        values["temperature"] = temperature_at(
            epoch, method.temperature_period, method.temperature_low, method.temperature_high
        )
    return values
