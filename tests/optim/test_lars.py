"""LARS, and its variant with `trust_clip`."""

import pytest
import torch
from torch import nn

from moco.config import OptimConfig
from moco.optim.optimizers import build_optimizer


@pytest.mark.parametrize(("trust", "clip", "rate"), [(0.001, False, 0.3 * 0.01), (0.02, True, 0.2), (0.5, True, 0.3)])
def test_the_rate_of_a_layer(trust: float, clip: bool, rate: float) -> None:
    """|w| / |gradient| is 10 here. The weight decay is tiny; without any, timm does not adapt."""
    layer = nn.Linear(4, 4, bias=False)
    gradient = torch.ones(4, 4)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    optimizer = build_optimizer(layer, OptimConfig(name="lars", weight_decay=1e-9, trust=trust, trust_clip=clip))
    optimizer.param_groups[0]["lr"] = 0.3
    for number in range(1, 3):  # with momentum 0.9 the second step is nearly 1.9 times the first
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        moved = before - layer.weight.detach()
        torch.testing.assert_close(moved, rate * (1 if number == 1 else 1.9) * gradient, rtol=0.02, atol=0)
