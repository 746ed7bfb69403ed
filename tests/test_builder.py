"""The queue, the momentum encoder and global_batch steps against loops, and faults planted to see the checks fail.

Each check is a function of a MoCo class. `MoCo` itself passes all of them; each class of the second half differs from
it by one fault that some published code base has had, and must fail its check.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import UNKNOWN, KeyQueue, MoCo, Output, encode_keys
from moco.models.norm import GroupedBatchNorm

Array = NDArray[np.float64]
N, C, K, P = 4, 3, 10, 12
SAMPLES = 7  # fewer than K, so queries meet their own stale keys
LR, MOMENTUM, DECAY, M, T = 0.5, 0.9, 0.01, 0.8, 0.3  # SGD's three, the momentum encoder's, the temperature


# ---- the queue ----


class Ring:
    """The queue in plain python."""

    def __init__(self, queue: KeyQueue) -> None:
        self.keys, self.index, self.count = queue.keys.tolist(), queue.index.tolist(), 0

    def enqueue(self, keys: list[list[float]], index: list[int]) -> None:
        for key, i in zip(keys, index, strict=True):
            self.keys[self.count % len(self.keys)] = key
            self.index[self.count % len(self.keys)] = i
            self.count += 1


def check_ring(make: type[KeyQueue], batches: Sequence[int], size: int = K) -> None:
    torch.manual_seed(0)
    queue = make(size, C)
    ring, number = Ring(queue), 0
    for n in batches:
        keys, index = torch.randn(n, C), torch.arange(number, number + n)
        queue.enqueue(keys, index)
        ring.enqueue(keys.tolist(), index.tolist())
        number += n
        assert queue.keys.tolist() == ring.keys
        assert queue.index.tolist() == ring.index
        assert int(queue.count) == ring.count
        assert queue.filled() == sum(i != UNKNOWN for i in ring.index)


@pytest.mark.parametrize(
    "batches",
    [
        [1] * 23,
        [5] * 5,  # divides K
        [4, 4, 4, 4, 4, 4],  # wraps around in the middle of a batch
        [3, 7, 2, 9, 1, 8, 0, 10, 6],
        [10, 10],
        [11],  # more than K
        [3, 25, 4, 40],
    ],
)
def test_queue_is_a_ring_for_any_batch(batches: list[int]) -> None:
    check_ring(KeyQueue, batches)


def test_queue_of_one_key_holds_the_newest() -> None:
    check_ring(KeyQueue, [1, 3, 2], size=1)


def test_a_random_queue_holds_unit_vectors_without_sample() -> None:
    queue = KeyQueue(K, C, mask_own_keys=False)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(K))
    assert queue.index.tolist() == [UNKNOWN] * K
    assert queue.filled() == 0
    assert queue.negatives(torch.arange(N)) is None


def test_in_an_empty_queue_only_filled_entries_are_negatives() -> None:
    queue = KeyQueue(K, C, "empty", mask_own_keys=False)
    for filled in (0, 4, 8, 10, 10):
        allowed = queue.negatives(torch.arange(N))
        assert allowed is not None
        assert allowed.tolist() == [[slot < filled for slot in range(K)]]
        queue.enqueue(torch.randn(4, C), torch.arange(4))


@pytest.mark.parametrize("start", ["random", "empty"])
def test_own_stale_keys_are_no_negatives_of_a_query(start: str) -> None:
    queue = KeyQueue(K, C, start)
    queue.enqueue(torch.randn(7, C), torch.tensor([5, 1, 5, 2, 9, 1, 3]))
    query = [1, 5, 8, 9]
    allowed = queue.negatives(torch.tensor(query))
    assert allowed is not None
    stored = [5, 1, 5, 2, 9, 1, 3]
    expected = [[stored[slot] != i if slot < 7 else start == "random" for slot in range(K)] for i in query]
    assert allowed.tolist() == expected


@pytest.mark.parametrize(("size", "start", "sentence"), [(0, "random", "method.queue_size=0"), (4, "zeros", "'zeros'")])
def test_queue_refuses_invalid_values(size: int, start: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KeyQueue(size, C, start)


# ---- a linear encoder, small enough for loops ----


def linear_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))


def weight(encoder: nn.Module) -> Tensor:
    (only,) = encoder.parameters()
    return only.detach()


def images(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))  # P = 12


def indices(seed: int, n: int = N) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:n]


def step(
    method: MoCo, optimizer: torch.optim.Optimizer, views: Sequence[Tensor], index: Tensor, momentum: float = M
) -> Output:
    """Run one step in the order of `moco.builder`."""
    keys = method.encode_keys(views, None, len(index))
    output: Output = method(views, keys, index)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    method.update_momentum_encoder(momentum)
    assert output.new_keys is not None
    method.enqueue(output.new_keys, index)
    return output


def sgd(method: MoCo) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.encoder.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


class Algorithm1:
    """The paper's Algorithm 1 on a linear encoder, by hand: numpy in float64, loops, no autograd."""

    def __init__(self, method: MoCo, start: str, mask_own_keys: bool, symmetric: bool, reduction: str) -> None:
        self.f_q: Array = weight(method.encoder).double().numpy().copy()  # (C, P)
        self.f_k: Array = weight(method.momentum_encoder).double().numpy().copy()
        self.velocity: Array = np.zeros_like(self.f_q)
        # (key, sample or None, counts as negative), the oldest first
        self.queue: list[tuple[Array, int | None, bool]] = [
            (key.double().numpy().copy(), None, start == "random") for key in method.queue.keys
        ]
        self.mask_own_keys, self.symmetric, self.mean = mask_own_keys, symmetric, reduction == "mean"

    def direction(self, x_q: Array, keys: list[Array], index: list[int]) -> tuple[float, Array, dict[str, float]]:
        """Loss of one direction, its gradient with respect to f_q, and what is measured."""
        loss, gradient, correct, positive, negatives = 0.0, np.zeros_like(self.f_q), 0.0, 0.0, 0.0
        for x, k, i in zip(x_q, keys, index, strict=True):
            z = self.f_q @ x
            length = math.sqrt(float(z @ z))
            q = z / length
            against = [k]
            for other, owner, counts in self.queue:
                if counts and not (self.mask_own_keys and owner == i):
                    against.append(other)
            logits = [float(q @ other) / T for other in against]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            loss += (log_sum - logits[0]) / len(index)
            at_q = -k / T
            for logit, other in zip(logits, against, strict=True):
                at_q = at_q + math.exp(logit - log_sum) * other / T
            at_z = (at_q - q * float(q @ at_q)) / length
            gradient += np.outer(at_z, x) / len(index)
            correct += all(logits[0] > logit for logit in logits[1:]) / len(index)
            positive += float(q @ k) / len(index)
            negatives += (len(against) - 1) / len(index)
        measures = {"contrast_accuracy": correct, "positive_similarity": positive, "negatives": negatives}
        return loss, gradient, measures

    def step(self, views: Sequence[Tensor], index: list[int]) -> tuple[float, dict[str, float]]:
        x: list[Array] = [view.flatten(1).double().numpy() for view in views]  # (N, P) each
        directions = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]
        keys: dict[int, list[Array]] = {}
        for _, view in directions:
            keys[view] = []
            for image in x[view]:
                z = self.f_k @ image
                keys[view].append(z / math.sqrt(float(z @ z)))
        parts = [self.direction(x[a], keys[b], index) for a, b in directions]
        share = 1 / len(parts) if self.mean else 1.0
        loss = sum(share * part[0] for part in parts)
        gradient = sum((share * part[1] for part in parts), np.zeros_like(self.f_q))
        self.velocity = MOMENTUM * self.velocity + gradient + DECAY * self.f_q
        self.f_q = self.f_q - LR * self.velocity
        self.f_k = M * self.f_k + (1 - M) * self.f_q
        for view in sorted(keys):  # view after view, as the notebook concatenates them
            for key, i in zip(keys[view], index, strict=True):
                self.queue = [*self.queue[1:], (key, i, True)]
        return loss, {name: sum(part[2][name] for part in parts) / len(parts) for name in parts[0][2]}


