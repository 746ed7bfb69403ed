"""Fused augmentation and crops against the plain forms, bit for bit: on a GPU if there is one, else interpreted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.data import augment as augmentation
from moco.data.augment import augment
from moco.data.crop import CROP_DRAWS, crop_boxes, resized_crops
from moco.data.keyed import keyed_uniform
from moco.data.view import STEPS, Step, View, draw

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
JITTER: dict[str, Any] = dict(jitter_p=0.8, brightness=0.6, contrast=0.6, saturation=0.6, hue=0.3)
RECIPE: dict[str, Any] = dict(
    **JITTER, gray_p=0.2, blur_p=0.5, flip_p=0.5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
EVERYTHING: dict[str, Any] = dict(
    **RECIPE, solarize_p=0.3, vertical_flip_p=0.5, quarter_turn_p=0.75, affine_p=0.5, degrees=20, zoom=(0.8, 1.2)
)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Return a caller that computes a function with kernels, on `DEVICE`."""

    def call(function: Callable[..., Tensor], images: Tensor, *others: Any) -> Tensor:
        with monkeypatch.context() as patched:
            for module in ("augment", "crop"):
                patched.setattr(f"moco.data.{module}.fused", lambda device: True)
            return function(images.to(DEVICE), *others).cpu()

    return call


def random_crops(count: int, size: int, channels: int = 3) -> Tensor:
    """Noise, flat colors, gray images, and black and white, where channels tie."""
    crops = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    crops[1::4] = crops[1::4, :, :1, :1]
    crops[2::4] = crops[2::4, :1]
    crops[3::4] = crops[3::4] // 128 * 255
    return crops.to(torch.uint8)


@pytest.mark.parametrize(
    ("count", "size", "fields"),
    [
        (4, 17, {}),
        (8, 11, RECIPE),
        (16, 11, EVERYTHING),
        (4, 40, RECIPE),  # several blocks of pixels per image
        (4, 12, dict(blur_p=1, blur_sigma=(2, 5))),  # the radius is limited by the size
        (8, 9, dict(**RECIPE, gray_first=True, noise=(0, 0.1))),
        (8, 9, dict(**RECIPE, channel_dropout_p=0.3)),
        (8, 9, dict(jitter_p=1, brightness=0.5, hue=0.5)),
    ],
    ids=["nothing", "v2", "everything", "blocks", "wide blur", "v1", "channel dropout", "brightness and hue"],
)
def test_views_are_equal(count: int, size: int, fields: dict[str, Any], with_kernels: Callable[..., Tensor]) -> None:
    view, crops = View(size=size, **fields), random_crops(count, size)
    params = draw(view, 0, 0, np.arange(count), 0)
    assert torch.equal(with_kernels(augment, crops, params, view), augment(crops, params, view))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_views_of_deep_images_are_equal(dtype: torch.dtype, with_kernels: Callable[..., Tensor]) -> None:
    view, crops = View(size=9, **RECIPE), random_crops(8, 9)
    deep = (crops.int() * 257).to(dtype) if dtype == torch.uint16 else crops / 200
    params = draw(view, 0, 0, np.arange(8), 0)
    assert torch.equal(with_kernels(augment, deep, params, view), augment(deep, params, view))


def test_steps_of_plug_ins_come_before_the_normalization(
    monkeypatch: pytest.MonkeyPatch, with_kernels: Callable[..., Tensor]
) -> None:
    monkeypatch.setitem(STEPS, "square", Step(lambda x, u: x * x, 0))
    view, crops = View(size=9, steps={"square": {}}, **RECIPE), random_crops(8, 9)
    params = draw(view, 0, 0, np.arange(8), 0)
    assert torch.equal(with_kernels(augment, crops, params, view), augment(crops, params, view))


def test_other_channels_than_rgb_use_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, with_kernels: Callable[..., Tensor]
) -> None:
    view = View(size=9, jitter_p=1, brightness=0.5, contrast=0.5, blur_p=1, mean=(0.5, 0.5), std=(0.2, 0.2))
    crops, params = random_crops(8, 9, channels=2), draw(view, 0, 0, np.arange(8), 0)
    monkeypatch.setattr(augmentation, "_fused", None)  # a call would fail
    assert torch.equal(with_kernels(augment, crops, params, view), augment(crops, params, view))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width", "size"), [(40, 30, 24), (16, 16, 16), (20, 50, 37), (70, 12, 9)])
def test_crops_are_equal(
    height: int, width: int, size: int, antialias: bool, with_kernels: Callable[..., Tensor]
) -> None:
    images = torch.randint(0, 256, (6, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = crop_boxes(keyed_uniform(0, 0, np.arange(6), 0, CROP_DRAWS), height, width, (0.1, 1), (3 / 4, 4 / 3))
    ours = with_kernels(resized_crops, images, boxes, size, antialias)
    assert torch.equal(ours, resized_crops(images, boxes, size, antialias))
