"""The queue and the paper's Algorithm 1 by loops, and checks of a MoCo class against them.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import UNKNOWN, KeyQueue, MoCo, Output

Array = NDArray[np.float64]
N, C, K, P = 4, 3, 10, 12
SAMPLES = 7  # fewer than K, so queries meet their own stale keys
LR, MOMENTUM, DECAY, M, T = 0.5, 0.9, 0.01, 0.8, 0.3  # SGD's three, the momentum encoder's, the temperature


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
