"""Switches of InfoNCE in MoCo: constructed cases, loops, temperature schedules, resume and refused values.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo, Output
from moco.config import ConfigError, RunWarning, TrainConfig, check
from moco.data.keyed import MIX, keyed_uniform
from moco.data.loader import Batch
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.distributed import rank, world_size, wrap_ddp
from moco.losses import LearnedTemperature, Switches
from moco.methods import METHODS
from moco.methods.build import build_method
from moco.methods.moco_config import MoCoConfig
from moco.methods.simclr import LossForm, SimCLR
from moco.optim.optimizers import parameter_groups
from moco.training.checks import check_against_data
from moco.training.step import StepSettings, train_step
from moco.training.trainer import pretrain

N, C, K, P, T = 4, 5, 12, 12, 0.3
SAMPLES = 9
EYE = torch.eye(P)

SWITCHES: dict[str, dict[str, Any]] = {
    "arc margin": {"switches": Switches(margin=0.3)},
    "cosine margin": {"switches": Switches(margin=0.2, margin_kind="cosine")},
    "mixing": {"switches": Switches(mix_hardest=4, mix_pairs=3, mix_query=2)},
    "mixing with the query": {"switches": Switches(mix_hardest=4, mix_query=2)},
    "debias": {"switches": Switches(debias=0.2)},
    "elimination": {"switches": Switches(false_negatives="eliminate", false_top=2)},
    "attraction": {"switches": Switches(false_negatives="attract", false_threshold=0.3)},
    "decoupled": {"switches": Switches(decoupled=True)},
    "mean inside": {"switches": Switches(false_negatives="attract", false_top=2, positives_mean="inside")},
    "labels": {"labels": torch.arange(SAMPLES) % 2},
    "several": {
        "switches": Switches(0.1, "arc", 0.0, "attract", 0.3, 3, mix_hardest=4, mix_pairs=2, mix_query=1),
        "symmetric": True,
    },
    "learned temperature": {"temperature": LearnedTemperature(T, 0.1, 1.0)},
}


def made(**options: Any) -> MoCo:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))
    return MoCo(encoder, KeyQueue(K, C), **{"temperature": T, **copy.deepcopy(options)})


def images(seed: int) -> Tensor:
    return torch.randn(2, N, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def indices(seed: int) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:N]


def step(
    method: MoCo, optimizer: torch.optim.Optimizer, number: int, forward: nn.Module | None = None, accumulate: int = 1
) -> dict[str, Tensor]:
    """One step on this rank's share of the batch."""
    share = N // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    method.step = number
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = Batch(indices(number)[mine], [view[mine] for view in images(number)])
    return train_step(method, forward or method, optimizer, scaler, batch, None, StepSettings(0.5, 0.8, accumulate))


def sgd(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9)


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


def steps_with_switch(name: str, accumulate: int = 1) -> dict[str, Tensor]:
    """Return measures and gradients of three steps."""
    method = made(**SWITCHES[name])
    optimizer, forward = sgd(method), wrap_ddp(method, torch.device("cpu"))
    result: dict[str, Tensor] = {}
    for number in range(3):
        measures = step(method, optimizer, number, forward, accumulate)
        gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
        result |= {f"{number} {key}": value for key, value in (measures | gradients).items()}
    return result


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


# ---- configuration ----


def config(change: Callable[[TrainConfig], object] = lambda _: None) -> TrainConfig:
    of = TrainConfig(method=MoCoConfig(queue_size=128), batch_size=64)
    of.model.backbone, of.model.options, of.model.dim = "convnet", {"width": 2}, 8
    change(of)
    return of


def setting(**values: Any) -> Callable[[TrainConfig], object]:
    def change(of: TrainConfig) -> None:
        if "name" in values:
            of.method = METHODS[values["name"]]()
        for name, value in values.items():
            group, _, field = name.rpartition("__")
            setattr(getattr(of, group) if group else of.method, field, value)

    return change


