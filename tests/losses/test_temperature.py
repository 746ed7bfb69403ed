"""Temperatures on a schedule and by gradient."""

import math
from typing import Any

import pytest
import torch

from moco.losses import LearnedTemperature, Switches, contrast, in_batch_info_nce, info_nce, nt_xent, temperature_at
from tests.losses.loops import coins, unit

N, C, K = 5, 6, 9


def test_the_schedule_oscillates_between_high_and_low() -> None:
    values = [temperature_at(step, 400, 0.1, 1.0) for step in (0, 100, 200, 300, 400, 600)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.55, 1.0, 0.1])
    assert temperature_at(37.5, 400, 0.2, 0.2) == 0.2
    mean = sum(temperature_at(step, 400, 0.1, 1.0) for step in range(400)) / 400
    assert mean == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0, 0.1, 1.0), "period=0"), ((0, 1, 0.0, 1.0), "low=0.0 and"), ((0, 1, 0.5, 0.1), "in ascending order")],
)
def test_an_invalid_schedule_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temperature_at(*arguments)


def test_the_parameter_is_the_log_of_the_inverse_temperature() -> None:
    temperature = LearnedTemperature(0.07)
    assert temperature().item() == pytest.approx(0.07, rel=1e-6)
    assert temperature.log_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    assert list(temperature.state_dict()) == ["log_scale"]


@pytest.mark.parametrize(("direction", "bound"), [(-1.0, 0.5), (1.0, 0.05)])
def test_it_stays_within_its_bounds_and_can_return(direction: float, bound: float) -> None:
    temperature = LearnedTemperature(0.2, 0.05, 0.5)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=3.0)
    for sign in (1, 1, 1, -1):
        optimizer.zero_grad()
        value = temperature()
        (sign * direction * value.log()).backward()  # falls with log 1/T if direction is 1
        optimizer.step()
        assert 0.05 - 1e-6 <= value.item() <= 0.5 + 1e-6
        if sign == 1:
            assert temperature().item() == pytest.approx(bound, rel=1e-5)
    assert abs(math.log(temperature().item() / bound)) > 1  # one step away from the bound is enough to leave it


def test_it_can_be_used_twice_before_a_backward() -> None:
    temperature = LearnedTemperature(0.2)
    (temperature() * temperature()).backward()
    assert temperature.log_scale.grad is not None
    assert temperature.log_scale.grad.item() == pytest.approx(-2 * 0.2**2, rel=1e-5)


def test_every_loss_takes_a_learned_temperature_and_trains_it() -> None:
    """Also with excluded entries: their logit is -inf, whose gradient by T must not become nan."""
    query, key, queue, negatives = unit(N, C, seed=0), unit(N, C, seed=1), unit(K, C, seed=2), coins(N, K, seed=3)
    positives = coins(N, K, seed=4)
    views = torch.stack([query, key])

    def losses(t: Any) -> list[torch.Tensor]:
        return [
            info_nce(query, key, queue, t, negatives)[0],
            in_batch_info_nce(query, key, torch.arange(N), t, margin=0.1)[0],
            nt_xent(views, views, 0, t)[0],
            contrast(query, key, queue, t, Switches(debias=0.05), negatives)[0],
            contrast(query, key, queue, t, Switches(margin=0.2), negatives, positives)[0],
        ]

    learned = LearnedTemperature(0.3).double()
    for loss, plain, up, down in zip(losses(learned()), losses(0.3), losses(0.3003), losses(0.2997), strict=True):
        torch.testing.assert_close(loss.float(), plain, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(loss, learned.log_scale, retain_graph=True)
        slope = (up - down).item() / 0.0006 * -0.3  # dT / d(log 1/T) = -T
        assert gradient.item() == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_invalid_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low=0.1, initial=0.07 and high=1.0"):
        LearnedTemperature(0.07, 0.1)
