"""Switches of InfoNCE in MoCo: constructed cases, loops, temperature, resume.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo, Output
from moco.data.keyed import MIX, keyed_uniform
from moco.losses import LearnedTemperature, Switches
from moco.optim.optimizers import parameter_groups
from tests.methods.switches import SWITCHES, N, P, T, images, indices, made, sgd, step, steps_with_switch

EYE = torch.eye(P)


# ---- every switch ----


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_loss_and_keeps_it_finite(name: str) -> None:
    plain, switched = made(symmetric=SWITCHES[name].get("symmetric", False)), made(**SWITCHES[name])
    losses = []
    for method in (plain, switched):
        optimizer = sgd(method)
        losses.append([step(method, optimizer, number)["loss"].item() for number in range(5)])
    assert losses[0] != losses[1]
    assert np.isfinite(losses).all()


def test_no_switch_is_moco_to_the_bit() -> None:
    plain, same = made(), made(switches=Switches())
    optimizers = sgd(plain), sgd(same)
    for number in range(3):
        a, b = step(plain, optimizers[0], number), step(same, optimizers[1], number)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_decoupled_loss_with_a_long_queue_is_streamed_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for _ in range(2):
        method = made(switches=Switches(decoupled=True))
        optimizer = sgd(method)
        results.append([step(method, optimizer, number) for number in range(4)])
        monkeypatch.setattr("moco.builder.STREAM_FROM", 1)
        monkeypatch.delattr("moco.builder.contrast", raising=False)  # the materialized form
    for materialized, streamed in zip(*results, strict=True):
        assert materialized.keys() == streamed.keys()
        for name, value in materialized.items():
            torch.testing.assert_close(streamed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_training_resumes_from_the_state_dict_bit_for_bit(name: str) -> None:
    """Random numbers depend on the step; everything else is in the state."""
    first = made(**SWITCHES[name])
    optimizer = sgd(first)
    for number in range(3):
        step(first, optimizer, number)
    second = made(**SWITCHES[name])
    resumed = sgd(second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(3, 6):
        a, b = step(first, optimizer, number), step(second, resumed, number)
        assert all(torch.equal(a[key], b[key]) for key in a)
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("name", SWITCHES)
def test_micro_batches_do_not_change_a_step(name: str) -> None:
    expected, got = steps_with_switch(name), steps_with_switch(name, accumulate=2)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)


# ---- constructed cases: the encoder returns the pixels, the query is e0 ----


def planted(queue: Tensor, **options: Any) -> Output:
    """One query e0 whose key is at 60 degrees to it, in the plane of e0 and e1, against the given queue (K, P)."""
    method = MoCo(nn.Flatten(), KeyQueue(len(queue), P, "empty"), T, **options)
    key = torch.tensor([0.5, math.sqrt(0.75), *[0.0] * (P - 2)])
    method.enqueue(queue[:, None], torch.arange(100, 100 + len(queue)))
    views = [EYE[:1].view(1, 3, 2, 2), key.view(1, 3, 2, 2)]
    output: Output = method(views, method.encode_keys(views, None, 1), torch.tensor([0]))
    return output


def log_sum(*cosines: float) -> float:
    return math.log(sum(math.exp(each / T) for each in cosines))


# A false negative, close to the query's key, at cosine 0.6 to the query, and three that are orthogonal to both.
FALSE = torch.tensor([0.6, 0.8, *[0.0] * (P - 2)])


QUEUE = torch.stack([EYE[3], FALSE, EYE[4], EYE[5]])


@pytest.mark.parametrize("how", [{"false_threshold": 0.9}, {"false_top": 1}])
def test_a_planted_false_negative_is_found_and_eliminated_or_attracted(how: dict[str, Any]) -> None:
    keep = planted(QUEUE)
    assert keep.loss.item() == pytest.approx(log_sum(0.5, 0.6, 0, 0, 0) - 0.5 / T, rel=1e-5)
    assert keep.measures["contrast_accuracy"].item() == 0  # the false negative is nearer than the key

    gone = planted(QUEUE, switches=Switches(false_negatives="eliminate", **how))
    assert gone.measures["eliminated"].item() == 1
    assert gone.measures["negatives"].item() == 3
    assert gone.measures["contrast_accuracy"].item() == 1
    assert gone.measures["chance"].item() == pytest.approx(math.log(4))
    assert gone.loss.item() == pytest.approx(log_sum(0.5, 0, 0, 0) - 0.5 / T, rel=1e-5)
    assert gone.loss < keep.loss

    drawn = planted(QUEUE, switches=Switches(false_negatives="attract", **how))
    assert drawn.measures["attracted"].item() == drawn.measures["positives"].item() == 1
    assert drawn.measures["negatives"].item() == 3
    assert drawn.measures["contrast_accuracy"].item() == 1
    expected = log_sum(0.5, 0.6, 0, 0, 0) - (0.5 + 0.6) / 2 / T
    assert drawn.loss.item() == pytest.approx(expected, rel=1e-5)


def test_with_threshold_and_top_both_must_hold() -> None:
    switches = Switches(false_negatives="eliminate", false_threshold=0.9, false_top=3)
    assert planted(QUEUE, switches=switches).measures["eliminated"].item() == 1


@pytest.mark.parametrize(
    ("switches", "lowered"),
    [(Switches(margin=0.2), math.cos(math.pi / 3 + 0.2)), (Switches(margin=0.2, margin_kind="cosine"), 0.5 - 0.2)],
)
def test_a_margin_lowers_the_positive_in_the_loss_and_not_in_the_measures(switches: Switches, lowered: float) -> None:
    output = planted(QUEUE, switches=switches)
    assert output.loss.item() == pytest.approx(log_sum(lowered, 0.6, 0, 0, 0) - lowered / T, rel=1e-5)
    assert output.measures["positive_similarity"].item() == pytest.approx(0.5)


def test_debiasing_removes_the_expected_share_of_the_class() -> None:
    prior = 0.1
    output = planted(QUEUE, switches=Switches(debias=prior))
    negatives = [math.exp(0.6 / T), 1.0, 1.0, 1.0]
    estimate = max((sum(negatives) / 4 - prior * math.exp(0.5 / T)) / (1 - prior), math.exp(-1 / T))
    assert output.loss.item() == pytest.approx(math.log(1 + 4 * estimate * math.exp(-0.5 / T)), rel=1e-5)
    assert output.loss < planted(QUEUE).loss


@pytest.mark.parametrize(("pairs", "with_query"), [(3, 2), (4, 0), (0, 3)])
def test_mixed_negatives_equal_the_loops(pairs: int, with_query: int) -> None:
    """MoCHi by hand: from the two hardest, with the random numbers of (seed, step, position, view)."""
    method = MoCo(
        nn.Flatten(),
        KeyQueue(4, P, "empty"),
        T,
        seed=11,
        switches=Switches(mix_hardest=2, mix_pairs=pairs, mix_query=with_query),
    )
    method.enqueue(QUEUE[:, None], torch.arange(100, 104))
    method.step = 7
    q = F.normalize(images(0)[0].flatten(1), dim=1)
    k = F.normalize(images(0)[1].flatten(1), dim=1)
    output: Output = method([q.view(N, 3, 2, 2)] * 2, {1: k}, torch.arange(N))
    losses, similarities = [], []
    for n in range(N):
        u = iter(keyed_uniform(11, 7, n, MIX, 3 * pairs + 2 * with_query)[0].tolist())
        hardest = sorted(QUEUE, key=lambda each: -float(each @ q[n]))[:2]
        mixed = []
        for _ in range(pairs):
            i, j, a = hardest[int(2 * next(u))], hardest[int(2 * next(u))], next(u)
            mixed.append(F.normalize(a * i + (1 - a) * j, dim=0))
        for _ in range(with_query):
            j, b = hardest[int(2 * next(u))], next(u) / 2
            mixed.append(F.normalize(b * q[n] + (1 - b) * j, dim=0))
        cosines = [float(q[n] @ each) for each in [k[n], *QUEUE, *mixed]]
        losses.append(log_sum(*cosines) - cosines[0] / T)
        similarities += cosines[5:]
    assert output.loss.item() == pytest.approx(sum(losses) / N, rel=1e-5)
    assert output.measures["mixed_similarity"].item() == pytest.approx(sum(similarities) / len(similarities), rel=1e-5)
    assert output.measures["chance"].item() == pytest.approx(math.log(1 + 4 + pairs + with_query))


def test_negatives_mixed_with_the_query_are_harder_than_the_hardest_and_raise_the_loss() -> None:
    mixed = planted(QUEUE, switches=Switches(mix_hardest=1, mix_query=8))
    assert mixed.measures["mixed_similarity"].item() > 0.6  # the hardest in the queue
    assert mixed.loss > planted(QUEUE).loss


def test_random_numbers_differ_per_step_view_seed_and_position() -> None:
    method = made(switches=Switches(mix_hardest=4, mix_pairs=3), seed=3)
    index = torch.arange(N)

    def drawn(seed: int, number: int, view: int, first: int = 0) -> bytes:
        method.seed, method.step = seed, number
        uniforms = method._uniforms(view, first, index)
        assert uniforms is not None
        return uniforms.numpy().tobytes()

    keys = [(3, 0, 0), (3, 1, 0), (3, 0, 1), (4, 0, 0), (3, 0, 0, N)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(3, 1, 0) == drawn(3, 1, 0)


def test_positives_are_not_mixed_into_negatives() -> None:
    """The only entry has the query's class, so no negative can be mixed."""
    output = planted(
        FALSE[None], labels=torch.zeros(200, dtype=torch.long), switches=Switches(mix_hardest=1, mix_query=3)
    )
    assert output.measures["positives"].item() == 1
    assert output.measures["mixed_similarity"].item() == 0  # a zero vector: absent
    assert output.loss.item() == pytest.approx(log_sum(0.5, 0.6) - (0.5 + 0.6) / 2 / T, rel=1e-5)


