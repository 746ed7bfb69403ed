"""Temperatures that follow a schedule or are trained."""

import math

import torch
from torch import Tensor, nn


def temperature_at(step: float, period: float, low: float, high: float) -> float:
    """Return T of the cosine schedule of Kukleva et al. (2023), "Temperature schedules for ... long-tail data".

    T(step) = low + (high - low) (1 + cos(2 pi step / period)) / 2: from high down to low in half a period and back.
    `step` and `period`, the length of an oscillation, have the same unit.

    Raises:
        ValueError: unless 0 < low <= high and period > 0.
    """
    if not 0 < period < math.inf or not math.isfinite(step):
        raise ValueError(f"step={step} must be finite, and period={period} above 0 and finite")
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low={low} and high={high} must be above 0, finite and in ascending order")
    return low + (high - low) * (1 + math.cos(2 * math.pi * step / period)) / 2


class LearnedTemperature(nn.Module):
    """A trained temperature, as log 1/T, CLIP's logit scale (Radford et al., 2021).

    CLIP clamps the scale after each step so that 1/T is at most 100. Here T is clamped to low ... high before each
    use, outside the graph: inside it, a clamped value would get no gradient and stay clamped. Do not decay the scale:
    decay pulls T toward 1.
    """

    log_scale: Tensor  # log 1/T, shape ()

    def __init__(self, initial: float = 0.07, low: float = 0.01, high: float = 1.0) -> None:
        super().__init__()
        if not 0 < low <= initial <= high < math.inf:
            raise ValueError(
                f"low={low}, initial={initial} and high={high} must be above 0, finite and in ascending order"
            )
        self.low, self.high = low, high
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial)))

    def forward(self) -> Tensor:
        """Return T, shape ()."""
        with torch.no_grad():
            self.log_scale.clamp_(-math.log(self.high), -math.log(self.low))
        return (-self.log_scale).exp()


def split_temperature(temperature: float | LearnedTemperature) -> tuple[float, LearnedTemperature | None]:
    """Return the temperature as a number, and the module if it is trained."""
    if isinstance(temperature, LearnedTemperature):
        return float(temperature().detach()), temperature
    return temperature, None
