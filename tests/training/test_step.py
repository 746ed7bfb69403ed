"""One training step: micro-batches, failed steps, clipping, precision and determinism."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.config import OptimConfig
from moco.data.loader import Batch
from moco.models.encoder import build_encoder
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer, load_optimizer
from moco.runtime.errors import NonFiniteLoss
from moco.training.build import set_batch_norm_calls
from moco.training.step import StepSettings, train_step

N, SIZE, DIM, K, GROUP = 16, 8, 8, 40, 4


class Trainer:
    """The same method and optimizer each time, and steps on random images that depend on the step's number."""

    def __init__(self, accumulate: int = 1, symmetric: bool = False, momentum: float = 0.9, fp16: bool = False) -> None:
        torch.manual_seed(0)
        encoder = build_encoder("convnet", {"width": 4}, 2, 0, DIM, "grouped", GROUP)
        self.method = MoCo(encoder, KeyQueue(K, DIM), 0.2, symmetric)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.method.encoder.parameters(), lr=99.0, momentum=momentum, weight_decay=1e-3
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)
        self.accumulate = accumulate
        set_batch_norm_calls(self.method, accumulate)
        self.method.train()

    def step(
        self,
        number: int,
        precision: torch.dtype = torch.float32,
        clip_grad: float = 0.0,
        change: Callable[[list[Tensor]], object] = lambda views: None,
        lr: float = 0.05,
        check_finite: bool = True,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(N, 3, SIZE, SIZE, generator=generator)
        views = [images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2)]
        change(views)
        shuffles: Sequence[NDArray[np.int64]] = [np.random.default_rng(2 * number + v).permutation(N) for v in range(2)]
        return train_step(
            self.method,
            self.method,
            self.optimizer,
            self.scaler,
            Batch(torch.randperm(100, generator=generator)[:N], views),
            shuffles,
            StepSettings(lr, 0.9, self.accumulate, precision, clip_grad, check_finite),
        )

    def state(self) -> dict[str, Tensor]:
        """Return a copy of weights, statistics, queue and optimizer state."""
        state = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
        for number, memory in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{name}": value.clone() for name, value in memory.items()}
        return state


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if bits(a[name]) != bits(b[name])] == []


def nan_image(views: list[Tensor]) -> None:
    views[0][3, 1, 2, 2] = math.nan


def nan_key_image(views: list[Tensor]) -> None:
    views[1][3, 1, 2, 2] = math.nan


# ---- accumulation ----


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_train_like_the_full_batch(accumulate: int, symmetric: bool) -> None:
    full, parts = Trainer(1, symmetric), Trainer(accumulate, symmetric)
    for number in range(3):
        expected, got = full.step(number), parts.step(number)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
        for p, q in zip(parts.method.encoder.parameters(), full.method.encoder.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        a, b = parts.state(), full.state()
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] - b[name]).abs().max() <= 1e-5 * (1 + b[name].abs().max()), name


