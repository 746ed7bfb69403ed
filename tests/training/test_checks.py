"""Checks that need the size of the data set, and parts that are built from the configuration."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from moco.analysis.doctor import facts_of
from moco.analysis.doctor.settings import queue_against_dataset
from moco.builder import MoCo
from moco.config import AugmentConfig, ConfigError, MethodConfig, RunWarning, TrainConfig
from moco.config.train import check
from moco.data.arrays import ArraySource
from moco.data.base import Sources
from moco.data.opening import build_views, open_sources
from moco.data.plan import Plan
from moco.methods.build import build_method
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3_config import MoCoV3Config
from moco.methods.nnclr_config import NNCLRConfig
from moco.methods.ressl_config import ReSSLConfig
from moco.methods.simclr_config import SimCLRConfig
from moco.runtime.device import pick_device, set_float32_precision
from moco.training.checks import check_against_data


def config(queue_size: int = 512, symmetric: bool = False) -> TrainConfig:
    made = TrainConfig(method=MoCoConfig(queue_size=queue_size, symmetric=symmetric), batch_size=64)
    made.model.backbone, made.model.options, made.model.dim = "convnet", {"width": 2}, 8
    return made


def plan(length: int) -> Plan:
    return Plan(length, 64, 1, 0)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 7, 64])
def test_the_advised_bn_group_passes_all_checks(batch_size: int) -> None:
    made = config(100)
    made.batch_size, made.model.bn = batch_size, "batch"
    with pytest.warns(RunWarning, match=r"shuffle_keys=true has no effect") as warned:
        check_against_data(made, Plan(1000, batch_size, 1, 0))
    advice = re.search(r"set model\.bn=grouped model\.bn_group_size=(\d+)( batch_size=(\d+))?$", str(warned[0].message))
    assert advice
    made.model.bn, made.model.bn_group_size, made.batch_size = "grouped", int(advice[1]), int(advice[3] or batch_size)
    check(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_against_data(made, Plan(1000, made.batch_size, 1, 0))


def test_a_queue_as_long_as_the_data_set_warns() -> None:
    with pytest.warns(RunWarning, match=r"queue_size=1000 .* 1000 images .* set method\.queue_size=256"):
        check_against_data(config(queue_size=1000), plan(1000))


def test_an_evaluation_of_a_small_part_of_each_image_warns() -> None:
    made = config()
    made.augment = AugmentConfig(size=32, eval_resize=256)  # a recipe for 224 pixels
    with pytest.warns(
        RunWarning, match=r"eval_resize=256 .* augment\.size=32: .* 1\.6 % .* set augment\.eval_resize=36$"
    ):
        check_against_data(made, plan(1000))
    for made.augment.eval_resize in (0, 64):
        check_against_data(made, plan(1000))


def test_a_shorter_queue_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_against_data(config(queue_size=999), plan(1000))
        check_against_data(config(queue_size=1999, symmetric=True), plan(1000))  # two keys per image


def test_brightness_that_moves_a_channel_far_from_its_mean_warns() -> None:
    made = config()
    made.data.channels, made.data.dtype = 1, "float32"
    made.augment = AugmentConfig(brightness=0.4, mean=[280.0], std=[10.7])  # kelvin
    with pytest.warns(RunWarning, match=r"brightness=0\.4 .* by up to 10 standard .* set augment\.brightness=0"):
        check_against_data(made, plan(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.augment.brightness = 0.0
        check_against_data(made, plan(1000))
        made.data.channels, made.data.dtype = 3, "uint8"
        made.augment = AugmentConfig(brightness=0.8)  # SimCLR
        check_against_data(made, plan(1000))


@pytest.mark.parametrize("images", [3, 10, 40, 64, 100, 250])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group", "accumulate", "bn"), [(16, 1, "grouped"), (32, 2, "grouped"), (32, 1, "sync")])
def test_the_advised_batch_and_queue_pass_all_checks(
    images: int, symmetric: bool, group: int, accumulate: int, bn: str
) -> None:
    made = config(1000, symmetric)
    made.model.bn_group_size, made.accumulate, made.model.bn = group, accumulate, bn

    def followed(text: str) -> None:
        for name, value in re.findall(r"([\w.]+)=(\d+)", text):
            section, _, field = name.rpartition(".")
            setattr(getattr(made, section) if section else made, field, int(value))
        check(made)

    if images < made.batch_size:
        with pytest.raises(ConfigError, match="exceeds") as caught:
            check_against_data(made, Plan(images, made.batch_size, 1, 0))
        if images < (4 if bn == "grouped" else 2) * accumulate:
            assert str(caught.value).endswith("add images")
            return
        followed(str(caught.value).rpartition(" set ")[2])
    with pytest.warns(RunWarning, match=r"queue_size=1000") as warned:
        check_against_data(made, Plan(images, made.batch_size, 1, 0))
    if images < 8 * accumulate * made.method.keys_per_image:  # half of them are fewer than two groups of two
        return
    followed(str(warned[0].message).partition("; set ")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_against_data(made, Plan(images, made.batch_size, 1, 0))
    facts = facts_of(made.method, images, made.batch_size)
    assert queue_against_dataset({}, facts._replace(mask_own_keys=False)) is None


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (MoCoV3Config(), r"predictor_layers=0: moco_v3 has a predictor; set model\.predictor_layers=2"),
        (NNCLRConfig(queue_size=128), r"predictor_layers=0: nnclr has a predictor; set model\.predictor_layers=2"),
        (SimCLRConfig(), r"set model\.bn=sync"),
        (ReSSLConfig(queue_size=128), r"augment\.second is empty, .*: set augment=ressl, or"),
    ],
)
def test_a_method_without_what_it_is_published_with_warns(method: MethodConfig, sentence: str) -> None:
    made = config()
    made.method = method
    with pytest.warns(RunWarning, match=sentence):
        check_against_data(made, plan(1000))


def test_weights_that_are_published_for_another_normalization_warn() -> None:
    made = config()
    made.model.backbone, made.model.options = "timm/test_vit", {"pretrained": True}
    fixes = r"set augment\.mean=\[0\.5,0\.5,0\.5\] augment\.std=\[0\.5,0\.5,0\.5\]"
    with pytest.warns(RunWarning, match=rf"model\.options\.pretrained=true .* {fixes}"):
        check_against_data(made, plan(1000))
    made.augment.mean, made.augment.std = [0.5] * 3, [0.5] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_against_data(made, plan(1000))


def test_milestones_after_the_last_epoch_warn() -> None:
    late = config()
    late.epochs, late.optim.schedule, late.optim.milestones = 4, "step", [2.0, 120.0]
    with pytest.warns(RunWarning, match=r"optim\.milestones=\[2\.0, 120\.0\] .* epochs=4"):
        check_against_data(late, plan(1000))


def test_shuffling_with_a_single_bn_group_warns() -> None:
    made = config()
    made.model.bn = "batch"
    with pytest.warns(RunWarning, match=r"set model\.bn=grouped"):
        check_against_data(made, plan(1000))


def test_a_warm_up_longer_than_training_warns() -> None:
    made = config()
    made.epochs, made.optim.warmup_epochs = 1, 2.0
    with pytest.warns(RunWarning, match=r"set optim\.warmup_epochs=0"):
        check_against_data(made, plan(1000))


def test_less_than_a_batch_of_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=64 exceeds the 63 images"):
        check_against_data(config(), plan(63))
    made = config()
    made.data.weights = [0.01, 0.01]
    drawn = replace(plan(2000), draws=((1000, 10), (1000, 10)))
    with pytest.raises(ConfigError, match=r"exceeds the 20 samples of an epoch \(data\.weights=.*: set batch_size=16 "):
        check_against_data(made, drawn)


def test_the_second_view_differs_in_the_configured_fields() -> None:
    first, second = build_views(AugmentConfig(size=32, blur_p=1.0, second={"blur_p": 0.1, "solarize_p": 0.2}))
    assert (first.blur_p, first.solarize_p) == (1.0, 0.0)
    assert (second.blur_p, second.solarize_p) == (0.1, 0.2)
    assert first.crop_scale == second.crop_scale == (0.2, 1.0)
    views = build_views(AugmentConfig(size=32, views=5, second={"blur_p": 0.5}))  # further views alternate
    assert [view.blur_p for view in views] == [0.0, 0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("second", [{"blurp": 1.0}, {"size": 16}, {"blur_p": 2.0}])
def test_invalid_fields_of_the_second_view_are_refused(second: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"augment\."):
        build_views(AugmentConfig(size=32, second=second))


def test_the_method_is_built_with_the_configured_values() -> None:
    made = config(queue_size=96, symmetric=True)
    made.method.temperature = 0.3
    method = build_method(made)
    assert isinstance(method, MoCo)
    assert method.temperature == 0.3
    assert method.queue.keys.shape == (96, 8)
    assert len(method.directions) == 2


def test_a_limited_bank_is_reproducible() -> None:
    made = config()
    made.data.name = "digits"
    one, two = (open_sources(made.data, bank_size=100) for _ in range(2))
    assert one.bank is not None
    assert two.bank is not None
    assert len(one.bank) == 100
    assert len(one.train) == 1297
    names = [one.bank.name(i) for i in range(100)]
    assert names == [two.bank.name(i) for i in range(100)]
    labels = one.bank.labels
    assert labels is not None
    where = {one.train.name(i): i for i in range(1297)}
    assert one.train.labels is not None
    assert all(one.train.labels[where[name]] == label for name, label in zip(names, labels, strict=True))


def test_float32_is_ieee_on_a_gpu_unless_tf32_is_chosen() -> None:
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    for tf32 in (True, False):
        set_float32_precision(tf32)
        assert [each.fp32_precision == "tf32" for each in backends] == [tf32, tf32]
        # torch.compile reads the earlier fields, which raise an error if they contradict the new ones
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)


def test_the_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="set device=cpu"):
            pick_device("cuda")


@pytest.mark.parametrize("name", ["method.labels", "evaluate.online_probe", "checkpoint.keep_best"])
def test_what_needs_one_class_per_image_refuses_several_labels(name: str) -> None:
    labels = np.eye(2, dtype=np.bool_)
    images = ArraySource(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], classes=("x", "y"), multi_labels=labels
    )
    made, (group, field) = config(), name.split(".")
    setattr(getattr(made, group), field, True)
    with pytest.raises(
        ConfigError, match=rf"{name}=true needs one class per image, .* several labels: set {name}=false"
    ):
        check_against_data(made, plan(1000), Sources(images, None, images))
