"""Batched augmentation: each operation against torchvision, independence of the batch, checks."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix

from moco.data import ops
from moco.data.augment import _plan, _send, augment, crop_batch, crop_one, largest_shrink
from moco.data.crop import crop_boxes
from moco.data.keyed import keyed_uniform
from moco.data.view import Params, View, draw, draw_crop

JITTER: dict[str, Any] = dict(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
EVERYTHING: dict[str, Any] = dict(
    **JITTER,
    gray_p=0.2,
    blur_p=0.5,
    solarize_p=0.2,
    flip_p=0.5,
    vertical_flip_p=0.5,
    quarter_turn_p=0.75,
    affine_p=0.5,
    degrees=20,
    translate=0.1,
    zoom=(0.8, 1.2),
    shear=10,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: threads do not speed up such small images, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_crops(count: int, size: int, seed: int = 0) -> Tensor:
    """Noise, flat colors, gray images, and few levels, where channels tie."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    crops[1::4] = crops[1::4, :, :1, :1]
    crops[2::4] = crops[2::4, :1]
    crops[3::4] = crops[3::4] // 128 * 127
    return crops.to(torch.uint8)


def by_torchvision(x: Tensor, params: Params, row: int, view: View) -> Tensor:
    """Augment one sample, uint8 or float, by torchvision's functionals in the sample's own order."""
    if view.gray_first and params.gray[row]:
        x = TF.rgb_to_grayscale(x, 3)
    if params.jitter[row]:
        color = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        strengths = (view.brightness, view.contrast, view.saturation, view.hue)
        for which in params.order[row]:
            if strengths[which] > 0:
                x = color[which](x, float(params.factors[row, which]))
    if not view.gray_first and params.gray[row]:
        x = TF.rgb_to_grayscale(x, 3)
    if params.blur[row]:
        kernel = 2 * min(int(np.ceil(3 * view.blur_sigma[1])), view.size - 1) + 1
        x = TF.gaussian_blur(x, [kernel, kernel], [float(params.sigma[row])])
    if params.solarize[row]:
        x = TF.solarize(x, view.solarize_threshold * (1 if x.is_floating_point() else 255))
    if params.flip[row]:
        x = TF.horizontal_flip(x)
    if params.vertical_flip[row]:
        x = TF.vertical_flip(x)
    if params.turns[row]:
        x = TF.rotate(x, 90.0 * params.turns[row])  # of a square, by quarters: exact
    return x


def reference(crop: Tensor, params: Params, row: int, view: View) -> Tensor:
    """Augment one sample by torchvision's functionals on floats, from the crop to the normalized view."""
    x = crop.float() / 255
    if params.affine[row]:
        # test_affine compares the arguments of torchvision; here only its kernel is called.
        x = ops.affine(x[None], torch.from_numpy(params.theta[row : row + 1]))[0]
    normalized: Tensor = TF.normalize(by_torchvision(x, params, row, view), list(view.mean), list(view.std))
    return normalized


def levels(x: Tensor) -> Tensor:
    """Convert values 0 ... 1 to integers, truncated as in torchvision; 1e-3 compensates float32's rounding."""
    return (x * 255 + 1e-3).floor().int()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(jitter_p=1, brightness=0.8),
        dict(jitter_p=1, contrast=0.8),
        dict(jitter_p=1, saturation=0.8),
        dict(jitter_p=1, hue=0.5),
        JITTER,
        dict(jitter_p=1, brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5),
        dict(gray_p=0.5),
        dict(blur_p=0.5),
        dict(blur_p=1, blur_sigma=(2, 5)),
        dict(solarize_p=0.5),
        dict(solarize_p=1, solarize_threshold=0.25),
        dict(flip_p=0.5),
        dict(vertical_flip_p=0.5),
        dict(quarter_turn_p=0.75),
        dict(**JITTER, gray_p=0.5, gray_first=True),
    ],
    ids=str,
)
def test_each_operation_equals_torchvision(fields: dict[str, Any]) -> None:
    view = View(size=17, **fields)
    crops, params = random_crops(64, 17), draw(view, 0, 0, np.arange(64), 0)
    expected = torch.stack([reference(crops[row], params, row, view) for row in range(64)])
    assert (augment(crops, params, view) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        dict(jitter_p=1, brightness=0.8),
        dict(jitter_p=1, contrast=0.8),
        dict(jitter_p=1, saturation=0.8),
        dict(jitter_p=1, hue=0.5),
        dict(gray_p=1),
        dict(blur_p=1),
        dict(blur_p=1, blur_sigma=(2, 5)),
        dict(solarize_p=1),
        dict(flip_p=1),
        dict(vertical_flip_p=1),
        dict(quarter_turn_p=1),
    ],
    ids=str,
)
def test_each_operation_is_within_a_level_of_torchvision_on_uint8(fields: dict[str, Any]) -> None:
    view = View(size=17, **fields)
    crops, params = random_crops(64, 17), draw(view, 0, 0, np.arange(64), 0)
    theirs = torch.stack([by_torchvision(crops[row], params, row, view) for row in range(64)])
    assert theirs.dtype == torch.uint8
    assert (levels(augment(crops, params, view)) - theirs).abs().max() <= 1


