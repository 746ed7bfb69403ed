"""Invalid configurations are refused with the field, its value and the fix."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from moco.composition import field_types
from moco.config import AugmentConfig, ConfigError, TrainConfig, bounded, check, check_bounds, config_dir, flatten
from moco.config.base import EXTRAS
from moco.config.data import check_normalization
from moco.config.recommended import momentum_for, recipe_for
from moco.data.opening import build_views
from moco.methods.densecl_config import DenseCLConfig
from moco.methods.moco_config import MoCoConfig
from moco.runs.directory import FREE_FIELDS


def refusal(change: Callable[[TrainConfig], None], processes: int = 1) -> str:
    config = TrainConfig(method=MoCoConfig())
    change(config)
    with pytest.raises(ConfigError) as caught:
        check(config, processes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_schemas_defaults_are_possible() -> None:
    check(TrainConfig(method=MoCoConfig()))
    check(TrainConfig(method=MoCoConfig()), processes=8)


def test_the_batch_must_divide_over_processes_and_micro_batches() -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.accumulate = 250, 2

    sentence = refusal(change, processes=4)
    assert (
        "batch_size=250 must be a multiple of 8 (4 processes x accumulate=2): set batch_size=256, or batch_size=248"
        in sentence
    )


@pytest.mark.parametrize(("group", "fix"), [(32, (128, 24)), (7, (98, 6)), (100, (200, 48))])
def test_bn_groups_must_divide_a_forward_pass_and_the_fixes_do(group: int, fix: tuple[int, int]) -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.model.bn_group_size = 96, group

    sentence = refusal(change, processes=2)
    assert f"model.bn_group_size={group} must divide the number of images, 48," in sentence
    assert f"set batch_size={fix[0]}, model.bn_group_size={fix[1]} or model.bn=sync" in sentence

    for batch_size, size in ((fix[0], group), (96, fix[1])):
        config = TrainConfig(method=MoCoConfig(), batch_size=batch_size)
        config.model.bn_group_size = size
        check(config, processes=2)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(
    ("bn", "group"), [("grouped", 16), ("grouped", 7), ("grouped", 1), ("sync", 16), ("batch", 16)]
)
def test_each_advised_batch_or_group_passes_all_checks(processes: int, accumulate: int, bn: str, group: int) -> None:
    refused = 0
    for batch_size in (*range(1, 26), 48, 64, 97, 256):

        def change(config: TrainConfig) -> None:
            config.batch_size, config.accumulate = batch_size, accumulate  # noqa: B023 # called at once
            config.model.bn, config.model.bn_group_size = bn, group

        try:
            sentence = refusal(change, processes)
        except pytest.fail.Exception:  # accepted
            continue
        refused += 1
        advice = re.search(r"[:;] set (.*)$", sentence)
        assert advice, sentence
        for alternative in re.split(r",? or |, ", advice[1]):
            config = TrainConfig(method=MoCoConfig())
            change(config)
            for name, value in (each.split("=") for each in alternative.split(" ")):
                section, _, field = name.rpartition(".")
                setattr(
                    getattr(config, section) if section else config, field, int(value) if value.isdigit() else value
                )
            check(config, processes)
    assert refused


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("epochs", 0, "epochs=0 must be at least 1"),
        ("precision", "fp8", "precision='fp8' must be one of auto, fp32, bf16, fp16"),
        ("run", " ", "run=' ' must not be empty, e.g. run=runs/first"),
        ("seed", 2**64, f"seed={2**64} must be at least 0 and below 2**64"),
        ("method.temperature", float("inf"), "method.temperature=inf must be a finite number"),
        ("optim.lr", -1.0, "optim.lr=-1.0 must be at least 0"),
        ("optim.base_batch", 0, "optim.base_batch=0 must be at least 1"),
        ("optim.momentum", 1.0, "optim.momentum=1.0 must be at least 0 and below 1"),
        ("optim.betas", [0.9, 1.0], "optim.betas=[0.9, 1.0]: 1.0 must be at least 0 and below 1"),
        ("optim.betas", [0.9], "optim.betas=[0.9] must hold 2 values"),
        ("optim.exclude", ["bn"], "optim.exclude=['bn']: 'bn' must be one of bias, norm"),
        ("augment.second", {"blur_p": float("nan")}, "augment.second.blur_p=nan must be a finite number"),
        ("optim.milestones", [3.0], "optim.milestones=[3.0] does not fit optim.schedule=cosine"),
        ("data.workers", 9999, "data.workers=9999 must be"),
    ],
)
def test_an_invalid_value_is_refused_with_its_field_and_what_is_accepted(name: str, value: object, error: str) -> None:
    *groups, field = name.split(".")

    def change(config: TrainConfig) -> None:
        setattr(getattr(config, groups[0]) if groups else config, field, value)

    assert refusal(change).startswith(error)


@pytest.mark.parametrize("bn", ["batch", "sync"])
def test_bn_over_one_image_is_refused(bn: str) -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.model.bn = 1, bn

    assert f"batch_size=1 with model.bn={bn}" in refusal(change)


def test_bn_over_one_image_of_a_process_is_refused() -> None:
    def change(config: TrainConfig) -> None:
        config.batch_size, config.model.bn = 2, "batch"

    assert "batch_size=2 with model.bn=batch, 2 processes" in refusal(change, processes=2)


def test_an_evaluation_size_below_the_crop_is_refused() -> None:
    def change(config: TrainConfig) -> None:
        config.augment.size, config.augment.eval_resize = 24, 12

    assert "augment.eval_resize=12 is below augment.size=24" in refusal(change)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_the_normalization_of_values_for_0_to_255_is_refused(name: str) -> None:
    of_bytes = [123.675, 116.28, 103.53]
    values = {"mean": [0.5] * 3, "std": [0.5] * 3} | {name: of_bytes}
    with pytest.raises(ConfigError, match=rf"images\.{name}=.*123\.675.* must be"):
        check_normalization("images", values["mean"], values["std"], 3, "uint8", "the 3 channels of x", "the command")
    with pytest.raises(ConfigError, match=rf"augment\.{name}=\[123\.675.*divide"):
        build_views(AugmentConfig(**{name: of_bytes}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"noise=\(0\.0, 25\.0\)"):
        build_views(AugmentConfig(noise=[0.0, 25.0]))


def test_bounds_of_elements_lengths_and_repeated_values() -> None:
    @dataclass
    class Schema:
        names: list[str] = bounded(["a"], choices=("a", "b"), min_length=1, unique=True)
        sizes: list[int] | None = bounded(None, gt=1, max_length=3, min_length=2)
        paths: list[str] = bounded([], unique=True, path=True)

    check_bounds(Schema())
    check_bounds(Schema(["b", "a"], [2, 3, 2], ["pets", "./pets", "runs/a", "runs/b"]))
    for invalid, error in [
        (Schema([]), r"names=\[\] must hold at least 1 value"),
        (Schema(["a", "a"]), "must not hold a value twice"),
        (Schema(paths=["runs/a", "runs/a/"]), "must not hold a value twice"),
        (Schema(paths=["a", "a/"]), "must not hold a value twice"),
        (Schema(paths=[str(Path("runs/a").absolute()), "./runs//a"]), "must not hold a value twice"),
        (Schema(sizes=[2]), "must hold 2 to 3 values"),
        (Schema(sizes=[2, 1]), "1 must be above 1"),
    ]:
        with pytest.raises(ConfigError, match=error):
            check_bounds(invalid)


def test_synchronized_bn_is_not_split_into_micro_batches() -> None:
    def change(config: TrainConfig) -> None:
        config.model.bn, config.accumulate = "sync", 2

    assert "accumulate=2 with model.bn=sync" in refusal(change)


@pytest.mark.parametrize(
    ("field", "value", "processes", "words"),
    [
        ("device", "cpu", 1, "device=cpu"),
        ("evaluate.online_probe", True, 1, "evaluate.online_probe"),
        ("method.temperature_schedule", "cosine", 1, "method.temperature_schedule=cosine changes"),
        ("method", MoCoConfig(mix_hardest=64, mix_pairs=8), 1, "method.mix_hardest=64 changes"),
        ("method", DenseCLConfig(dense_warmup_steps=10), 1, "method.dense_warmup_steps=10 changes"),
        ("method", DenseCLConfig(), 2, "method=densecl"),
        ("model.bn", "sync", 2, "but model.bn=sync may"),  # and not the method, which is local
    ],
)
def test_a_cuda_graph_needs_passes_that_do_not_change(field: str, value: Any, processes: int, words: str) -> None:
    def change(config: TrainConfig) -> None:
        group, _, name = f"config.{field}".rpartition(".")
        part = config if group == "config" else getattr(config, group.removeprefix("config."))
        setattr(part, name, value)
        config.cuda_graph = True

    sentence = refusal(change, processes)
    assert all(each in sentence for each in ("cuda_graph=true", words, "set cuda_graph=false"))
    allowed = TrainConfig(method=MoCoConfig(), cuda_graph=True, compile=True)
    check(allowed)
    check(allowed, processes=2)


def test_what_may_change_in_a_resumed_run_are_fields_that_exist() -> None:
    known = set(field_types(TrainConfig))
    assert set(FREE_FIELDS) <= known
    assert "method.temperature" in flatten(asdict(TrainConfig(method=MoCoConfig())))


def test_the_packages_of_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(config_dir()).parent / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert [re.split(r"[><=]", each)[0] for each in declared[extra]] == packages.split()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (31, {}),
        (40, {"experiment": "moco_v2_small", "epochs": 1000, "method.queue_size": 32, "method.momentum": 0.993}),
        (250, {"experiment": "moco_v2_small", "epochs": 160, "method.queue_size": 64, "method.momentum": 0.994}),
        (19_999, {"experiment": "moco_v2_small", "epochs": 10, "method.queue_size": 4992, "method.momentum": 0.999}),
        (20_000, {"experiment": "moco_v2_folder", "method.queue_size": 4096}),
    ],
)
def test_a_recipe_fits_the_number_of_images(images: int, expected: dict[str, float]) -> None:
    assert recipe_for(images) == expected


def test_the_recommended_momentum_stays_in_the_published_range() -> None:
    found = [momentum_for(steps) for steps in (0, 150, 700, 1680, 7000, 10**6)]
    assert found == [0.99, 0.99, 0.99, 0.996, 0.999, 0.999]


def test_an_integer_that_libraries_cannot_hold_is_refused() -> None:
    assert "epochs=99999999999999999999 must be at most 2147483647" in refusal(
        lambda config: setattr(config, "epochs", 99_999_999_999_999_999_999)
    )
    check(TrainConfig(method=MoCoConfig(), seed=2**64 - 1))
