"""LARS, SGD and AdamW against their formulas as loops over numbers, in float64 to 1e-12; timm's LARS by name.

Legend: w a weight, g its gradient, both flat lists of numbers.
"""

import copy
import math
from typing import Any

import pytest
import torch
from timm.optim.lars import Lars as TimmLars
from torch import Tensor, nn

from moco.config import ConfigError, OptimConfig, TrainConfig, check
from moco.methods.moco_config import MoCoConfig
from moco.optim.lars import Lars
from moco.optim.optimizers import build_optimizer, load_optimizer

Numbers = list[float]
STEPS, LR, MOMENTUM, TRUST, BETAS = 10, 0.3, 0.9, 0.02, (0.7, 0.9)


class Network(nn.Module):
    """Weights of 0 to 4 dimensions: random, all zero, and a zero-initialized residual branch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.convolution, self.linear, self.token = random(3, 2, 3, 3), random(4, 3), random(1, 1, 5)
        self.bias, self.scale = random(4), random()
        self.zero = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        self.branch = nn.Linear(3, 3, dtype=torch.float64)
        self.branch.weight, self.branch.bias = random(3, 3), nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.idle = random(2, 2)  # never gets a gradient


def gradient(name: str, weight: Tensor, step: int) -> Tensor | None:
    """Return the gradient of a step: zero for a while for the branch, always for `token`, tiny for `linear`."""
    if name == "idle":
        return None
    generator = torch.Generator().manual_seed(100 * step + len(name))
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    scale = {"token": 0.0, "linear": 1e-6, "branch.weight": float(step >= 3), "zero": float(step != 0)}.get(name, 1.0)
    return values * scale


def norm(values: Numbers) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def official_lars(w: Numbers, g: Numbers, state: dict[str, Any], dims: int, decay: float) -> Numbers:
    """moco-v3's rule: decay and rate for two or more dimensions, then momentum."""
    d = list(g)
    if dims > 1:
        d = [each + decay * value for each, value in zip(g, w, strict=True)]
        of_weight, of_update = norm(w), norm(d)
        if of_weight > 0 and of_update > 0:
            d = [each * TRUST * of_weight / of_update for each in d]
    state["v"] = [MOMENTUM * v + each for v, each in zip(state.get("v", [0.0] * len(w)), d, strict=True)]
    return [value - LR * v for value, v in zip(w, state["v"], strict=True)]


def sgd(w: Numbers, g: Numbers, state: dict[str, Any], dims: int, decay: float) -> Numbers:
    """Momentum and L2 decay for all weights."""
    d = [each + decay * value for each, value in zip(g, w, strict=True)]
    state["v"] = [MOMENTUM * v + each for v, each in zip(state.get("v", [0.0] * len(w)), d, strict=True)]
    return [value - LR * v for value, v in zip(w, state["v"], strict=True)]


def adamw(w: Numbers, g: Numbers, state: dict[str, Any], dims: int, decay: float) -> Numbers:
    """Loshchilov & Hutter (2019), Algorithm 2, with epsilon 1e-8."""
    one, two = BETAS
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = [one * m + (1 - one) * each for m, each in zip(state.get("m", [0.0] * len(w)), g, strict=True)]
    state["s"] = [two * s + (1 - two) * each**2 for s, each in zip(state.get("s", [0.0] * len(w)), g, strict=True)]
    return [
        value * (1 - LR * decay) - LR * (m / (1 - one**t)) / (math.sqrt(s / (1 - two**t)) + 1e-8)
        for value, m, s in zip(w, state["m"], state["s"], strict=True)
    ]


def config(name: str, decay: float) -> OptimConfig:
    return OptimConfig(name=name, momentum=MOMENTUM, betas=list(BETAS), weight_decay=decay, trust=TRUST)


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for name, weight in network.named_parameters():
        weight.grad = gradient(name, weight, step)
    optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("rule", [official_lars, sgd, adamw])