SIMCLR: dict[str, Any] = {"name": "simclr"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"debias": 0.1, "margin": 0.1}, r"method.debias=0.1 excludes method.margin=0.1"),
        ({"debias": 0.1, "labels": True}, r"method.debias=0.1 excludes method.labels=True"),
        ({"debias": 0.1, "mix_hardest": 8, "mix_pairs": 4}, r"excludes method.mix_hardest=8"),
        ({"debias": 1.0}, r"method.debias=1.0 must be at least 0 and below 1"),
        ({"false_negatives": "attract"}, r"false_threshold=None and method.false_top=None: eliminate and attract need"),
        ({"false_top": 3}, r"method.false_negatives=keep"),
        ({"false_negatives": "drop", "false_top": 3}, r"must be one of keep, eliminate, attract"),
        ({"false_negatives": "eliminate", "false_threshold": 2.0}, r"method.false_threshold=2.0"),
        ({"false_negatives": "eliminate", "false_top": 129}, r"method.false_top=129 exceeds method.queue_size=128"),
        (
            {"false_negatives": "eliminate", "false_top": 3, "labels": True},
            r"method.labels=True excludes method.false_negatives=eliminate",
        ),
        ({"mix_hardest": 8}, r"mixing needs mix_hardest and one of the other two"),
        ({"mix_pairs": 8}, r"mixing needs mix_hardest"),
        ({"mix_hardest": 129, "mix_pairs": 8}, r"method.mix_hardest=129 exceeds method.queue_size=128"),
        ({"margin": -0.1}, r"method.margin=-0.1 must be at least 0"),
        ({"margin": 3.2}, r"method.margin=3.2 must be below pi"),
        ({"margin_kind": "angle"}, r"must be one of arc, cosine"),
        ({"temperature_schedule": "linear"}, r"must be one of constant, cosine, learned"),
        ({"temperature_low": 0.5, "temperature_high": 0.3}, "in ascending order"),
        ({"temperature_schedule": "learned", "temperature": 2.0}, r"method.temperature=2.0 must lie between"),
        ({"temperature_period": 0.0}, r"method.temperature_period=0.0 must be above 0"),
        ({"augment__views": 3}, r"augment.views=3 must be 2 for moco"),
        (SIMCLR | {"margin": 0.1}, r"needs the one positive of method.candidates=other_view"),
        (
            SIMCLR | {"labels": True, "candidates": "other_view"},
            r"method.candidates=other_view excludes method.labels=True",
        ),
        (SIMCLR | {"base_temperature": 0.0}, r"method.base_temperature=0.0 must be above 0"),
        (SIMCLR | {"augment__views": 1}, r"augment.views=1 leaves a sample no positive of its own"),
        ({"name": "moco_v3", "temperature_schedule": "learned"}, r"must be one of constant, cosine"),
    ],
)
def test_invalid_combinations_are_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check(config(setting(**values)))
    assert "\n" not in str(caught.value)


def test_micro_batches_are_refused_where_the_batch_is_the_negatives() -> None:
    of = config(setting(**SIMCLR))
    of.accumulate = 2
    with pytest.raises(ConfigError, match=r"accumulate=2 would leave simclr "):
        check(of)


@pytest.mark.parametrize(
    "values",
    [
        {"margin": 0.1, "mix_hardest": 8, "mix_pairs": 4, "false_negatives": "attract", "false_top": 3},
        {"labels": True, "margin": 0.1, "mix_hardest": 8, "mix_query": 4},
        {"temperature_schedule": "learned", "debias": 0.1},
        SIMCLR | {"labels": True, "contrast_mode": "one", "base_temperature": 0.07, "augment__views": 3},
        SIMCLR | {"candidates": "other_view", "margin": 0.1, "temperature_schedule": "learned", "augment__views": 4},
    ],
)
def test_valid_combinations_are_built(values: dict[str, Any]) -> None:
    of = config(setting(**values))
    check(of)
    method = build_method(of, np.arange(10) % 3)
    assert isinstance(method, MoCo | SimCLR)
    labels = [] if method.labels is None else method.labels.tolist()
    assert labels == ([i % 3 for i in range(10)] if of.method.labels else [])
    assert (method.learned_temperature is not None) == (of.method.temperature_schedule == "learned")


