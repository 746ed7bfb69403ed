"""Augmentation of other channels than RGB, against loops written from the definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.config import AugmentConfig, ConfigError, DataConfig
from moco.data.augment import augment
from moco.data.opening import build_views
from moco.data.view import View, draw

BANDS: dict[str, Any] = dict(mean=(0.2, 0.3, 0.1, 0.4), std=(0.1, 0.05, 0.02, 0.2))
INDEX = np.arange(12)


def scenes(dtype: torch.dtype = torch.uint16) -> Tensor:
    values = torch.randint(0, 30_000, (12, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return values.to(dtype)


def by_loops(crops: Tensor, view: View) -> Tensor:
    """Brightness, contrast, noise and dropout of each sample and channel, in float64."""
    params = draw(view, 3, 1, INDEX, 0)
    x = crops.double() / 65535
    for row in range(len(x)):
        for channel in range(x.shape[1]):
            band = x[row, channel]
            for operation in params.order[row] if params.jitter[row] else ():
                if operation > 1 or (view.brightness, view.contrast)[operation] == 0:
                    continue
                factor = float(params.factors[row, operation])
                if view.per_channel:
                    factor = float(params.channel_factors[row, channel, operation])
                band = band * factor if operation == 0 else band.mean() + factor * (band - band.mean())
            if params.noise.size:
                band = band + view.std[channel] * torch.from_numpy(params.noise[row]).double()
            band = (band - view.mean[channel]) / view.std[channel]
            x[row, channel] = 0 if params.dropped.size and params.dropped[row, channel] else band
    return x


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(jitter_p=1.0, brightness=0.4),
        dict(jitter_p=0.7, brightness=0.4, contrast=0.6),
        dict(jitter_p=1.0, brightness=0.4, contrast=0.4, per_channel=True),
        dict(channel_dropout_p=0.5),
        dict(jitter_p=1.0, contrast=0.4, per_channel=True, channel_dropout_p=0.3, noise=(0.1, 0.2)),
    ],
)
def test_each_operation_is_that_of_the_loops(fields: dict[str, Any]) -> None:
    view = View(8, **fields, **BANDS)
    crops = scenes()
    out = augment(crops, draw(view, 3, 1, INDEX, 0), view)
    assert (out.double() - by_loops(crops, view)).abs().max() < 1e-4
    alone = torch.cat([augment(crops[i : i + 1], draw(view, 3, 1, [i], 0), view) for i in range(12)])
    assert torch.equal(alone, out)  # law 2: the batch does not matter


def test_blur_flip_and_rotation_act_on_every_channel() -> None:
    fields: dict[str, Any] = dict(blur_p=1.0, flip_p=0.5, affine_p=0.5, degrees=20)
    view = View(8, **fields, **BANDS)
    crops = scenes()
    out = augment(crops, draw(view, 3, 1, INDEX, 0), view)
    for channel in range(4):
        one = View(8, **fields, mean=BANDS["mean"][channel : channel + 1], std=BANDS["std"][channel : channel + 1])
        alone = augment(crops[:, channel : channel + 1], draw(one, 3, 1, INDEX, 0), one)
        assert torch.allclose(alone[:, 0], out[:, channel], atol=1e-5)


def test_dropout_keeps_a_channel_and_has_its_probability() -> None:
    view = View(8, channel_dropout_p=0.3, mean=(0.0,) * 13, std=(1.0,) * 13)
    dropped = draw(view, 0, 0, np.arange(4000), 0).dropped
    assert abs(dropped.mean() - 0.3) < 0.01
    certain = draw(View(8, channel_dropout_p=1.0, **BANDS), 0, 0, np.arange(500), 0).dropped
    assert (certain.sum(axis=1) == 3).all()


def test_three_channels_of_16_bits_are_rgb() -> None:
    view = View(8, jitter_p=1.0, hue=0.1, saturation=0.4, gray_p=0.2)
    eight = scenes(torch.int32)[:, :3] // 257  # value / 255 = 257 * value / 65535
    params = draw(view, 3, 1, INDEX, 0)
    deep = augment((eight * 257).to(torch.uint16), params, view)
    assert torch.allclose(deep, augment(eight.to(torch.uint8), params, view), atol=1e-5)


def test_floats_keep_their_range() -> None:
    view = View(8, jitter_p=1.0, brightness=0.4, contrast=0.4, mean=(-12.0, -18.0), std=(3.0, 4.0))
    decibels = torch.randn(12, 2, 8, 8) * 4 - 15
    out = augment(decibels, draw(view, 3, 1, INDEX, 0), view)
    assert out.min() < -1
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(hue=0.1), r"augment\.hue=0\.1 needs red, green and blue, but the images have 4 channels: set it to 0"),
        (dict(hue=0.1, gray_p=0.2), r"hue=0\.1 and gray_p=0\.2 need red, green and blue"),
        (dict(mean=[0.5] * 3), r"augment\.mean=.* must hold one number for each of data\.channels=4"),
        (dict(std=[1.0] * 3), r"augment\.std=.*check_data data\.root=mine data\.channels=4 .* stats=true computes"),
        (dict(mean=[123.0] * 4), r"augment\.mean=.* within 0 \.\.\. 1"),
        (dict(std=[0.0] * 4), r"augment\.std=.*above 0"),
    ],
)
def test_what_does_not_fit_is_reported_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    values: dict[str, Any] = dict(mean=[0.2] * 4, std=[0.1] * 4) | fields
    with pytest.raises(ConfigError, match=sentence):
        build_views(AugmentConfig(**values), DataConfig("folder", "mine", channels=4, dtype="uint16"))


def test_a_single_channel_is_not_dropped_and_rgb_has_no_factors_per_channel() -> None:
    with pytest.raises(ValueError, match=r"channel_dropout_p=0\.1 needs several channels"):
        View(8, channel_dropout_p=0.1, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="per_channel=True is only for images that are not RGB"):
        View(8, per_channel=True)
