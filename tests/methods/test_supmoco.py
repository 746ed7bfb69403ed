"""SupMoCo: MoCo whose queue's keys of the query's class are positives, against loops and against MoCo.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder import UNKNOWN, KeyQueue, MoCo, Output, separate_unlabeled

N, C, K, P, T = 4, 3, 10, 12, 0.3
SAMPLES = 9


def linear_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))


def images(seed: int) -> list[Tensor]:
    return list(torch.randn(2, N, 3, 2, 2, generator=torch.Generator().manual_seed(seed)))


def indices(seed: int) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:N]


def steps(labels: Tensor | None, count: int, **options: Any) -> tuple[MoCo, list[Output], list[Tensor]]:
    """A few steps of training: the method, its outputs, and the gradients of the last one."""
    torch.manual_seed(0)
    queue = KeyQueue(K, C, options.pop("start", "random"), options.pop("mask_own_keys", True))
    method = MoCo(linear_encoder(), queue, T, labels=labels, **options)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9)
    outputs = []
    for number in range(count):
        views, index = images(number), indices(number)
        keys = method.encode_keys(views, None, N)
        output: Output = method(views, keys, index)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.update_momentum_encoder(0.8)
        assert output.new_keys is not None
        method.enqueue(output.new_keys, index)
        outputs.append(output)
    return method, outputs, [p.grad for p in method.parameters() if p.grad is not None]


@pytest.mark.parametrize("labels", [torch.arange(SAMPLES), torch.full((SAMPLES,), -1)])
@pytest.mark.parametrize("start", ["random", "empty"])
@pytest.mark.parametrize(("symmetric", "reduction"), [(False, "mean"), (True, "mean"), (True, "sum")])
def test_with_every_sample_its_own_class_it_is_moco_to_the_bit(
    labels: Tensor, start: str, symmetric: bool, reduction: Literal["mean", "sum"]
) -> None:
    options: dict[str, Any] = {"start": start, "symmetric": symmetric, "reduction": reduction}
    plain, expected, gradients = steps(None, 6, **options)
    method, outputs, got = steps(labels, 6, **options)
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output.loss, other.loss)
        assert output.measures["positives"].item() == 0
        for name, value in other.measures.items():
            assert torch.equal(output.measures[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(got, gradients, strict=True))
    state = method.state_dict()
    assert state.keys() == plain.state_dict().keys()  # the labels belong to the data, not to the checkpoint
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("mask_own_keys", [True, False])
@pytest.mark.parametrize("start", ["random", "empty"])
def test_loss_and_positives_equal_the_loops_while_the_ring_wraps_around(start: str, mask_own_keys: bool) -> None:
    """The labels are those of the samples that the queue shows, slot by slot, after 1 ... 7 batches of 4 into 10."""
    labels = torch.tensor([0, 1, 2, 0, 1, 0, -1, 2, -1])
    shown: list[int | None] = [None] * K  # which sample each slot holds
    for number in range(7):
        method, outputs, _ = steps(labels, number + 1, start=start, mask_own_keys=mask_own_keys)
        before, _, _ = steps(labels, number, start=start, mask_own_keys=mask_own_keys)
        index = indices(number).tolist()
        with torch.no_grad():
            q = F.normalize(before.encoder(images(number)[0]), dim=1).double()
            k = F.normalize(before.momentum_encoder(images(number)[1]), dim=1).double()
        losses, positives, negatives = [], 0, 0
        for n, i in enumerate(index):
            row, own = [float(q[n] @ k[n]) / T], [0]
            for slot, sample in enumerate(shown):
                if (sample is None and start == "empty") or (mask_own_keys and sample == i):
                    continue
                same = sample is not None and (sample == i or (labels[i] >= 0 and labels[sample] == labels[i]))
                own += [len(row)] if same else []
                row.append(float(q[n] @ before.queue.keys[slot].double()) / T)
            total = math.log(sum(math.exp(each) for each in row))
            losses.append(sum(total - row[p] for p in own) / len(own))
            positives += len(own) - 1
            negatives += len(row) - len(own)
        assert outputs[-1].loss.item() == pytest.approx(sum(losses) / N, rel=1e-4)
        assert outputs[-1].measures["positives"].item() == pytest.approx(positives / N)
        assert outputs[-1].measures["negatives"].item() == pytest.approx(negatives / N)
        for place, i in enumerate(index):
            shown[(number * N + place) % K] = i
        assert method.queue.index.tolist() == [UNKNOWN if each is None else each for each in shown]


def test_random_keys_have_no_class() -> None:
    """UNKNOWN is -1, which as a position would be the last sample."""
    torch.manual_seed(0)
    method = MoCo(
        linear_encoder(), KeyQueue(K, C, mask_own_keys=False), T, labels=torch.zeros(SAMPLES, dtype=torch.long)
    )
    output: Output = method(images(0), method.encode_keys(images(0), None, N), indices(0))
    assert output.measures["positives"].item() == 0
    assert output.measures["negatives"].item() == K


def test_all_keys_of_the_querys_class_are_positives() -> None:
    """Every candidate a positive: the loss is the mean of -log softmax over all of them, and finite."""
    torch.manual_seed(0)
    _, outputs, gradients = steps(torch.zeros(SAMPLES, dtype=torch.long), 5, mask_own_keys=False)
    assert outputs[-1].measures["positives"].item() == K
    assert outputs[-1].measures["negatives"].item() == 0
    assert torch.isfinite(outputs[-1].loss)
    assert all(torch.isfinite(each).all() for each in gradients)


def test_chance_is_the_loss_of_a_query_equally_similar_to_all_keys() -> None:
    method = MoCo(nn.Flatten(), KeyQueue(K, P, mask_own_keys=False), T, labels=torch.arange(SAMPLES) % 2)
    method.queue.index[:] = torch.arange(K) % SAMPLES
    method.queue.keys[:] = torch.eye(P)[5]
    x = torch.eye(P).view(P, 3, 2, 2)
    output: Output = method([x[:N], x[5].expand(N, 3, 2, 2)], {1: torch.eye(P)[5].expand(N, P)}, torch.arange(N))
    assert output.measures["positives"].item() > 0
    assert output.loss.item() == pytest.approx(output.measures["chance"].item(), rel=1e-6)


def test_unknown_labels_become_separate_new_classes() -> None:
    made = separate_unlabeled(torch.tensor([3, -1, 0, -1, 3]))
    assert made[[0, 2, 4]].tolist() == [3, 0, 3]
    assert len(set(made.tolist())) == 4
    assert (made[[1, 3]] < 0).all()
