"""LARS as solo-learn has it: the smaller of the learning rate and trust x |w| / |gradient|."""

import pytest
import torch
from torch import nn

from moco.optim.optimizers import build_optimizer


@pytest.mark.parametrize(("trust", "clip", "rate"), [(0.001, False, 0.3 * 0.01), (0.02, True, 0.2), (0.5, True, 0.3)])
def test_a_layers_rate(trust: float, clip: bool, rate: float) -> None:
    """|w| / |gradient| is 10 here; weight decay is next to nothing, but without it timm does not adapt."""
    layer = nn.Linear(4, 4, bias=False)
    gradient = torch.ones(4, 4)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    optimizer = build_optimizer(layer, "lars", 0.0, 0.9, (0.9, 0.999), 1e-9, ["bias", "norm"], trust, clip)
    optimizer.param_groups[0]["lr"] = 0.3
    for number in range(1, 3):  # with momentum 0.9 the second step is 1.9 times the first, nearly
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        moved = before - layer.weight.detach()
        torch.testing.assert_close(moved, rate * (1 if number == 1 else 1.9) * gradient, rtol=0.02, atol=0)
