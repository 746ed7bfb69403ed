"""Crops of uint16 and float32: equal on both routes, and close to torch's in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.data.crop import resize_center_crop, resized, resized_crop, resized_crops

BOXES = np.array([[0, 0, 40, 50], [3, 7, 20, 20], [39, 49, 1, 1], [5, 5, 30, 44]])


def images(dtype: torch.dtype) -> Tensor:
    values = torch.randint(0, 65536, (4, 5, 40, 50), generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
@pytest.mark.parametrize("size", [8, 20, 60])
def test_the_two_routes_agree_bit_for_bit(size: int, dtype: torch.dtype, antialias: bool) -> None:
    whole = images(dtype)
    together = resized_crops(whole, BOXES, size, antialias)
    assert together.dtype == dtype
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        assert torch.equal(resized_crop(whole[i], BOXES[i], size, antialias), together[i])
        window = whole[i : i + 1, :, top : top + height, left : left + width].double()
        exact = F.interpolate(window, size=(size, size), mode="bilinear", antialias=antialias)[0]
        assert (together[i].double() - exact).abs().max() <= (0.5 + 1e-6 if dtype == torch.uint16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_a_crop_that_is_not_resized_keeps_its_bits(dtype: torch.dtype) -> None:
    whole = images(dtype)
    box = np.array([[4, 9, 20, 20]])
    assert torch.equal(resized_crops(whole[:1], box, 20)[0], whole[0, :, 4:24, 9:29])
    assert torch.equal(resize_center_crop(whole[0], 40, 20), whole[0, :, 10:30, 15:35])


@pytest.mark.parametrize("resize", [10, 33, 80])
def test_the_evaluation_view_is_the_center_of_the_resized_image(resize: int) -> None:
    image = images(torch.uint16)[0]
    shape = (resize, resize * 50 // 40)
    exact = F.interpolate(image[None].double(), size=shape, mode="bilinear", antialias=True)[0]
    assert (resized(image, shape).double() - exact).abs().max() <= 0.5 + 1e-6
    top, left = round((shape[0] - 8) / 2), round((shape[1] - 8) / 2)
    assert torch.equal(resize_center_crop(image, resize, 8), resized(image, shape)[:, top : top + 8, left : left + 8])
