"""ReSSL against its equations in numpy: losses, momentum encoder and queue over several steps.

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

from moco.builder import KeyQueue
from moco.config import ConfigError, TrainConfig, check
from moco.data.loader import Batch
from moco.methods.ressl import ReSSL
from moco.methods.ressl_config import ReSSLConfig
from moco.training.step import StepSettings, train_step

Array = NDArray[np.float64]
N, C, K, P = 4, 3, 10, 12
LR, M, T, TEACHER = 0.3, 0.8, 0.3, 0.1


def made(seed: int = 0) -> ReSSL:
    torch.manual_seed(seed)
    return ReSSL(nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False)), KeyQueue(K, C), T, TEACHER)


def images(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, 3, 2, 2, generator=generator) for _ in range(2)]


def step(method: ReSSL, optimizer: torch.optim.Optimizer, number: int, accumulate: int = 1) -> Any:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = Batch(torch.arange(N) + N * number, images(number))
    return train_step(method, method, optimizer, scaler, batch, None, StepSettings(LR, M, accumulate))


def weight(module: nn.Module) -> Array:
    (only,) = module.parameters()
    return only.detach().double().numpy().copy()


def unit(x: Array) -> Array:
    length: Array = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / length


def loss_of(f_q: Array, f_k: Array, queue: Array, strong: Array, weak: Array) -> float:
    total = 0.0
    for q, k in zip(unit(strong @ f_q.T), unit(weak @ f_k.T), strict=True):
        teacher = [math.exp(float(k @ key) / TEACHER) for key in queue]
        student = [math.exp(float(q @ key) / T) for key in queue]
        for p, r in zip(teacher, student, strict=True):
            total -= p / sum(teacher) * math.log(r / sum(student)) / len(strong)
    return total


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_follow_the_paper(accumulate: int) -> None:
    method = made()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=LR)
    f_q, f_k, queue = weight(method.encoder), weight(method.momentum_encoder), method.queue.keys.double().numpy().copy()
    for number in range(4):
        strong, weak = (view.flatten(1).double().numpy() for view in images(number))
        loss = loss_of(f_q, f_k, queue, strong, weak)
        gradient = np.zeros_like(f_q)
        for at in np.ndindex(*f_q.shape):
            change = np.zeros_like(f_q)
            change[at] = 1e-5
            values = [loss_of(f_q + sign * change, f_k, queue, strong, weak) for sign in (1, -1)]
            gradient[at] = (values[0] - values[1]) / 2e-5
        assert step(method, optimizer, number, accumulate)["loss"].item() == pytest.approx(loss, rel=1e-4)
        keys = unit(weak @ f_k.T)
        f_q = f_q - LR * gradient
        f_k = M * f_k + (1 - M) * f_q
        for row, key in enumerate(keys):  # after the loss
            queue[(N * number + row) % K] = key
        np.testing.assert_allclose(weight(method.encoder), f_q, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(weight(method.momentum_encoder), f_k, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(method.queue.keys.numpy(), queue, rtol=1e-3, atol=1e-4)


def test_the_first_view_is_the_student() -> None:
    method = made()
    strong, weak = images(0)
    assert set(method.encode_keys([strong, weak], None, N)) == {1}
    one = method([strong, weak], method.encode_keys([strong, weak]), torch.arange(N)).loss
    other = method([weak, strong], method.encode_keys([weak, strong]), torch.arange(N)).loss
    assert abs(one.item() - other.item()) > 1e-3


def test_a_resumed_run_continues_bit_for_bit() -> None:
    first, second = made(), made(seed=1)
    optimizers = [torch.optim.SGD(each.encoder.parameters(), lr=LR, momentum=0.9) for each in (first, second)]
    step(first, optimizers[0], 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in (1, 2):
        one, other = step(first, optimizers[0], number), step(second, optimizers[1], number)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augment.views", 1, r"augment\.views=1 must be 2 for ressl"),
        ("method.queue_size", 0, r"method\.queue_size=0 must be at least 1"),
        ("method.teacher_temperature", 0.0, r"method\.teacher_temperature=0\.0 must be above 0"),
        ("method.momentum", 1.5, r"method\.momentum=1\.5 must be .* at most 1"),
        ("method.temperature_schedule", "learned", r"must be one of constant, cosine for ressl"),
        ("model.predictor_layers", 2, r"model\.predictor_layers=2: ressl has no predictor"),
    ],
)
def test_invalid_values_are_refused(field: str, value: Any, message: str) -> None:
    config = TrainConfig(method=ReSSLConfig(queue_size=64), batch_size=32)
    check(config)
    group, name = field.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=message):
        check(config)
