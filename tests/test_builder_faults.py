"""Faults planted into MoCo, to see the checks fail.

Each check is a function of a MoCo class. `MoCo` itself passes all of them; each other class differs from it by one
fault that some published code base has had, and must fail its check.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.builder import UNKNOWN, KeyQueue, MoCo, Output, encode_keys
from moco.distributed import Order
from tests.algorithm_1 import (
    C,
    K,
    N,
    P,
    T,
    check_ring,
    check_steps_are_algorithm_1,
    images,
    indices,
    linear_encoder,
)

# ---- checks ----


def check_floor_is_below_log_2(make: type[MoCo]) -> None:
    """Equal views and a queue of other directions: log(1 + K exp(-1/T)), where the positive among the negatives
    gives log 2 and more."""
    method = make(nn.Flatten(), KeyQueue(K, P, mask_own_keys=False), 0.1)
    eye = torch.eye(P)
    method.queue.keys[:] = eye[2]
    x = eye[:2].view(2, 3, 2, 2)
    index = torch.tensor([0, 1])
    output: Output = method([x, x], method.encode_keys([x, x], None, 2), index)
    assert output.loss.item() == pytest.approx(math.log(1 + K * math.exp(-10)), rel=1e-3)
    assert output.measures["contrast_accuracy"].item() == 1.0


def check_logits_come_before_the_enqueue(make: type[MoCo]) -> None:
    """The loss uses the queue of the previous step, bit for bit."""
    torch.manual_seed(0)
    method = make(linear_encoder(), KeyQueue(K, C), T)
    for number in range(3):
        before = method.queue.keys.clone()
        views, index = [images(number), images(number + 50)], indices(number)
        keys = method.encode_keys(views, None, N)
        assert torch.equal(method.queue.keys, before)
        output: Output = method(views, keys, index)
        assert torch.equal(method.queue.keys, before)
        assert output.new_keys is not None
        method.enqueue(output.new_keys, index)
        assert not torch.equal(method.queue.keys, before)


def check_own_stale_keys_are_no_negatives(make: type[MoCo]) -> None:
    """A queue full of keys of the query's own image, and one of another."""
    method = make(nn.Flatten(), KeyQueue(K, P), 0.1)
    eye = torch.eye(P)
    method.queue.keys[:] = eye[0]
    method.queue.index[:] = 5
    method.queue.keys[-1], method.queue.index[-1] = eye[1], 6
    x = eye[:1].view(1, 3, 2, 2)
    output: Output = method([x, x], method.encode_keys([x, x], None, 1), torch.tensor([5]))
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-10)), rel=1e-3)
    assert output.measures["negatives"].item() == 1.0


def check_only_the_query_gets_a_gradient(make: type[MoCo]) -> None:
    method = make(linear_encoder(), KeyQueue(K, C), T)
    views = [images(0).requires_grad_(), images(1).requires_grad_()]
    output: Output = method(views, method.encode_keys(views, None, N), indices(0))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    assert views[0].grad is not None
    assert views[1].grad is None
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())
    assert method.queue.keys.grad is None


def check_queue_wraps_around(make: type[MoCo]) -> None:
    torch.manual_seed(0)
    method = make(linear_encoder(), KeyQueue(K, C), T)
    check_ring(type(method.queue), [4, 4, 4, 4])


def check_momentum_update(make: type[MoCo]) -> None:
    """Each parameter by a loop; then t updates to a constant query: k_t = q + m^t (k_0 - q)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, C))
    method = make(network, KeyQueue(K, C))
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    query = [parameter.detach().clone() for parameter in method.encoder.parameters()]
    start = [parameter.detach().clone() for parameter in method.momentum_encoder.parameters()]
    buffers = [buffer.clone() for buffer in method.momentum_encoder.buffers()]
    for t in range(1, 6):
        before = [parameter.detach().clone() for parameter in method.momentum_encoder.parameters()]
        method.update_momentum_encoder(0.9)
        for k, old, q, k0 in zip(method.momentum_encoder.parameters(), before, query, start, strict=True):
            torch.testing.assert_close(k.detach(), 0.9 * old + 0.1 * q)
            torch.testing.assert_close(k.detach(), q + 0.9**t * (k0 - q))
    for parameter, q in zip(method.encoder.parameters(), query, strict=True):
        assert torch.equal(parameter.detach(), q)
    for buffer, old in zip(method.momentum_encoder.buffers(), buffers, strict=True):
        assert torch.equal(buffer, old)


# ---- faults ----


class PositiveAmongNegatives(MoCo):
    """(a) The queue already holds the keys of this batch, each a negative of its own query."""

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        before = copy.deepcopy(self.queue.state_dict())
        self.enqueue(torch.stack(list(keys.values()), dim=1), torch.full_like(index, UNKNOWN))
        output = super().forward(views, keys, index, start)
        self.queue = KeyQueue(self.queue.size, self.queue.keys.shape[1], self.queue.start)
        self.queue.load_state_dict(before)
        return output


class EnqueueBeforeLogits(MoCo):
    """(b) lightly #1007: the keys of the batch replace the oldest before the logits."""

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        keys = super().encode_keys(views, shuffles, micro_batch)
        super().enqueue(torch.stack(list(keys.values()), dim=1), torch.full((len(views[0]),), UNKNOWN))
        return keys

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        pass


