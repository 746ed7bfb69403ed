"""Measures of the monitor compared with loops; monitoring does not change training."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.analysis import alpha_req, rank_me
from moco.builder import UNKNOWN, KeyQueue, Method, MoCo, Output
from moco.data.loader import Batch
from moco.data.plan import Plan
from moco.distributed import broadcast_module, rank, world_size, wrap_ddp
from moco.methods.moco_v3 import MoCoV3
from moco.methods.simclr import SimCLR
from moco.models.encoder import build_encoder
from moco.runtime.errors import NonFiniteLoss
from moco.training.build import set_batch_norm_calls
from moco.training.monitor import Monitor, _across_groups
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
BATCH, GROUP, C, SAMPLES, CLASSES, T = 16, 4, 8, 24, 3, 0.2
LABELS = torch.arange(SAMPLES) % CLASSES
IMAGES = torch.rand(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ANALYSED = {"alignment", "uniformity", "effective_rank", "alpha_req", "spread", "std_lowest"}
OF_A_QUEUE = {"top_share", "key_age", "key_drift", "own_key_share", "likely_false_share", "duplicate_share"}


def made(name: str = "moco", bn: str = "grouped", **options: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder("convnet", {"width": 2}, 2, 0, C, bn, GROUP)  # type: ignore[arg-type]
    if name == "moco_v3":
        return MoCoV3(encoder, torch.nn.Linear(C, C), T)
    if name == "simclr":
        return SimCLR(encoder, T)
    queue = KeyQueue(40, C, options.pop("queue_start", "random"), options.pop("mask_own_keys", True))
    return MoCo(encoder, queue, T, **options)


class Steps:
    """Trains a method for some steps, on any number of processes, and keeps the inputs of the monitor."""

    def __init__(
        self,
        method: Method,
        labels: Tensor | None = None,
        monitored: bool = True,
        accumulate: int = 1,
        shuffle: bool = True,
    ) -> None:
        assert isinstance(method, torch.nn.Module)
        self.method, self.measures = method.train(), list[dict[str, Tensor]]()
        self.seen: list[tuple[Output, Sequence[Tensor], Tensor, dict[str, Tensor]]] = []
        self.optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
        observer = Monitor(method, labels, BATCH * method.passes, shuffle, torch.float32)

        def keeping(output: Output, views: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
            before = {name: x.clone() for name, x in self.method.state_dict().items()}
            found = observer(output, views, index)
            self.seen.append((output, views, index, before))
            return found

        broadcast_module(method)
        set_batch_norm_calls(method, accumulate)
        self.forward = wrap_ddp(method, CPU)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.plan = Plan(SAMPLES, BATCH, 9, 0, rank(), world_size())
        self.monitor = keeping if monitored else None
        self.accumulate, self.shuffle, self.observer = accumulate, shuffle, observer

    def run(self, steps: int) -> "Steps":
        for step, (epoch, samples) in zip(range(steps), self.plan.samples(0), strict=False):
            index = torch.from_numpy(samples)
            noise = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(epoch + i)) for i in (5, 6)]
            views = [IMAGES[index] + 0.3 * each for each in noise]
            self.measures.append(
                train_step(
                    self.method,
                    self.forward,
                    self.optimizer,
                    self.scaler,
                    Batch(index, views),
                    self.plan.shuffles(step, 2) if self.shuffle else None,
                    StepSettings(0.05, 0.9, self.accumulate),
                    self.monitor,
                )
            )
        return self


def analysed(measures: dict[str, Tensor]) -> dict[str, float]:
    start = "analysis/"
    return {name.removeprefix(start): float(x) for name, x in measures.items() if name.startswith(start)}


def by_loops(output: Output, index: Tensor, before: dict[str, Tensor], keys_per_step: int) -> dict[str, float]:
    """Compute the measures with loops over the batch and over the queue before the step."""
    q, k, queue, owner = output.query, output.key, before["queue.keys"], before["queue.index"].tolist()
    count, n = int(before["queue.count"]), len(q)
    real = [slot for slot in range(len(queue)) if owner[slot] != UNKNOWN]
    unit = queue[real]
    pairs = [(a, b) for a in range(n) for b in range(a)]
    classes = (LABELS[index]).tolist()
    same = [float(k[a] @ k[b]) for a, b in pairs if classes[a] == classes[b]]
    ages = [(count - 1 - slot) % len(queue) // keys_per_step for slot in real]
    drift = [1 - float(queue[s] @ k[index.tolist().index(owner[s])]) for s in real if owner[s] in index.tolist()]
    top, false, duplicate, labeled = [], [], [], []
    for i, sample in enumerate(index.tolist()):
        negatives = [s for s in range(len(queue)) if owner[s] != sample]
        push = sorted((math.exp(float(q[i] @ queue[s]) / T) for s in negatives), reverse=True)
        top.append(sum(push[:10]) / sum(push))
        similar = [float(k[i] @ queue[s]) for s in negatives]
        false.append(sum(each >= 0.9 for each in similar) / len(negatives))
        duplicate.append(float(any(each >= 1 - 1e-5 for each in similar)))
        labeled.append(sum(owner[s] in samples_of(classes[i]) for s in negatives) / len(negatives))
    deviations = unit.std(dim=0, correction=0)
    return {
        "alignment": float(np.mean([float((a - b).square().sum()) for a, b in zip(q, k, strict=True)])),
        "uniformity": math.log(np.mean([math.exp(-2 * float((k[a] - k[b]).square().sum())) for a, b in pairs])),
        "effective_rank": float(rank_me(unit)),
        "alpha_req": float(alpha_req(unit)),
        "spread": float(deviations.mean()) * C**0.5,
        "std_lowest": float(deviations.min()),
        "tolerance": float(np.mean(same)),
        "top_share": float(np.mean(top)),
        "key_age": float(np.mean(ages)),
        "key_drift": float(np.mean(drift)) if drift else math.nan,
        "own_key_share": float(np.mean([owner.count(sample) / len(queue) for sample in index.tolist()])),
        "likely_false_share": float(np.mean(false)),
        "duplicate_share": float(np.mean(duplicate)),
        "same_label_share": float(np.mean(labeled)),
    }


def samples_of(label: int) -> list[int]:
    """Return the samples of a class."""
    return [sample for sample in range(SAMPLES) if int(LABELS[sample]) == label]


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_measure_equals_its_loop_reference(symmetric: bool) -> None:
    run = Steps(made(symmetric=symmetric), LABELS).run(4)
    for measures, (output, _, index, before) in list(zip(run.measures, run.seen, strict=True))[1:]:
        found = analysed(measures)
        expected = by_loops(output, index, before, BATCH * (2 if symmetric else 1))
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=2e-5, nan_ok=True), name
        assert found.keys() == expected.keys() | {"loss_shuffled", "loss_unshuffled"}
        assert not math.isnan(found["key_drift"])  # the queue holds more than an epoch


def test_the_two_losses_differ_only_by_the_groups_of_the_keys() -> None:
    """One loss uses the keys of the step, the other keys of other BN groups."""
    some = slice(BATCH)  # the monitor takes up to 64
    for shuffle in (True, False):
        run = Steps(made(), shuffle=shuffle).run(3)
        own, other = ("loss_shuffled", "loss_unshuffled")[:: 1 if shuffle else -1]
        for measures, (output, views, index, before) in zip(run.measures, run.seen, strict=True):
            method = made()
            method.load_state_dict(before)
            method.train()
            order = None if shuffle else [_across_groups(BATCH, GROUP)] * 2
            keys = method.encode_keys([view[some] for view in views], order, BATCH)[1]
            found = analysed(measures)
            for name, k in ((own, output.key[some]), (other, keys)):
                queue, owner = before["queue.keys"], before["queue.index"]
                logits = [
                    torch.cat([(q @ k[i])[None], (queue @ q)[owner != index[i]]]) / T
                    for i, q in enumerate(output.query[some])
                ]
                loss = np.mean([float(each.logsumexp(dim=0) - each[0]) for each in logits])
                assert found[name] == pytest.approx(loss, abs=1e-5)
            assert abs(found[own] - found[other]) > 1e-4


def test_the_order_across_groups_mixes_all_groups() -> None:
    order = _across_groups(BATCH, GROUP)
    assert order is not None
    assert sorted(order) == list(range(BATCH))
    assert all(len({sample // GROUP for sample in part}) == 4 for part in order.reshape(-1, GROUP))
    assert _across_groups(GROUP, GROUP) is None
    assert _across_groups(BATCH, 0) is None


@pytest.mark.parametrize("bn", ["sync", "batch"])
def test_without_bn_groups_the_shuffle_losses_are_absent(bn: str) -> None:
    found = analysed(Steps(made(bn=bn)).run(1).measures[0])
    assert found.keys() == ANALYSED | OF_A_QUEUE


@pytest.mark.parametrize("name", ["moco_v3", "simclr"])
def test_methods_without_a_queue_are_measured_on_their_batch(name: str) -> None:
    run = Steps(made(name, bn="sync"), LABELS, shuffle=False).run(2)
    output, _, index, _ = run.seen[-1]
    found = analysed(run.measures[-1])
    assert found.keys() == ANALYSED | {"tolerance"}
    assert found["alignment"] == pytest.approx(float((output.query - output.key).square().sum(dim=1).mean()), abs=1e-6)
    assert found["effective_rank"] == pytest.approx(float(rank_me(output.key)), abs=1e-4)
    k, classes = output.key, LABELS[index]
    same = [float(k[a] @ k[b]) for a in range(BATCH) for b in range(a) if classes[a] == classes[b]]
    assert found["tolerance"] == pytest.approx(float(np.mean(same)), abs=1e-5)
    assert set(run.observer.histograms) == {"positives"}
    assert int(run.observer.histograms["positives"].sum()) == BATCH


def test_measures_without_data_are_nan() -> None:
    """In the first step, an empty queue has no negatives, and a random one has no keys of images."""
    first = analysed(Steps(made(queue_start="empty"), LABELS).run(1).measures[0])
    assert {name for name, value in first.items() if math.isnan(value)} == {"top_share", "key_age", "key_drift"}
    assert first["same_label_share"] == first["likely_false_share"] == first["duplicate_share"] == 0
    random = analysed(Steps(made(), LABELS).run(1).measures[0])
    assert {name for name, value in random.items() if math.isnan(value)} == {"key_age", "key_drift"}


@pytest.mark.parametrize("labels", [torch.full((SAMPLES,), -1), torch.arange(SAMPLES)])
def test_unknown_labels_give_nan(labels: Tensor) -> None:
    """All labels are unknown, or each sample has its own class, as in most small batches of ImageNet."""
    found = analysed(Steps(made(), labels).run(2).measures[1])
    assert math.isnan(found["tolerance"])
    assert math.isnan(found["same_label_share"]) if labels[0] < 0 else found["same_label_share"] == 0


def test_the_last_micro_batch_is_measured() -> None:
    run = Steps(made(), LABELS, accumulate=2).run(2)
    output, views, index, before = run.seen[-1]
    assert len(output.query) == len(views[0]) == len(index) == BATCH // 2
    expected = by_loops(output, index, before, BATCH)
    found = analysed(run.measures[-1])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "bn", "accumulate"),
    [
        ("moco", "grouped", 1),
        ("moco", "grouped", 2),
        ("moco", "batch", 1),
        ("moco_v3", "sync", 1),
        ("simclr", "sync", 1),
    ],
)
def test_monitoring_does_not_change_training(name: str, bn: str, accumulate: int) -> None:
    observed, plain = (
        Steps(made(name, bn=bn), LABELS, each, accumulate, shuffle=bn == "grouped").run(4) for each in (True, False)
    )
    assert len(observed.seen) == 4
    assert not plain.seen
    ours, others = observed.method.state_dict(), plain.method.state_dict()
    assert all(torch.equal(ours[name], others[name]) for name in others)
    states = [each.optimizer.state_dict()["state"] for each in (observed, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key]["momentum_buffer"], states[1][key]["momentum_buffer"]) for key in states[1])
    for a, b in zip(observed.measures, plain.measures, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_monitored_non_finite_step_raises_the_error_of_the_step() -> None:
    run = Steps(made(), LABELS).run(1)
    with torch.no_grad():
        next(iter(run.method.parameters())).fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="loss nan"):
        run.run(1)
    assert len(run.seen) == 2


def measured(labels: Tensor) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    run = Steps(made(), labels).run(3)
    return [analysed(each) for each in run.measures], run.observer.histograms


def test_two_processes_measure_the_same_as_one() -> None:
    """Four samples share a label, so no single rank has a pair of one class in every batch."""
    labels = torch.arange(SAMPLES)
    labels[::2] = torch.where(torch.arange(12) < 4, 0, -1)
    alone, counts = measured(labels)
    (first, histograms), (second, _) = run_ranks(2, measured, labels)
    assert torch.equal(histograms["positives"], counts["positives"])
    for here, there, expected in zip(first, second, alone, strict=True):
        assert list(here) == list(there) == list(expected)
        for name, value in expected.items():
            assert here[name] == pytest.approx(there[name], abs=0, rel=0, nan_ok=True)
            assert here[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    assert not math.isnan(alone[0]["tolerance"])
