"""Distillation: both losses against numpy over several steps, the frozen teacher, resume, and refused values.

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
from moco.methods.distill import Distill
from moco.methods.distill_config import DistillConfig
from moco.training.step import StepSettings, train_step

Array = NDArray[np.float64]
N, C, K, P = 4, 3, 10, 12
LR, T, TEACHER = 0.3, 0.3, 0.1


def linear(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))


def made(queue: bool, views: int = 1, seed: int = 0, teacher: int = 7) -> Distill:
    student = linear(seed)
    return Distill(student, linear(teacher), KeyQueue(K, C) if queue else None, T, TEACHER, views)


def images(seed: int, views: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, 3, 2, 2, generator=generator) for _ in range(views)]


def step(method: Distill, optimizer: torch.optim.Optimizer, number: int, accumulate: int = 1) -> Any:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = Batch(torch.arange(N) + N * number, images(number, method.passes))
    return train_step(method, method, optimizer, scaler, batch, None, StepSettings(LR, 0.9, accumulate))


def unit(x: Array) -> Array:
    length: Array = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / length


def loss_of(student: Array, teacher: Array, queue: Array | None, views: list[Array]) -> float:
    total = 0.0
    for x in views:
        for s, t in zip(unit(x @ student.T), unit(x @ teacher.T), strict=True):
            if queue is None:
                total += 1 - float(s @ t)
                continue
            candidates = [t, *queue]
            p, r = [[math.exp(float(e @ each) / tau) for each in candidates] for e, tau in ((t, TEACHER), (s, T))]
            total -= sum(a / sum(p) * math.log(b / sum(r)) for a, b in zip(p, r, strict=True))
    return total / len(views) / N


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("with_queue", "views"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_steps_follow_the_equations(with_queue: bool, views: int, accumulate: int) -> None:
    method = made(with_queue, views)
    optimizer = torch.optim.SGD(method.parameters(), lr=LR)
    (weight,) = method.parameters()  # the teacher is none of them
    student = weight.detach().double().numpy().copy()
    (fixed,) = linear(7).parameters()
    teacher = fixed.detach().double().numpy()
    queue = None if method.queue is None else method.queue.keys.double().numpy().copy()
    for number in range(3):
        x = [view.flatten(1).double().numpy() for view in images(number, views)]
        gradient = np.zeros_like(student)
        for at in np.ndindex(*student.shape):
            change = np.zeros_like(student)
            change[at] = 1e-5
            values = [loss_of(student + sign * change, teacher, queue, x) for sign in (1, -1)]
            gradient[at] = (values[0] - values[1]) / 2e-5
        expected = loss_of(student, teacher, queue, x)
        assert step(method, optimizer, number, accumulate)["loss"].item() == pytest.approx(expected, rel=1e-4)
        student = student - LR * gradient
        np.testing.assert_allclose(weight.detach().numpy(), student, rtol=1e-3, atol=1e-4)
        if queue is not None and method.queue is not None:
            for row, key in enumerate(unit(x[0] @ teacher.T)):  # after the loss
                queue[(N * number + row) % K] = key
            np.testing.assert_allclose(method.queue.keys.numpy(), queue, rtol=1e-3, atol=1e-4)


def test_a_student_like_its_teacher_has_cosine_loss_0_and_finds_every_image() -> None:
    method = made(queue=False, seed=7)
    views = images(0)
    output = method(views, method.encode_keys(views), torch.arange(N))
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert output.measures["contrast_accuracy"] == 1
    assert output.measures["chance"] == 1


def test_the_teacher_stays_frozen_and_out_of_the_state() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(P), nn.Dropout(0.5), nn.Linear(P, C))
    before = copy.deepcopy(teacher.state_dict())
    method = Distill(linear(0), teacher)
    method.train()
    optimizer = torch.optim.SGD(method.parameters(), lr=LR)
    views = images(0)
    one, other = method.encode_keys(views)[0], method.encode_keys(views)[0]
    assert torch.equal(one, other)  # no dropout
    step(method, optimizer, 0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert set(method.state_dict()) == {"encoder.1.weight", "teacher_digest"}
    method.double()
    assert {value.dtype for value in teacher.parameters()} == {torch.float64}  # it is moved with the method


@pytest.mark.parametrize("with_queue", [False, True])
def test_a_resumed_run_continues_bit_for_bit_and_refuses_another_teacher(with_queue: bool) -> None:
    first, second = made(with_queue), made(with_queue, seed=1)
    optimizers = [torch.optim.SGD(each.parameters(), lr=LR, momentum=0.9) for each in (first, second)]
    step(first, optimizers[0], 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in (1, 2):
        one, other = step(first, optimizers[0], number), step(second, optimizers[1], number)
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"method\.teacher has other weights"):
        made(with_queue, teacher=8).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method.teacher", "", r"method\.teacher='' must not be empty, e\.g\. method\.teacher=runs/digits"),
        ("method.loss", "queue", r"method\.queue_size=0 does not fit method\.loss=queue"),
        ("method.queue_size", 64, r"method\.queue_size=64 does not fit method\.loss=cosine"),
        ("method.teacher_temperature", 0.0, r"method\.teacher_temperature=0\.0 must be above 0"),
        ("method.teacher_features", "head", r"must be one of backbone, projection"),
        ("augment.views", 0, r"augment\.views=0 must be at least 1"),
        ("model.predictor_layers", 2, r"model\.predictor_layers=2: distill has no predictor"),
    ],
)
def test_invalid_values_are_refused(field: str, value: Any, message: str) -> None:
    config = TrainConfig(method=DistillConfig(teacher="x.pth"), batch_size=32)
    check(config)
    group, name = field.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_a_published_teacher_has_neither_a_file_nor_a_head() -> None:
    for field, value in (("teacher_backbone", "resnet18"), ("teacher_features", "projection")):
        config = TrainConfig(method=DistillConfig(teacher="timm/resnet18"), batch_size=32)
        check(config)
        setattr(config.method, field, value)
        with pytest.raises(ConfigError, match="published weights"):
            check(config)