@pytest.mark.parametrize(("accumulate", "symmetric"), [(1, False), (4, False), (2, True)])
def test_one_step_is_one_momentum_update_and_one_enqueue(accumulate: int, symmetric: bool) -> None:
    trainer = Trainer(accumulate, symmetric)
    before = [k.detach().clone() for k in trainer.method.momentum_encoder.parameters()]
    trainer.step(0)
    for k, old, q in zip(
        trainer.method.momentum_encoder.parameters(), before, trainer.method.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(k.detach(), 0.9 * old + 0.1 * q.detach())
    assert int(trainer.method.queue.count) == (2 if symmetric else 1) * N
    tracked = [b for name, b in trainer.method.named_buffers() if name.endswith("num_batches_tracked")]
    assert [int(each) for each in tracked] == [2 if symmetric else 1] * 10  # once per view, as torch's BN


def test_the_keys_that_were_compared_are_the_keys_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    seen: list[Tensor] = []
    original = trainer.method.encode_keys

    def spy(*args: Any) -> dict[int, Tensor]:
        keys = original(*args)
        seen.append(keys[1].clone())
        return keys

    monkeypatch.setattr(trainer.method, "encode_keys", spy)
    for number in range(2):
        trainer.step(number)
    assert torch.equal(trainer.method.queue.keys[: 2 * N], torch.cat(seen))


def test_the_step_uses_the_given_learning_rate() -> None:
    slow, fast = Trainer(momentum=0.0), Trainer(momentum=0.0)
    start = [p.detach().clone() for p in slow.method.encoder.parameters()]
    slow.step(0, lr=0.01)
    fast.step(0, lr=0.02)
    assert {group["lr"] for group in fast.optimizer.param_groups} == {0.02}
    for p, q, old in zip(slow.method.encoder.parameters(), fast.method.encoder.parameters(), start, strict=True):
        torch.testing.assert_close(2 * (p.detach() - old), q.detach() - old, rtol=1e-3, atol=1e-6)


# ---- failures ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("change", [nan_image, nan_key_image])
@pytest.mark.parametrize("before", [0, 2])
def test_a_nan_in_an_image_changes_nothing_and_training_can_continue(
    before: int, change: Callable[[list[Tensor]], None], accumulate: int
) -> None:
    trainer, twin = Trainer(accumulate), Trainer(accumulate)
    for number in range(before):
        trainer.step(number)
        twin.step(number)
    with pytest.raises(NonFiniteLoss, match="loss nan"):
        trainer.step(50, change=change)
    assert_bit_equal(trainer.state(), twin.state())
    assert torch.equal(trainer.step(7)["loss"], twin.step(7)["loss"])
    assert_bit_equal(trainer.state(), twin.state())


@pytest.mark.parametrize("where", ["encoder", "momentum_encoder"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_weight_changes_nothing_else(where: str, value: float) -> None:
    trainer = Trainer()
    trainer.step(0)
    with torch.no_grad():
        next(getattr(trainer.method, where).parameters()).view(-1)[5] = value
    before = trainer.state()
    with pytest.raises(NonFiniteLoss):
        trainer.step(1)
    assert_bit_equal(trainer.state(), before)


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_non_finite_gradient_changes_nothing(clip_grad: float) -> None:
    trainer = Trainer()
    trainer.step(0)
    before = trainer.state()
    next(trainer.method.encoder.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"loss \d+\.\d+, gradient norm (nan|inf)"):
        trainer.step(1, clip_grad=clip_grad)
    assert_bit_equal(trainer.state(), before)


def test_fp16_overflow_skips_update_and_enqueue_and_lowers_the_scale() -> None:
    trainer = Trainer(fp16=True)
    trainer.step(0)
    before, scale = trainer.state(), trainer.scaler.get_scale()
    hook = next(trainer.method.encoder.parameters()).register_hook(lambda gradient: gradient * math.inf)
    trainer.step(1)
    assert_bit_equal(trainer.state(), before)
    assert trainer.scaler.get_scale() == scale / 2
    hook.remove()
    trainer.step(2)
    assert int(trainer.method.queue.count) == 2 * N


def test_fp16_that_overflows_at_every_scale_raises() -> None:
    """A gradient that no scale makes finite comes from the model: a run must not skip steps forever."""
    trainer = Trainer(fp16=True)
    next(trainer.method.encoder.parameters()).register_hook(lambda gradient: gradient * math.nan)
    for number in range(17):  # 2**16 halved seventeen times is below 1
        trainer.step(number)
    with pytest.raises(NonFiniteLoss):
        trainer.step(17)
    assert trainer.scaler.get_scale() < 1
    assert int(trainer.method.queue.count) == 0


def test_a_scaled_loss_trains_like_an_unscaled_one() -> None:
    scaled, plain = Trainer(fp16=True), Trainer()
    for number in range(2):
        scaled.step(number)
        plain.step(number)
    a, b = scaled.state(), plain.state()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


# ---- clipping ----


def test_clipping_shortens_the_gradient_to_the_limit_and_keeps_its_direction() -> None:
    free, clipped = Trainer(momentum=0.0), Trainer(momentum=0.0)
    norm = free.step(0)["gradient_norm"].item()
    limit = norm / 3
    assert clipped.step(0, clip_grad=limit)["gradient_norm"].item() == pytest.approx(norm)  # the norm before clipping
    total = 0.0
    for p, q in zip(clipped.method.encoder.parameters(), free.method.encoder.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad / 3, rtol=1e-4, atol=1e-7)
        total += p.grad.square().sum().item()
    assert math.sqrt(total) == pytest.approx(limit, rel=1e-4)


def test_a_gradient_below_the_limit_is_unchanged() -> None:
    free, clipped = Trainer(), Trainer()
    norm = free.step(0)["gradient_norm"].item()
    clipped.step(0, clip_grad=2 * norm)
    assert_bit_equal(clipped.state(), free.state())


def test_a_clipped_step_moves_the_weights_by_lr_times_the_limit() -> None:
    trainer = Trainer(momentum=0.0)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
    start = nn.utils.parameters_to_vector(trainer.method.encoder.parameters()).detach().clone()
    trainer.step(0, clip_grad=0.01, lr=2.0)
    moved = nn.utils.parameters_to_vector(trainer.method.encoder.parameters()).detach() - start
    assert moved.norm().item() == pytest.approx(2.0 * 0.01, rel=1e-3)


# ---- precision ----


def test_bf16_is_close_to_float32_and_keeps_float32_weights_and_keys() -> None:
    exact, low = Trainer(), Trainer()
    for number in range(3):
        a, b = exact.step(number)["loss"].item(), low.step(number, torch.bfloat16)["loss"].item()
        assert a != b
        assert b == pytest.approx(a, rel=0.02)
    assert {tensor.dtype for tensor in low.state().values() if tensor.is_floating_point()} == {torch.float32}


def test_a_step_is_deterministic() -> None:
    first, second = Trainer(2, True), Trainer(2, True)
    for number in range(2):
        first.step(number)
        second.step(number)
    assert_bit_equal(first.state(), second.state())


def test_measures_are_scalars_of_the_full_batch() -> None:
    trainer = Trainer(2)
    twin = copy.deepcopy(trainer.method)
    set_calls_per_step(twin.encoder, 1)
    set_calls_per_step(twin.momentum_encoder, 1)
    kept: list[list[Tensor]] = []
    measures = trainer.step(0, change=kept.append)
    hardness = {"contrast_accuracy", "positive_similarity", "effective_negatives", "push"}
    assert set(measures) == {"loss", "negatives", "chance", "gradient_norm"} | hardness
    assert all(value.shape == () and not value.requires_grad for value in measures.values())
    shuffles = [np.random.default_rng(v).permutation(N) for v in range(2)]
    keys = twin.encode_keys(kept[0], shuffles, N)
    output = twin(kept[0], keys, torch.arange(1000, 1000 + N))
    assert measures["loss"].item() == pytest.approx(output.loss.item(), rel=1e-5)
    for name, value in output.measures.items():
        assert measures[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_without_waiting_for_the_loss_a_step_computes_the_same() -> None:
    waiting, late = Trainer(2, True), Trainer(2, True)
    for number in range(2):
        a, b = waiting.step(number), late.step(number, check_finite=False)
        assert {name: value.item() for name, value in a.items()} == {name: value.item() for name, value in b.items()}
    assert_bit_equal(waiting.state(), late.state())


def test_without_waiting_a_non_finite_loss_is_in_the_measures() -> None:
    trainer = Trainer()
    assert math.isnan(trainer.step(0, change=nan_image, check_finite=False)["loss"].item())


# ---- optimizer state ----


def test_an_overflow_in_the_first_step_does_not_change_the_optimizer() -> None:
    trainer = Trainer(fp16=True)
    trainer.optimizer = build_optimizer(trainer.method.encoder, OptimConfig(weight_decay=1e-3), lr=0.05)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows until the scale is lower
    seen = []
    for number in range(30):
        trainer.step(number, torch.float16)
        moments = [state["momentum_buffer"] for state in trainer.optimizer.state.values() if "momentum_buffer" in state]
        seen.append(max((float(m.abs().max()) for m in moments), default=0.0))
    assert seen[0] == 0.0
    assert 0 < max(seen) < 100
    assert all(math.isfinite(value) for value in seen)


def test_fp16_continues_after_a_skipped_step() -> None:
    trainer = Trainer(fp16=True)
    with pytest.raises(NonFiniteLoss):
        trainer.step(0, torch.float16, change=nan_image)
    before = trainer.scaler.get_scale()
    assert math.isfinite(trainer.step(1, torch.float16)["loss"].item())
    assert trainer.scaler.get_scale() in (before, before / 2)


def test_a_network_without_statistics_raises_the_same_error() -> None:
    trainer = Trainer()
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, DIM))
    trainer.method = MoCo(encoder, KeyQueue(K, DIM), 0.2)
    trainer.optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    with pytest.raises(NonFiniteLoss):
        trainer.step(0, change=nan_image)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_state_uses_the_memory_format_of_its_parameter(name: str) -> None:
    def network(layout: torch.memory_format) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Conv2d(4, 8, 3).to(memory_format=layout)

    def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()

    plain = network(torch.contiguous_format)
    first = build_optimizer(plain, OptimConfig(name=name, weight_decay=0.0), lr=1e-3)
    steps(plain, first, range(3))
    other = network(torch.channels_last)
    other.load_state_dict(plain.state_dict())
    second = build_optimizer(other, OptimConfig(name=name, weight_decay=0.0), lr=1e-3)
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    steps(plain, first, range(3, 6))
    steps(other, second, range(3, 6))
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
