"""What `check` refuses: each sentence names the field, its value and the fix."""

import re
from collections.abc import Callable
from dataclasses import asdict

import pytest

from moco.cli import field_names
from moco.config import ConfigError, TrainConfig, check
from moco.runs.directory import FREE_FIELDS, flatten


def refusal(change: Callable[[TrainConfig], None], processes: int = 1) -> str:
    config = TrainConfig()
    change(config)
    with pytest.raises(ConfigError) as caught:
        check(config, processes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_schemas_defaults_are_possible() -> None:
    check(TrainConfig())
    check(TrainConfig(), processes=8)


def test_the_batch_must_divide_over_processes_and_micro_batches() -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.accumulate = 250, 2

    sentence = refusal(change, processes=4)
    assert "batch_size=250 must be a multiple of 8 (4 processes x accumulate=2): take 248" in sentence


@pytest.mark.parametrize(("group", "fix"), [(32, 24), (7, 6), (100, 48)])
def test_bn_groups_must_divide_a_forward_pass_and_the_fix_does(group: int, fix: int) -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.model.bn_group_size = 96, group

    sentence = refusal(change, processes=2)
    assert f"model.bn_group_size={group} must divide the 48 images" in sentence
    assert f"take {fix}, or model.bn=sync" in sentence

    config = TrainConfig(batch_size=96)
    config.model.bn_group_size = fix
    check(config, processes=2)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "log_every"])
def test_counts_are_at_least_one(name: str) -> None:
    assert f"{name}=0 must be at least 1" in refusal(lambda config: setattr(config, name, 0))


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("method", "temperature", 0.0, "must be above 0"),
        ("method", "momentum", 1.5, "must lie in 0 ... 1"),
        ("method", "momentum_end", -0.1, "must lie in 0 ... 1"),
        ("method", "queue_start", "zeros", "must be one of random, empty"),
        ("method", "reduction", "max", "must be one of sum, mean"),
        ("model", "bn", "layer", "must be one of grouped, sync, batch"),
        ("optim", "name", "lion", "must be one of sgd, lars, adamw"),
        ("optim", "lr", -1.0, "must not be negative"),
        ("optim", "base_batch", 0, "null for an lr that is not scaled"),
        ("optim", "lr", float("nan"), "must be a finite number"),
        ("method", "temperature", float("inf"), "must be a finite number"),
        ("optim", "momentum", 1.5, "must lie in 0 ... 1, and below 1"),
        ("optim", "gamma", -1.0, "must be above 0 and at most 1"),
        ("optim", "lr_end", 5.0, "must lie in 0 ... 1"),
        ("optim", "betas", [0.9, 1.0], "two numbers"),
        ("data", "workers", 9999, "must be at most 256"),
        ("optim", "milestones", [3.0], "the step schedule needs milestones and no other takes them"),
        ("optim", "exclude", ["bn"], "it can hold bias and norm"),
        ("evaluate", "features", "head", "must be one of backbone, projection"),
        ("checkpoint", "keep_last", 0, "must be at least 1"),
    ],
)
def test_impossible_values_are_named(group: str, name: str, value: object, words: str) -> None:
    sentence = refusal(lambda config: setattr(getattr(config, group), name, value))
    assert f"{group}.{name}" in sentence
    assert words in sentence


def test_synchronized_bn_is_not_split_into_micro_batches() -> None:
    def change(config: TrainConfig) -> None:
        config.model.bn, config.accumulate = "sync", 2

    assert "accumulate=2 would leave model.bn=sync" in refusal(change)


def test_every_field_says_what_it_is_for() -> None:
    """A field's meaning stands in a string below it, but where its name and type say all."""
    import inspect

    import moco.config.method
    import moco.config.train

    lines = [line for each in (moco.config.method, moco.config.train) for line in inspect.getsource(each).splitlines()]
    for name in ("temperature", "queue_size", "momentum_end", "bn_group_size", "base_batch", "eval_resize", "run"):
        at = next(i for i, line in enumerate(lines) if re.match(rf"    {name}: ", line))
        assert lines[at + 1].strip().startswith('"""'), name


def test_what_may_change_in_a_resumed_run_are_fields_that_exist() -> None:
    known = set(field_names(TrainConfig))
    assert set(FREE_FIELDS) <= known
    assert "method.temperature" in flatten(asdict(TrainConfig()))
