"""Ages against a simulated queue, drift, and the shares of false negatives against loops."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.analysis import (
    EMPTY,
    duplicate_share,
    key_ages,
    key_drift,
    own_key_share,
    same_label_share,
    similar_share,
    staleness,
)
from moco.analysis.doctor import Facts
from moco.analysis.doctor.settings import share_meeting_own_keys
from moco.builder import UNKNOWN, KeyQueue
from tests.losses.loops import coins, mean, unit

N, C, K = 4, 6, 10


@pytest.mark.parametrize("batch", [1, 3, 5, 10, 13])
def test_ages_equal_those_of_a_simulated_queue(batch: int) -> None:
    """The index of the queue holds the step that enqueued the key."""
    queue = KeyQueue(K, C)
    assert key_ages(queue.count, queue.size, batch).tolist() == [EMPTY] * K
    for step in range(9):
        queue.enqueue(unit(batch, C, seed=step), torch.full((batch,), step))
        expected = [EMPTY if born == UNKNOWN else step - born for born in queue.index.tolist()]
        assert key_ages(queue.count, queue.size, batch).tolist() == expected


def test_drift_compares_keys_of_the_same_image() -> None:
    queue = KeyQueue(K, C)
    stored = unit(7, C, seed=0)
    queue.enqueue(stored, torch.tensor([30, 10, 20, 50, 40, 60, 70]))
    now_index = torch.tensor([20, 30, 60, 99])
    now = unit(4, C, seed=1)
    now[1] = stored[0]
    drift = key_drift(queue.keys, queue.index, now, now_index)
    for slot in range(K):
        sample = int(queue.index[slot])
        if sample in now_index.tolist():
            cosine = float(queue.keys[slot] @ now[now_index.tolist().index(sample)])
            assert drift[slot].item() == pytest.approx(1 - cosine, abs=1e-6)
        else:
            assert drift[slot].isnan()
    assert drift[0].item() == pytest.approx(0, abs=1e-6)
    assert key_drift(queue.keys, queue.index, now[:0], now_index[:0]).isnan().all()
    assert key_drift(queue.keys, queue.index, -queue.keys, queue.index)[0].item() == pytest.approx(2)


def test_own_key_share_ignores_empty_slots() -> None:
    queue_index = torch.tensor([3, 3, 5, UNKNOWN, 8, 3, UNKNOWN, 5, 1, 0])
    shares = own_key_share(queue_index, torch.tensor([3, 5, 7, 0]))
    assert shares.tolist() == pytest.approx([0.3, 0.2, 0, 0.1])


def test_the_probability_of_an_own_key_is_that_of_the_docstring() -> None:
    images, batch = 200, 4
    for size in (50, 150, 300):
        queue = KeyQueue(size, 1)
        met = []
        for epoch in range(40):
            order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
            for index in order.split(batch):
                if epoch > 2:
                    met.append((own_key_share(queue.index, index) > 0).float().mean().item())
                queue.enqueue(torch.ones(len(index), 1), index)
        share = size / images
        expected = share**2 / 2 if share <= 1 else 1 - (2 - share) ** 2 / 2
        assert mean(met) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("images", "batch", "size"), [(150, 26, 78), (150, 26, 130), (60, 16, 112), (64, 16, 64), (30, 30, 60)]
)
def test_the_share_of_queries_that_meet_a_key_of_their_own_image(images: int, batch: int, size: int) -> None:
    queue, met = KeyQueue(size, 1), []
    for epoch in range(200):
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
        for index in order[: images // batch * batch].split(batch):
            if epoch > 2:
                met.append((own_key_share(queue.index, index) > 0).float().mean().item())
            queue.enqueue(torch.ones(len(index), 1), index)
    found = share_meeting_own_keys(Facts(0.2, 0.99, size, images, batch))
    assert found == pytest.approx(mean(met), abs=0.02)
    assert found == pytest.approx(
        share_meeting_own_keys(Facts(0.2, 0.99, 2 * size, images, 2 * batch, keys_per_image=2))
    )


@pytest.mark.parametrize("at_once", [1, 25, 2**22])
@pytest.mark.parametrize("rows", [0, 1, N])
def test_similar_share_equals_the_loops(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness, "ENTRIES_AT_ONCE", at_once)
    key, queue = unit(N, C, seed=0), unit(K, C, seed=1)
    negatives = coins(rows, K, seed=2) if rows else None
    shares = similar_share(key, queue, 0.2, negatives)
    for n in range(N):
        allowed = [j for j in range(K) if negatives is None or negatives[n % rows, j]]
        near = [j for j in allowed if float(key[n] @ queue[j]) > 0.2]
        assert shares[n].item() == pytest.approx(len(near) / len(allowed))


def test_only_the_same_key_is_a_duplicate() -> None:
    key, queue = unit(N, C, seed=0), unit(K, C, seed=1)
    assert duplicate_share(key, queue).item() == 0
    queue[3] = key[1]
    queue[4] = F.normalize(key[2] + 0.01, dim=0)
    assert duplicate_share(key, queue).item() == 1 / N
    masked = torch.ones(N, K, dtype=torch.bool)
    masked[1, 3] = False
    assert duplicate_share(key, queue, masked).item() == 0
    assert duplicate_share(key, key[:1].expand(K, C)).item() == 1 / N
    assert duplicate_share(key[:1].expand(N, C), key[:1].expand(K, C)).item() == 1  # a collapse


def test_same_label_share_equals_the_loops() -> None:
    labels, queue_labels = torch.tensor([0, 1, 2, 5]), torch.tensor([0, 0, 1, 2, 2, 2, -1, -1, 3, 0])
    assert same_label_share(labels, queue_labels).tolist() == pytest.approx([0.3, 0.1, 0.3, 0])
    negatives = torch.ones(N, K, dtype=torch.bool)
    negatives[0, :5] = False
    negatives[3] = False
    assert same_label_share(labels, queue_labels, negatives).tolist() == pytest.approx([0.2, 0.1, 0.3, 0])


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: key_ages(torch.tensor(3), K, 0), "size=10 and keys_per_step=0"),
        (lambda: key_drift(unit(K, C, seed=0), torch.arange(K), unit(N, C, seed=1), torch.arange(3)), r"\(3,\)"),
        (lambda: similar_share(unit(N, C, seed=0), unit(K, C, seed=1), 2), "threshold=2"),
    ],
)
def test_invalid_input_is_refused(measure: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()