class _BlindQueue(KeyQueue):
    def negatives(self, index: Tensor) -> Tensor | None:
        return self.filled_mask()


class _CutQueue(KeyQueue):
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        room = self.size - int(self.count) % self.size
        super().enqueue(keys[:room], index[:room])


class StaleOwnKeyCounts(MoCo):
    """(c) The mask is computed but not applied."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queue = _BlindQueue(self.queue.size, self.queue.keys.shape[1], self.queue.start)


class MomentumSwapped(MoCo):
    """(d) f_k = (1 - m) f_k + m f_q."""

    def update_momentum_encoder(self, momentum: float) -> None:
        super().update_momentum_encoder(1 - momentum)


class MomentumBackwards(MoCo):
    """(d) The query encoder follows the momentum encoder."""

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        for q, k in zip(self.encoder.parameters(), self.momentum_encoder.parameters(), strict=True):
            q.mul_(momentum).add_(k, alpha=1 - momentum)


class GradientIntoKeys(MoCo):
    """(e) Keys are encoded with gradient."""

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        self.momentum_encoder.requires_grad_(True)
        with_gradient = inspect.unwrap(encode_keys)
        return {key: with_gradient(self.momentum_encoder, views[key], None) for _, key in self.directions}


class GradientIntoQueue(MoCo):
    """(e) The queue is trained."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queue.keys.requires_grad_(True)


class TailDropped(MoCo):
    """(f) lightly: keys that do not fit before the end of the ring are dropped."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queue = _CutQueue(self.queue.size, self.queue.keys.shape[1], self.queue.start)


FAULTS: list[tuple[type[MoCo], Callable[[type[MoCo]], None]]] = [
    (PositiveAmongNegatives, check_floor_is_below_log_2),
    (EnqueueBeforeLogits, check_logits_come_before_the_enqueue),
    (EnqueueBeforeLogits, check_floor_is_below_log_2),
    (StaleOwnKeyCounts, check_own_stale_keys_are_no_negatives),
    (MomentumSwapped, check_momentum_update),
    (MomentumBackwards, check_momentum_update),
    (GradientIntoKeys, check_only_the_query_gets_a_gradient),
    (GradientIntoQueue, check_only_the_query_gets_a_gradient),
    (TailDropped, check_queue_wraps_around),
]


PATH_FAULTS = [fault for fault in dict.fromkeys(fault for fault, _ in FAULTS) if "Gradient" not in fault.__name__]


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check in FAULTS))
def test_moco_passes_the_check(check: Callable[[type[MoCo]], None]) -> None:
    check(MoCo)  # asserts


@pytest.mark.parametrize(("fault", "check"), FAULTS)
def test_planted_fault_fails_its_check(fault: type[MoCo], check: Callable[[type[MoCo]], None]) -> None:
    with pytest.raises(AssertionError):
        check(fault)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fault", PATH_FAULTS)
def test_planted_fault_deviates_from_algorithm_1(fault: type[MoCo], symmetric: bool) -> None:
    with pytest.raises(AssertionError):
        check_steps_are_algorithm_1(fault, symmetric=symmetric)


def test_floor_of_the_first_fault_is_log_2() -> None:
    method = PositiveAmongNegatives(nn.Flatten(), KeyQueue(K, P, mask_own_keys=False), 0.01)
    eye = torch.eye(P)
    method.queue.keys[:] = eye[2]
    x = eye[:2].view(2, 3, 2, 2)
    loss = method([x, x], method.encode_keys([x, x], None, 2), torch.tensor([0, 1])).loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
