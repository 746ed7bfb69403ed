"""NNCLR against its Algorithm 1 as loops, by finite differences and in closed form.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import KeyQueue, Output
from moco.config import ConfigError, TrainConfig, check
from moco.data.loader import Batch
from moco.methods.nnclr import NNCLR
from moco.methods.nnclr_config import NNCLRConfig
from moco.training.step import StepSettings, train_step

Array = NDArray[np.float64]
N, C, K, P, T = 6, 3, 10, 12, 0.3


def made(seed: int = 0) -> NNCLR:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))
    return NNCLR(encoder, nn.Linear(C, C, bias=False), KeyQueue(K, C, mask_own_keys=False), T)


def images(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, 3, 2, 2, generator=generator) for _ in range(2)]


def unit(x: Array) -> Array:
    return x / math.sqrt(float(x @ x))


def reference(f: Array, g: Array, queue: Array, x: list[Array]) -> float:
    """Return the loss of Algorithm 1, one anchor and one candidate at a time."""
    z = [[unit(f @ image) for image in view] for view in x]
    p = [[unit(g @ (f @ image)) for image in view] for view in x]
    total = 0.0
    for view, other in ((0, 1), (1, 0)):
        for i in range(N):
            neighbor = max(queue, key=lambda key: float(z[other][i] @ key))
            logits = [float(neighbor @ each) / T for each in p[view]]
            total += (math.log(sum(math.exp(each) for each in logits)) - logits[i]) / N / 2
    return total


def weights(method: NNCLR) -> list[Array]:
    return [parameter.detach().double().numpy().copy() for parameter in method.parameters()]


def step(method: NNCLR, number: int, accumulate: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(method.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = Batch(torch.arange(N) + N * number, images(number))
    return train_step(method, method, optimizer, scaler, batch, None, StepSettings(0.1, 0.9, accumulate))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_loss_and_gradient_equal_the_loops_for_any_number_of_micro_batches(accumulate: int) -> None:
    method = made()
    f, g = weights(method)
    queue = method.queue.keys.double().numpy().copy()
    x = [view.flatten(1).double().numpy() for view in images(0)]
    measures = step(method, 0, accumulate)
    assert measures["loss"].item() == pytest.approx(reference(f, g, queue, x), rel=1e-5)
    for at, parameter in enumerate(method.parameters()):
        expected = np.zeros_like((f, g)[at])
        for entry in np.ndindex(*expected.shape):
            values = []
            for sign in (1, -1):
                changed = [f.copy(), g.copy()]
                changed[at][entry] += sign * 1e-5
                values.append(reference(changed[0], changed[1], queue, x))
            expected[entry] = (values[0] - values[1]) / 2e-5
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-3, atol=1e-5)
        assert np.abs(expected).max() > 1e-2


def test_the_queue_takes_the_projections_of_the_first_view_after_the_step() -> None:
    method = made()
    before = method.queue.keys.clone()
    with torch.no_grad():
        z = nn.functional.normalize(method.encoder(images(0)[0]), dim=1)
    step(method, 0)
    torch.testing.assert_close(method.queue.keys[:N], z)
    assert torch.equal(method.queue.keys[N:], before[N:])
    assert method.queue.index[:N].tolist() == list(range(N))


def test_a_resumed_run_continues_bit_for_bit() -> None:
    first = made()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    step(first, 0, optimizer=optimizer)
    second = made(seed=1)
    resumed = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in (1, 2):
        one, other = step(first, number, 2, optimizer), step(second, number, 2, resumed)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_images_have_the_loss_of_chance_and_a_tie_is_a_failure(accumulate: int) -> None:
    method = made()
    batch = Batch(torch.arange(N), [torch.ones(N, 3, 2, 2)] * 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    measures = train_step(method, method, optimizer, scaler, batch, None, StepSettings(0.1, 0.9, accumulate))
    assert measures["loss"].item() == pytest.approx(math.log(N))
    assert measures["chance"].item() == pytest.approx(math.log(N))
    assert measures["contrast_accuracy"] == 0
    assert measures["negatives"] == N - 1


def test_orthogonal_images_that_are_in_the_queue_reach_the_floor() -> None:
    """NN(z) = z and p = z: log(1 + (N - 1) exp(-1 / T))."""
    method = NNCLR(nn.Flatten(), nn.Identity(), KeyQueue(N, P), T)
    method.queue.load(torch.eye(P)[:N])
    view = torch.eye(P)[:N].view(N, 3, 2, 2)
    output: Output = method([view, view], {}, torch.arange(N))
    assert output.loss.item() == pytest.approx(math.log(1 + (N - 1) * math.exp(-1 / T)), rel=1e-5)
    for name in ("contrast_accuracy", "neighbor_similarity", "positive_similarity"):
        assert output.measures[name].item() == pytest.approx(1)


def test_swapping_the_views_or_the_order_of_the_batch_changes_nothing() -> None:
    method, order = made(), torch.tensor([3, 0, 5, 4, 1, 2])
    views = images(0)
    one: Output = method(views, {}, torch.arange(N))
    for changed in (views[::-1], [view[order] for view in views]):
        other: Output = method(changed, {}, torch.arange(N))
        torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 1, "batch_size=1 leaves nnclr no negatives"),
        ("augment.views", 3, r"augment\.views=3 must be 2 for nnclr"),
        ("method.queue_size", 0, r"method\.queue_size=0 must be at least 1"),
        ("method.temperature", 0.0, r"method\.temperature=0\.0 must be above 0"),
        ("method.temperature_schedule", "learned", r"must be one of constant, cosine for nnclr"),
    ],
)
def test_invalid_values_are_refused(field: str, value: Any, message: str) -> None:
    config = TrainConfig(method=NNCLRConfig(queue_size=64), batch_size=8)
    config.model.bn, config.model.predictor_layers = "sync", 2
    check(config)
    *group, name = field.split(".")
    setattr(getattr(config, group[0]) if group else config, name, value)
    with pytest.raises(ConfigError, match=message):
        check(config)
