"""Multi-crop: small views as further queries, for MoCo and MoCo v3, against loops in float64 and by symmetry.

Legend: N batch, C embedding, K queue length.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo, Output
from moco.config import AugmentConfig, ConfigError, TrainConfig, check
from moco.data.arrays import ArraySource
from moco.data.loader import Batch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.methods.build import build_method
from moco.methods.densecl_config import DenseCLConfig
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3 import MoCoV3
from moco.methods.moco_v3_config import MoCoV3Config
from moco.methods.simclr_config import SimCLRConfig
from moco.models.encoder import build_encoder
from moco.training.step import StepSettings, train_step

Array = NDArray[np.float64]
N, C, K, T = 4, 3, 8, 0.3
V2: dict[str, dict[str, Any]] = {
    "asymmetric": {},
    "symmetric": {"symmetric": True},
    "sum": {"symmetric": True, "reduction": "sum"},
}


class Mean(nn.Module):
    """The mean color of images of any size, (N, 3), and a linear map of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


def images(small: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [6, 6, *[4] * small]
    return [torch.randn(N, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


def moco(**options: Any) -> MoCo:
    torch.manual_seed(0)
    method = MoCo(Mean(), KeyQueue(K, C), T, **options).double()
    method.queue.index[:2] = torch.tensor([0, 3])  # older keys of images of the batch
    method.momentum_encoder.get_parameter("linear.weight").data += 0.3
    return method


def moco_v3() -> MoCoV3:
    torch.manual_seed(0)
    method = MoCoV3(Mean(), nn.Linear(C, C, bias=False), T).double()
    method.momentum_encoder.get_parameter("linear.weight").data += 0.3
    return method


def unit(x: Array) -> Array:
    return x / math.sqrt(float(x @ x))


def log_softmax(positive: float, others: list[float]) -> float:
    return math.log(math.exp(positive / T) + sum(math.exp(each / T) for each in others)) - positive / T


def colors(views: list[Tensor]) -> list[Array]:
    return [view.mean(dim=(2, 3)).numpy() for view in views]


def reference_v2(method: MoCo, weight: Array, views: list[Tensor]) -> float:
    """Return the mean over all pairs of query and key; twice that for the sum of two directions."""
    x, key_weight = colors(views), method.momentum_encoder.get_parameter("linear.weight").detach().numpy()
    keys = [1] if len(method.directions) == 1 else [0, 1]
    queue, shown = method.queue.keys.numpy(), method.queue.index.tolist()
    losses = []
    for view in range(len(views)):
        for key in keys:
            if view == key or (view < 2 and view in keys and len(keys) == 1):
                continue
            for i in range(N):
                q, k = unit(weight @ x[view][i]), unit(key_weight @ x[key][i])
                negatives = [float(q @ each) for each, image in zip(queue, shown, strict=True) if image != i]
                losses.append(log_softmax(float(q @ k), negatives))
    return float(np.mean(losses)) * (2 if method.reduction == "sum" else 1)


def reference_v3(method: MoCoV3, weights: list[Array], views: list[Tensor]) -> float:
    """Return ctr(q1, k2) + ctr(q2, k1), as twice the mean of ctr over all pairs of query and key."""
    x, key_weight = colors(views), method.momentum_encoder.get_parameter("linear.weight").detach().numpy()
    losses = []
    for view in range(len(views)):
        for key in (0, 1):
            if view == key:
                continue
            for i in range(N):
                q = unit(weights[1] @ (weights[0] @ x[view][i]))
                logits = [float(q @ unit(key_weight @ x[key][j])) for j in range(N)]
                losses.append(2 * T * log_softmax(logits[i], logits[:i] + logits[i + 1 :]))
    return 2 * float(np.mean(losses))


def step(method: Any, views: list[Tensor], accumulate: int = 1) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    shuffles = [np.random.default_rng(number).permutation(N) for number in range(len(views))]
    return train_step(
        method, method, optimizer, scaler, Batch(torch.arange(N), views), shuffles, StepSettings(0.0, 0.9, accumulate)
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("small", [0, 1, 3])
@pytest.mark.parametrize("name", [*V2, "v3"])
def test_loss_and_gradient_equal_the_loops(name: str, small: int, accumulate: int) -> None:
    method: Any = moco_v3() if name == "v3" else moco(**V2[name])
    untrained: Any = moco_v3() if name == "v3" else moco(**V2[name])
    views = images(small)
    trained = [p for p in method.parameters() if p.requires_grad]
    weights = [p.detach().numpy().copy() for p in trained]

    def loss(of: list[Array]) -> float:
        return reference_v3(untrained, of, views) if name == "v3" else reference_v2(untrained, of[0], views)

    measures = step(method, views, accumulate)
    assert measures["loss"].item() == pytest.approx(loss(weights), rel=1e-6)
    for at, parameter in enumerate(trained):
        expected = np.zeros_like(weights[at])
        for entry in np.ndindex(*expected.shape):
            values = []
            for sign in (1, -1):
                changed = [each.copy() for each in weights]
                changed[at][entry] += sign * 1e-6
                values.append(loss(changed))
            expected[entry] = (values[0] - values[1]) / 2e-6
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-4, atol=1e-7)
        assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("name", [*V2, "v3"])
def test_small_views_are_no_keys(name: str) -> None:
    for small in (0, 3):
        method: Any = moco_v3() if name == "v3" else moco(**V2[name])
        views = images(small)
        assert sorted(method.encode_keys(views)) == ([1] if name == "asymmetric" else [0, 1])
        step(method, views)
        if name != "v3":
            assert int(method.queue.count) == N * len(method.directions)


@pytest.mark.parametrize("name", V2)
def test_the_order_of_small_views_does_not_matter_and_copies_of_the_query_change_nothing(name: str) -> None:
    method, (first, second, *small) = moco(**V2[name]), images(3)
    index = torch.arange(N)

    def loss(*views: Tensor) -> Tensor:
        output: Output = method(views, method.encode_keys(views), index)
        return output.loss

    torch.testing.assert_close(loss(first, second, *small), loss(first, second, *small[::-1]))
    if name == "asymmetric":
        torch.testing.assert_close(loss(first, second, first, first), loss(first, second))


@pytest.mark.parametrize("name", ["sum", "v3"])
def test_uniform_logits_have_the_loss_of_chance(name: str) -> None:
    method: Any = moco_v3() if name == "v3" else moco(**V2[name])
    for parameter in method.parameters():
        parameter.data.fill_(1.0)
    if name == "sum":
        method.queue.load(torch.ones(K, C, dtype=torch.float64))
    views = [view.abs() for view in images(2)]
    output: Output = method(views, method.encode_keys(views), torch.arange(N))
    assert output.loss.item() == pytest.approx(output.measures["chance"].item())


@pytest.mark.parametrize("bn", ["grouped", "batch", "sync"])
def test_small_views_leave_the_running_statistics_of_bn_unchanged(bn: Any) -> None:
    states = []
    for small in (0, 2):
        torch.manual_seed(0)
        method = MoCo(build_encoder("convnet", {"width": 2}, 2, 8, C, bn, 2), KeyQueue(K, C), T, symmetric=True)
        generator = torch.Generator().manual_seed(1)
        views = [torch.randn(N, 3, size, size, generator=generator) for size in (12, 12, 8, 8)[: 2 + small]]
        measures = step(method, views)  # the gradient can be computed
        assert measures["gradient_norm"] > 0
        states.append(method.state_dict())
    compared = [name for name in states[0] if "running" in name or "num_batches" in name]
    assert len(compared) == 2 * 5 * 3
    for name in compared:
        assert torch.equal(states[0][name], states[1][name]), name


def test_full_views_are_the_same_with_small_views() -> None:
    source = ArraySource(torch.randint(256, (8, 3, 20, 24), dtype=torch.uint8), [str(i) for i in range(8)])
    found = []
    for small in (0, 2):
        views = build_views(AugmentConfig(size=16, flip_p=0.5, small_views=small, small_size=8))
        found.append(next(batches(source, Plan(8, 8, 1, 0), views, torch.device("cpu"), 0)).views)
    assert [tuple(view.shape[1:]) for view in found[1]] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 2
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1][:2], strict=True))
    assert not torch.equal(found[1][2], found[1][3])