def test_all_operations_together_equal_torchvision() -> None:
    view = View(size=32, **EVERYTHING)
    crops, params = random_crops(64, 32), draw(view, 0, 0, np.arange(64), 0)
    expected = torch.stack([reference(crops[row], params, row, view) for row in range(64)])
    # Normalizing divides by 0.225, so 1e-5 of the pixels' range is 5e-5 here.
    assert (augment(crops, params, view) - expected).abs().max() < 5e-5


def test_affine_equals_torchvision() -> None:
    view = View(size=17, affine_p=1, degrees=30, translate=0.2, zoom=(0.7, 1.3), shear=15)
    crops, params = random_crops(64, 17), draw(view, 0, 0, np.arange(64), 0)
    ours = augment(crops, params, view)
    u = keyed_uniform(0, 0, np.arange(64), 0, 64).astype(float)
    for row in range(64):
        angle, zoom, shear = -30 + 60 * u[row, 39], 0.7 + 0.6 * u[row, 42], -15 + 30 * u[row, 43]
        shift = [round((-0.2 + 0.4 * u[row, k]) * 17) for k in (40, 41)]
        matrix = np.array(_get_inverse_affine_matrix([0, 0], angle, shift, zoom, [shear, 0.0]))
        assert np.allclose(params.theta[row] * 17 / 2, matrix, atol=1e-5)
        floats, full = (
            TF.affine(crop, angle, shift, zoom, [shear, 0.0], interpolation=TF.InterpolationMode.BILINEAR)
            for crop in (crops[row] / 255, crops[row])
        )
        assert (ours[row] - floats).abs().max() < 1e-5
        assert (levels(ours[row]) - full).abs().max() <= 1


def test_hue_of_ties_and_extremes() -> None:
    levels = torch.tensor([0, 1e-8, 0.25, 0.5, 1 - 2**-24, 1])
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, -1, 1)
    for turn in np.linspace(-0.5, 0.5, 21).tolist():
        ours = ops.hue_(x.clone(), torch.tensor([turn]))
        assert (ours - TF.adjust_hue(x, turn)).abs().max() < 1e-5


def test_blur_keeps_the_mean_of_a_flat_image_and_spreads_a_point() -> None:
    view = View(size=31, blur_p=1, blur_sigma=(2, 2))
    params = draw(view, 0, 0, [0, 1], 0)
    crops = torch.full((2, 3, 31, 31), 100, dtype=torch.uint8)
    crops[1] = 0
    crops[1, :, 15, 15] = 255
    flat, point = augment(crops, params, view)
    assert (flat - 100 / 255).abs().max() < 1e-6
    across = point[0].sum(0)
    spread = (across * (torch.arange(31) - 15) ** 2).sum().sqrt()
    assert abs(across.sum() - 1) < 1e-5
    assert 1.9 < spread < 2  # 2 pixels, without the part beyond 3 sigma


def test_noise_is_gaussian_keyed_and_clamped() -> None:
    view = View(size=15, noise=(0.1, 0.1))
    index = np.arange(40)
    params = draw(view, 0, 0, index, 0)
    assert stats.kstest(params.noise.ravel() / 0.1, "norm").pvalue > 1e-3
    assert stats.kstest(params.noise.ravel() / 0.11, "norm").pvalue < 1e-3
    crops = torch.full((40, 3, 15, 15), 128, dtype=torch.uint8)
    expected = (128 / 255 + torch.from_numpy(params.noise)[:, None]).clamp(0, 1).expand(-1, 3, -1, -1)
    assert torch.allclose(augment(crops, params, view), expected, atol=1e-6)
    assert np.array_equal(draw(view, 0, 0, index[::-1], 0).noise, params.noise[::-1])
    wide = draw(View(size=15, noise=(0.0, 0.3)), 0, 0, np.arange(400), 0).noise.std(axis=(1, 2))
    assert stats.kstest(wide, "uniform", (0, 0.3)).pvalue > 1e-3


@pytest.mark.parametrize(("count", "size"), [(64, 32), (64, 17), (9, 224)])
def test_a_sample_does_not_depend_on_its_batch(count: int, size: int) -> None:
    view = View(size=size, noise=(0, 0.05) if size < 100 else (0, 0), **EVERYTHING)
    crops, index = random_crops(count, size), np.arange(count) * 7
    together = augment(crops, draw(view, 1, 2, index, 1), view)
    alone = [augment(crops[row : row + 1], draw(view, 1, 2, index[row : row + 1], 1), view) for row in range(count)]
    assert torch.equal(together, torch.cat(alone))
    back = augment(crops.flip(0), draw(view, 1, 2, index[::-1], 1), view).flip(0)
    assert torch.equal(together, back)