# ---- temperature ----


def test_a_learned_temperature_moves_and_stays_within_its_bounds() -> None:
    method = made(temperature=LearnedTemperature(T, 0.25, 0.35))
    optimizer = sgd(method)
    seen = [step(method, optimizer, number)["temperature"].item() for number in range(12)]
    assert seen[0] == pytest.approx(T)
    assert seen[1] > T
    assert seen[-1] == pytest.approx(0.35)  # the bound
    assert all(0.25 - 1e-6 <= each <= 0.35 + 1e-6 for each in seen)
    assert method.state_dict()["learned_temperature.log_scale"].shape == ()


def test_the_gradient_of_a_learned_temperature_is_the_loss_slope() -> None:
    def loss(temperature: float) -> tuple[MoCo, Tensor]:
        method = made(temperature=LearnedTemperature(temperature, 0.01, 1.0))
        views = list(images(0))
        output: Output = method(views, method.encode_keys(views, None, N), indices(0))
        return method, output.loss

    method, at = loss(T)
    at.backward()
    assert method.learned_temperature is not None
    slope = (loss(T * math.exp(-1e-2))[1] - loss(T * math.exp(1e-2))[1]).item() / 2e-2  # by log 1/T
    assert method.learned_temperature.log_scale.grad is not None
    assert method.learned_temperature.log_scale.grad.item() == pytest.approx(slope, rel=1e-2)


def test_a_learned_temperature_is_never_decayed() -> None:
    method = made(temperature=LearnedTemperature(T))
    kept, left_out = parameter_groups(method, 0.1, [])
    assert kept["weight_decay"] == 0.1
    assert left_out["weight_decay"] == 0.0
    assert method.learned_temperature is not None
    assert left_out["params"] == [method.learned_temperature.log_scale]