def check_steps_are_algorithm_1(
    make: type[MoCo],
    start: str = "random",
    mask_own_keys: bool = True,
    symmetric: bool = False,
    reduction: Literal["sum", "mean"] = "mean",
    steps: int = 6,
) -> None:
    torch.manual_seed(0)
    method = make(linear_encoder(), KeyQueue(K, C, start, mask_own_keys), T, symmetric, reduction)
    reference = Algorithm1(method, start, mask_own_keys, symmetric, reduction)
    optimizer = sgd(method)
    for number in range(steps):
        views, index = [images(2 * number), images(2 * number + 1)], indices(number)
        output = step(method, optimizer, views, index)
        loss, measures = reference.step(views, index.tolist())
        assert output.loss.item() == pytest.approx(loss, rel=1e-4, abs=1e-6)
        for name, value in measures.items():
            assert output.measures[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(weight(method.encoder), reference.f_q, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(weight(method.momentum_encoder), reference.f_k, rtol=1e-3, atol=1e-5)
        ours = torch.roll(method.queue.keys, -int(method.queue.count) % K, dims=0)  # the oldest first
        np.testing.assert_allclose(ours, np.stack([key for key, _, _ in reference.queue]), rtol=1e-3, atol=1e-5)
        owners = torch.roll(method.queue.index, -int(method.queue.count) % K).tolist()
        assert owners == [UNKNOWN if i is None else i for _, i, _ in reference.queue]


@pytest.mark.parametrize("start", ["random", "empty"])
@pytest.mark.parametrize("mask_own_keys", [True, False])
@pytest.mark.parametrize(("symmetric", "reduction"), [(False, "mean"), (True, "mean"), (True, "sum")])
@pytest.mark.parametrize("streamed", [False, True])
def test_steps_are_algorithm_1(
    start: str,
    mask_own_keys: bool,
    symmetric: bool,
    reduction: Literal["sum", "mean"],
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if streamed:
        monkeypatch.setattr("moco.builder.STREAM_FROM", 1)
    check_steps_are_algorithm_1(MoCo, start, mask_own_keys, symmetric, reduction)


# ---- state ----


def test_state_dict_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    first = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric=True)
    optimizer = sgd(first)
    for number in range(2):
        step(first, optimizer, [images(number), images(number + 50)], indices(number))
    second = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = sgd(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {"queue.keys", "queue.index", "queue.count"} <= set(first.state_dict())
    for number in range(2, 5):
        views, index = [images(number), images(number + 50)], indices(number)
        assert torch.equal(step(first, optimizer, views, index).loss, step(second, resumed, views, index).loss)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_momentum_encoder_starts_as_an_independent_copy() -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    assert torch.equal(weight(method.encoder), weight(method.momentum_encoder))
    assert weight(method.encoder).data_ptr() != weight(method.momentum_encoder).data_ptr()
    assert not any(parameter.requires_grad for parameter in method.momentum_encoder.parameters())
    assert all(parameter.requires_grad for parameter in method.encoder.parameters())


@pytest.mark.parametrize("reduction", ["max", ""])
def test_unknown_reduction_is_refused(reduction: Any) -> None:
    with pytest.raises(ValueError, match=f"method.reduction='{reduction}' must be 'sum' or 'mean'"):
        MoCo(linear_encoder(), KeyQueue(K, C), reduction=reduction)


# ---- momentum update ----


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


def test_momentum_update_equals_the_papers() -> None:
    check_momentum_update(MoCo)


@pytest.mark.parametrize(("momentum", "moves"), [(1.0, 0.0), (0.0, 1.0)])
def test_momentum_1_keeps_and_0_copies(momentum: float, moves: float) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    start = weight(method.momentum_encoder).clone()
    with torch.no_grad():
        next(method.encoder.parameters()).add_(1.0)
    method.update_momentum_encoder(momentum)
    torch.testing.assert_close(weight(method.momentum_encoder), start + moves)


# ---- shuffled keys ----


def test_shuffle_changes_the_batch_norm_groups_of_the_keys_and_nothing_else() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, C), GroupedBatchNorm(C, 2))
    method = MoCo(encoder, KeyQueue(K, C), symmetric=True)
    views = [images(0, 6), images(1, 6)]
    shuffles = [np.array([3, 0, 5, 1, 4, 2]), np.array([2, 4, 0, 3, 5, 1])]
    keys = method.encode_keys(views, shuffles, 6)
    for view, order in enumerate(shuffles):
        for start in range(0, 6, 2):
            members = order[start : start + 2].tolist()  # those that BN sees together
            together = F.normalize(method.momentum_encoder(views[view][members]), dim=1)
            torch.testing.assert_close(keys[view][members], together, rtol=1e-4, atol=1e-5)
    assert (method.encode_keys(views, None, 6)[0] - keys[0]).abs().max() > 0.1


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_without_batch_norm_neither_shuffle_nor_micro_batches_change_the_keys(micro_batch: int) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    views = [images(0, 6), images(1, 6)]
    order = np.array([3, 0, 5, 1, 4, 2])
    keys = method.encode_keys(views, [order, order], micro_batch)
    assert list(keys) == [1]
    expected = F.normalize(views[1].flatten(1) @ weight(method.encoder).T, dim=1)
    torch.testing.assert_close(keys[1], expected)


# ---- at the start ----


@pytest.mark.parametrize("symmetric", [False, True])
def test_at_initialization_the_loss_is_near_chance(symmetric: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, 128))
    reductions: list[Literal["mean", "sum"]] = ["mean", "sum"]
    for reduction in reductions:
        method = MoCo(encoder, KeyQueue(1024, 128), 1.0, symmetric, reduction)
        views = [images(0, 64), images(1, 64)]  # unrelated images, so no positive is easy
        loss = method(views, method.encode_keys(views, None, 64), torch.arange(64)).loss.item()
        directions = 2 if symmetric and reduction == "sum" else 1
        assert loss / directions == pytest.approx(math.log(1 + 1024), abs=0.1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_an_empty_queue_the_first_loss_and_gradient_are_zero(symmetric: bool) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric)
    views = [images(0), images(1)]
    output: Output = method(views, method.encode_keys(views, None, N), indices(0))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.measures["negatives"].item() == 0.0
    for parameter in method.encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max().item() == 0.0


# ---- checks that planted faults must fail ----


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
        shuffles: Sequence[NDArray[np.int64]] | None = None,
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
        shuffles: Sequence[NDArray[np.int64]] | None = None,
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