def test_results_do_not_depend_on_threads_or_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View(size=80, **EVERYTHING)  # large enough that torch divides two samples among threads
    crops, params = random_crops(12, 80), draw(view, 0, 0, np.arange(12), 0)
    expected = augment(crops, params, view)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            monkeypatch.setattr("moco.data.augment._CPU_PART", 3 * 80**2 * (2 * count + 1))
            assert torch.equal(augment(crops, params, view), expected)
    finally:
        torch.set_num_threads(threads)


def test_adding_an_operation_changes_no_other_draw() -> None:
    bare, full = View(size=8, **JITTER), View(size=8, noise=(0, 0.1), **EVERYTHING)
    a, b = draw(bare, 0, 0, np.arange(50), 0), draw(full, 0, 0, np.arange(50), 0)
    for name in ("jitter", "factors", "order"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("antialias", [True, False])
def test_streamed_and_resident_views_are_equal(antialias: bool) -> None:
    view = View(size=24, crop_scale=(0.2, 1), antialias=antialias, **EVERYTHING)
    images = torch.randint(0, 256, (16, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    streamed = [crop_one(images[i], draw_crop(0, 0, [i], 0)[0], view) for i in range(16)]
    assert torch.equal(torch.stack(streamed), crop_batch(images, draw_crop(0, 0, np.arange(16), 0), view))


def test_a_view_without_antialiasing_equals_torchvision_and_needs_the_full_image() -> None:
    view = View(size=16, crop_scale=(0.5, 1), antialias=False)
    antialiased = dataclasses.replace(view, antialias=True)
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i in range(10):
        uniforms = draw_crop(0, 0, [i], 0)[0]
        (box,) = crop_boxes(uniforms[None], 90, 120, view.crop_scale, view.crop_ratio)
        ours = crop_one(image, uniforms, view)
        assert torch.equal(ours, TF.resized_crop(image, *box.tolist(), size=[16, 16], antialias=False))
        assert not torch.equal(ours, crop_one(image, uniforms, antialiased))
        # An image is decoded at a fraction of its size only if all of its views are antialiased.
        assert largest_shrink([antialiased, antialiased], [uniforms, uniforms], 90, 120) > 1
        assert largest_shrink([antialiased, view], [uniforms, uniforms], 90, 120) == 1


def test_defaults_change_nothing() -> None:
    view = View(size=20)
    images, index = random_crops(8, 20), np.arange(8)
    crops = crop_batch(images, draw_crop(0, 0, index, 0), view)
    assert torch.equal(augment(crops, draw(view, 0, 0, index, 0), view), images / 255)


def test_the_complete_plan_is_sent_to_a_device() -> None:
    # The meta device has shapes only; the packing is the same as for a GPU.
    view = View(size=8, noise=(0, 0.1), **EVERYTHING)
    plan = _plan(draw(view, 0, 0, np.arange(64), 0), view)
    sent = _send(plan, torch.device("meta"))
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == {name: a.shape for name, a in plan.items()}


@pytest.mark.parametrize(
    "fields",
    [
        dict(size=0),
        dict(antialias="no"),
        dict(gray_first=1),
        dict(jitter_p=1.1),
        dict(gray_p=-0.1),
        dict(hue=0.6),
        dict(brightness=-0.4),
        dict(contrast=float("nan")),
        dict(crop_scale=(1.0, 0.2)),
        dict(crop_scale=(0.2, 1.5)),
        dict(crop_ratio=(0.0, 1.0)),
        dict(blur_sigma=(2.0, 0.1)),
        dict(solarize_threshold=2),
        dict(vertical_flip_p=2),
        dict(quarter_turn_p=-0.5),
        dict(degrees=200),
        dict(shear=90),
        dict(zoom=(0.0, 1.0)),
        dict(noise=(-0.1, 0.1)),
        dict(mean=(0.5, 0.5)),
        dict(std=(0.5, 0.0, 0.5)),
    ],
    ids=str,
)
def test_invalid_views_are_refused(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value} must ")):
        View(**{"size": 32, **fields})


def test_crops_of_another_shape_or_type_are_refused() -> None:
    view = View(size=8)
    params = draw(view, 0, 0, [0, 1], 0)
    for crops in (random_crops(2, 9), random_crops(3, 8), random_crops(2, 8).double()):
        with pytest.raises(ValueError, match="this view needs"):
            augment(crops, params, view)


def test_view_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        View(size=8).size = 9  # type: ignore[misc]