def test_ten_steps_equal_the_formula(rule: Any, decay: float) -> None:
    name = rule.__name__.removeprefix("official_")
    network = Network()
    optimizer = build_optimizer(network, config(name, decay), LR)
    weights: dict[str, Numbers] = {each: w.detach().flatten().tolist() for each, w in network.named_parameters()}
    states: dict[str, dict[str, Any]] = {each: {} for each in weights}
    for step in range(STEPS):
        take_step(network, optimizer, step)
        for each, weight in network.named_parameters():
            g = gradient(each, weight, step)
            if g is not None:
                weights[each] = rule(weights[each], g.flatten().tolist(), states[each], weight.ndim, decay)
            found = weight.detach().flatten()
            torch.testing.assert_close(found, torch.tensor(weights[each], dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_a_zero_gradient_moves_a_weight_along_itself() -> None:
    """d = decay w, whose rate is trust: the step is lr trust w for any decay. timm's moves by lr decay w."""
    for name, factor in (("lars", LR * TRUST), ("lars_timm", LR * 1e-6)):
        layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.zeros_like(before)
        build_optimizer(layer, config(name, 1e-6), LR).step()
        torch.testing.assert_close(before - layer.weight.detach(), factor * before, rtol=1e-8, atol=0)


def test_without_weight_decay_lars_adapts_and_lars_timm_is_refused() -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(before, 7.0)
    build_optimizer(layer, config("lars", 0.0), LR).step()
    moved = (before - layer.weight.detach()).norm()
    torch.testing.assert_close(moved, LR * TRUST * before.norm())
    wrong = TrainConfig(method=MoCoConfig(), optim=config("lars_timm", 0.0))
    with pytest.raises(ConfigError, match=r"optim\.weight_decay=0\.0.*optim\.name=lars\b"):
        check(wrong)


@pytest.mark.parametrize("name", ["lars", "lars_timm"])
def test_the_state_resumes_bit_equal(name: str) -> None:
    straight, resumed = Network(), Network()
    optimizers = [build_optimizer(each, config(name, 0.1), LR) for each in (straight, resumed)]
    for step in range(STEPS):
        if step == 4:
            state = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = build_optimizer(resumed, config(name, 0.1), saved=state)
            load_optimizer(optimizers[1], state)
        for network, optimizer in zip((straight, resumed), optimizers, strict=True):
            take_step(network, optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_run_that_was_trained_with_timms_lars_keeps_it() -> None:
    """Checkpoints of earlier versions, in which `lars` was timm's, also without the settings of a newer timm."""
    old, new = Network(), Network()
    groups = [{"params": list(old.parameters()), "weight_decay": 0.1}]
    before = TimmLars(groups, lr=LR, momentum=MOMENTUM, trust_coeff=TRUST)
    for step in range(3):
        take_step(old, before, step)
    new.load_state_dict(old.state_dict())
    state = copy.deepcopy(before.state_dict())
    for group in state["param_groups"]:
        group.pop("foreach", None)
    after = build_optimizer(new, config("lars", 0.1), saved=state)
    assert type(after) is TimmLars
    load_optimizer(after, state)
    for step in range(3, STEPS):
        take_step(old, before, step)
        take_step(new, after, step)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_names_select_the_variant() -> None:
    assert type(build_optimizer(Network(), config("lars", 0.1))) is Lars
    assert type(build_optimizer(Network(), config("lars_timm", 0.1))) is TimmLars


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_precision_and_devices(device: str) -> None:
    """Weights of two types in one group; float32 agrees with float64."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    exact, single = Network().to(device), Network().to(device, torch.float32)
    optimizers = [build_optimizer(each, config("lars", 0.1), LR) for each in (exact, single)]
    for step in range(STEPS):
        for network, optimizer in zip((exact, single), optimizers, strict=True):
            for name, weight in network.named_parameters():
                g = gradient(name, weight.cpu(), step)
                weight.grad = None if g is None else g.to(weight.device, weight.dtype)
            optimizer.step()
    for a, b in zip(exact.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)
    mixed = nn.ParameterList([nn.Parameter(torch.ones(2, 2, dtype=each)) for each in (torch.float32, torch.bfloat16)])
    for weight in mixed:
        weight.grad = torch.ones_like(weight)
    build_optimizer(mixed.to(device), config("lars", 0.0), LR).step()
    assert all(weight.float().mean().item() == pytest.approx(1 - LR * TRUST, abs=4e-3) for weight in mixed)


@pytest.mark.parametrize("name", ["lars", "lars_timm"])
@pytest.mark.parametrize(("trust", "clip", "rate"), [(0.001, False, 0.3 * 0.01), (0.02, True, 0.2), (0.5, True, 0.3)])
def test_the_rate_of_a_layer(name: str, trust: float, clip: bool, rate: float) -> None:
    """|w| / |gradient| is 10 here. The weight decay is tiny; without any, timm does not adapt."""
    layer = nn.Linear(4, 4, bias=False)
    gradient = torch.ones(4, 4)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    optimizer = build_optimizer(layer, OptimConfig(name=name, weight_decay=1e-9, trust=trust, trust_clip=clip))
    optimizer.param_groups[0]["lr"] = 0.3
    for number in range(1, 3):  # with momentum 0.9 the second step is nearly 1.9 times the first
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        moved = before - layer.weight.detach()
        torch.testing.assert_close(moved, rate * (1 if number == 1 else 1.9) * gradient, rtol=0.02, atol=0)
