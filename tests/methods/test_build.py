"""The fields of a method: refused combinations, what is built from them, and runs that resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from moco.builder import MoCo
from moco.config import ConfigError, TrainConfig, check
from moco.losses import Switches
from moco.methods import METHODS
from moco.methods.build import build_method
from moco.methods.moco_config import MoCoConfig
from moco.methods.simclr import LossForm, SimCLR
from moco.training.step import train_step
from moco.training.trainer import pretrain

SIMCLR: dict[str, Any] = {"name": "simclr"}


def config(name: str = "moco", **values: Any) -> TrainConfig:
    """Return a small configuration with fields of the method, or of a group as GROUP__FIELD."""
    of = TrainConfig(method=MoCoConfig(queue_size=128) if name == "moco" else METHODS[name](), batch_size=64)
    of.model.backbone, of.model.options, of.model.dim = "convnet", {"width": 2}, 8
    for path, value in values.items():
        group, _, field = path.rpartition("__")
        setattr(getattr(of, group) if group else of.method, field, value)
    return of


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
        ({"mix_hardest": 8}, r"mixing needs mix_hardest and at least one of the other two"),
        ({"mix_pairs": 8}, r"mixing needs mix_hardest"),
        ({"mix_hardest": 129, "mix_pairs": 8}, r"method.mix_hardest=129 exceeds method.queue_size=128"),
        ({"margin": -0.1}, r"method.margin=-0.1 must be at least 0"),
        ({"margin": 3.2}, r"method.margin=3.2 must be below pi"),
        ({"margin_kind": "angle"}, r"must be one of arc, cosine"),
        ({"temperature_schedule": "linear"}, r"must be one of constant, cosine, learned"),
        ({"temperature_low": 0.5, "temperature_high": 0.3}, "in ascending order"),
        ({"temperature_schedule": "learned", "temperature": 2.0}, r"method.temperature=2.0 must lie between"),
        (
            {"temperature_schedule": "learned", "temperature_period": 2.0, "temperature": 0.2},
            r"method.temperature_period=2.0 has no effect with method.temperature_schedule=learned: set cosine",
        ),
        ({"temperature_period": 0.0}, r"method.temperature_period=0.0 must be above 0"),
        ({"augment__views": 3}, r"augment.views=3 must be 2 for moco"),
        (SIMCLR | {"margin": 0.1}, r"method.margin=0.1 does not fit method.candidates=all"),
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
        check(config(**values))
    assert "\n" not in str(caught.value)


def test_micro_batches_are_refused_where_the_batch_is_the_negatives() -> None:
    of = config(**SIMCLR)
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
    of = config(**values)
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
    of = config(**values)
    of.seed = 5
    method = build_method(of)
    assert isinstance(method, MoCo)
    assert method.switches == Switches(**values)
    assert method.seed == 5
    debiased = build_method(config(debias=0.1))
    assert isinstance(debiased, MoCo)
    assert debiased.switches == replace(Switches(), debias=0.1)
    other = build_method(config(**SIMCLR, candidates="other_view", contrast_mode="one", margin=0.2))
    assert isinstance(other, SimCLR)
    assert (other.candidates, other.contrast_mode) == ("other_view", "one")
    assert other.form == LossForm(margin=0.2, margin_kind="arc")


def test_missing_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.labels=true, but .* set data.labels=folder"):
        build_method(config(labels=True))


# ---- runs ----


def records(folder: Path, **values: Any) -> list[dict[str, float]]:
    """Train for two epochs of five steps on the digits; return the record of each step."""
    small: dict[str, Any] = {"data__name": "digits", "augment__size": 8, "augment__crop_scale": [1.0, 1.0]}
    of = config(**(small | values), evaluate__every_epochs=0)
    of.run, of.epochs, of.batch_size, of.log_every, of.device, of.threads = str(folder), 2, 256, 1, "cpu", 1
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