def test_each_field_reaches_the_method() -> None:
    values: dict[str, Any] = {
        "margin": 0.1,
        "margin_kind": "cosine",
        "false_negatives": "attract",
        "false_threshold": 0.7,
        "false_top": 3,
        "mix_hardest": 8,
        "mix_pairs": 4,
        "mix_query": 2,
    }
    of = config(setting(**values))
    of.seed = 5
    method = build_method(of)
    assert isinstance(method, MoCo)
    assert method.switches == Switches(**values)
    assert method.seed == 5
    debiased = build_method(config(setting(debias=0.1)))
    assert isinstance(debiased, MoCo)
    assert debiased.switches == replace(Switches(), debias=0.1)
    other = build_method(config(setting(**SIMCLR, candidates="other_view", contrast_mode="one", margin=0.2)))
    assert isinstance(other, SimCLR)
    assert (other.candidates, other.contrast_mode) == ("other_view", "one")
    assert other.form == LossForm(margin=0.2, margin_kind="arc")


def test_missing_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.labels=true, but .* set data.labels=folder"):
        build_method(config(setting(labels=True)))


def test_further_views_alternate_between_the_two_augmentations() -> None:
    of = config(setting(augment__views=5, augment__second={"blur_p": 0.5}))
    assert [view.blur_p for view in build_views(of.augment)] == [0.0, 0.5, 0.0, 0.5, 0.0]


def test_grouped_bn_with_negatives_from_the_batch_warns() -> None:
    with pytest.warns(RunWarning, match=r"set model.bn=sync"):
        check_against_data(config(setting(**SIMCLR)), Plan(1000, 64, 1, 0))


# ---- runs ----


def records(folder: Path, **values: Any) -> list[dict[str, float]]:
    """Train for two epochs of five steps on the digits; return the record of each step."""
    of = config(setting(data__name="digits", augment__size=8, augment__crop_scale=[1.0, 1.0], evaluate__every_epochs=0))
    of.run, of.epochs, of.batch_size, of.log_every, of.device, of.threads = str(folder), 2, 256, 1, "cpu", 1
    setting(**values)(of)
    check(of)
    pretrain(of)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


COSINE = {"temperature_low": 0.2, "temperature_high": 0.8, "temperature_period": 2.0, "temperature_schedule": "cosine"}


@pytest.mark.parametrize(
    "values",
    [
        SIMCLR | {"labels": True, "model__bn": "sync", "augment__views": 3, "temperature_schedule": "learned"},
        {"mix_hardest": 8, "mix_pairs": 4, "mix_query": 2, "labels": True} | COSINE,
    ],
    ids=["simclr", "moco"],
)
def test_an_interrupted_run_resumes_bit_for_bit(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = records(tmp_path / "uninterrupted", **values)
    temperatures = [each["train/temperature"] for each in expected]
    if "mix_hardest" in values:  # high at the start, low in the middle of the period, an epoch later
        assert temperatures[0] == pytest.approx(0.8)
        assert temperatures[5] == pytest.approx(0.2)
        assert temperatures[5] == min(temperatures)
        assert temperatures[1] == pytest.approx(temperatures[9])
        assert temperatures[4] == pytest.approx(temperatures[6])

    calls = iter(range(10))

    def interrupted(*args: Any, **options: Any) -> dict[str, Tensor]:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return train_step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("moco.training.trainer.train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            records(tmp_path / "resumed", **values)
    resumed = records(tmp_path / "resumed", **values)
    assert len(resumed) == len(expected) == 10
    for a, b in zip(resumed, expected, strict=True):
        for name in a:
            if name.startswith("train/"):
                assert a[name] == b[name], name