def test_small_views_have_the_two_recipes_with_their_own_size_and_area() -> None:
    config = AugmentConfig(small_views=3, small_size=10, small_scale=[0.1, 0.3], blur_p=0.5, second={"blur_p": 0.1})
    views = build_views(config)
    assert [view.blur_p for view in views] == [0.5, 0.1, 0.5, 0.1, 0.5]
    assert [view.size for view in views] == [224, 224, 10, 10, 10]
    assert [view.crop_scale for view in views] == [(0.2, 1.0)] * 2 + [(0.1, 0.3)] * 3


@pytest.mark.parametrize("method", [SimCLRConfig(), DenseCLConfig(queue_size=64)])
def test_other_methods_refuse_small_views(method: Any) -> None:
    config = TrainConfig(method=method, batch_size=32)
    check(config)
    config.augment.small_views = 2
    with pytest.raises(ConfigError, match=rf"augment\.small_views=2: {method.name} takes no small views"):
        check(config)
    for known in (MoCoConfig(queue_size=64), MoCoV3Config()):
        config.method = known
        config.model.predictor_layers = 2 * known.has_predictor
        check(config)


def test_small_views_that_are_larger_than_full_ones_are_refused() -> None:
    config = TrainConfig(method=MoCoConfig(queue_size=64))
    config.augment.size = 16
    check(config)
    config.augment.small_views = 1
    with pytest.raises(ConfigError, match=r"augment\.small_size=96 exceeds augment\.size=16: lower it"):
        check(config)


@pytest.mark.parametrize("scale", [[0.5, 0.1], [0.1, 1.5], [0.1]])
def test_an_invalid_area_is_refused(scale: list[float]) -> None:
    config = TrainConfig(method=MoCoConfig(queue_size=64))
    config.augment.small_views, config.augment.small_scale = 1, scale

    def checked() -> None:
        check(config)
        build_views(config.augment)

    with pytest.raises(ConfigError, match=r"augment\.small_scale=.*"):
        checked()


def test_a_vit_needs_an_option_for_several_sizes() -> None:
    options = {"dim": 16, "depth": 1, "heads": 2, "img_size": 32, "patch_size": 8}
    config = TrainConfig(method=MoCoConfig(queue_size=64), batch_size=32)
    config.model.backbone, config.model.options = "vit", options
    config.augment.size, config.augment.small_views, config.augment.small_size = 32, 1, 16
    with pytest.raises(ConfigError, match=r"augment\.small_size=16: .*; set \+model\.options\.dynamic_img_size=true"):
        build_method(config)
    config.model.options = options | {"dynamic_img_size": True}
    views = [torch.randn(4, 3, size, size) for size in (32, 32, 16)]
    method = build_method(config)
    assert step(method, views)["loss"].isfinite()
