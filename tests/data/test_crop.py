"""Random resized crops: torchvision's boxes, ATen's bits."""

import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from moco.data import crop as module
from moco.data.crop import antialiased_taps, crop_boxes, plain_taps, resize_center_crop, resized_crop, resized_crops
from moco.data.keyed import keyed_uniform

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: threads do not speed up such small images, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images of noise, and of black and white pixels, whose resized values are extreme cases of rounding."""
    images = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    images[::2] = (images[::2] > 127) * 255
    return images.to(torch.uint8)


def bordered_images(boxes: NDArray[np.int64], height: int, width: int, border: int) -> Tensor:
    """Noise within each sample's box, `border` around it."""
    images = torch.full((len(boxes), 3, height, width), border, dtype=torch.uint8)
    for image, inside, (top, left, h, w) in zip(images, random_images(len(boxes), height, width), boxes, strict=True):
        image[:, top : top + h, left : left + w] = inside[:, top : top + h, left : left + w]
    return images


def reference_box(
    uniforms: NDArray[np.float32], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> list[int]:
    """torchvision's RandomResizedCrop.make_params, reading its random numbers from a row of `uniforms`."""
    for k in range(10):
        target = height * width * (scale[0] + float(uniforms[k]) * (scale[1] - scale[0]))
        log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
        aspect = math.exp(log_ratio[0] + float(uniforms[10 + k]) * (log_ratio[1] - log_ratio[0]))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(float(uniforms[20]) * (height - h + 1)), int(float(uniforms[21]) * (width - w + 1)), h, w]
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("shape", [(32, 32), (100, 30), (30, 100), (3, 3), (1, 9)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (0.001, 0.001)])
def test_boxes_equal_a_loop(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    uniforms = keyed_uniform(0, 0, np.arange(200), 0, 22)
    boxes = crop_boxes(uniforms, *shape, scale, RATIO)
    assert boxes.tolist() == [reference_box(row, *shape, scale, RATIO) for row in uniforms]


def test_boxes_of_images_of_many_sizes() -> None:
    uniforms = keyed_uniform(1, 0, np.arange(50), 0, 22)
    heights, widths = np.arange(20, 70), np.arange(90, 40, -1)
    boxes = crop_boxes(uniforms, heights, widths, (0.2, 1), RATIO)
    for row in range(50):
        assert np.array_equal(
            boxes[row : row + 1], crop_boxes(uniforms[row : row + 1], heights[row], widths[row], (0.2, 1), RATIO)
        )


def test_scale_one_keeps_a_square_image() -> None:
    boxes = crop_boxes(keyed_uniform(0, 0, np.arange(300), 0, 22), 32, 32, (1, 1), RATIO)
    assert (boxes == [0, 0, 32, 32]).all()


def same_boxes_in_distribution(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> bool:
    columns = [np.stack([boxes[:, i] for i in range(4)] + [boxes[:, 2] * boxes[:, 3]]) for boxes in (ours, theirs)]
    return all(stats.ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(*columns, strict=True))


def test_boxes_follow_torchvision_in_distribution() -> None:
    torch.manual_seed(0)
    transform = T.RandomResizedCrop(32, scale=(0.2, 1))
    image = torch.zeros(3, 60, 80)
    drawn = [transform.make_params([image]) for _ in range(2_000)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in drawn])
    uniforms = keyed_uniform(0, 0, np.arange(2_000), 0, 22)
    assert same_boxes_in_distribution(crop_boxes(uniforms, 60, 80, (0.2, 1), RATIO), theirs)
    # The check is sensitive: it detects a slightly wrong area or ratio.
    assert not same_boxes_in_distribution(crop_boxes(uniforms, 60, 80, (0.08, 1), RATIO), theirs)
    assert not same_boxes_in_distribution(crop_boxes(uniforms, 60, 80, (0.2, 1), (1, 1)), theirs)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "size", "count"),
    [
        (32, 32, 32, 500),  # CIFAR, enlarging
        (16, 16, 16, 300),  # digits
        (96, 96, 64, 80),  # STL-10, enlarging and reducing
        (33, 47, 20, 150),  # odd sides, float32 sums at a scale of up to 2
        (300, 200, 224, 6),  # several parts of the batch
        (300, 200, 32, 15),  # float64 sums if antialiased
        (700, 900, 7, 3),  # scales of up to 100
        (5, 6, 33, 50),  # enlarging by up to 33
    ],
)
def test_resident_crops_equal_torchvision_bit_for_bit(
    height: int, width: int, size: int, count: int, antialias: bool
) -> None:
    images = random_images(count, height, width)
    boxes = crop_boxes(keyed_uniform(3, 0, np.arange(count), 0, 22), height, width, (0.01, 1), RATIO)
    ours = resized_crops(images, boxes, size, antialias)
    assert ours.shape == (count, 3, size, size)
    assert ours.dtype == torch.uint8
    for image, box, crop in zip(images, boxes, ours, strict=True):
        assert torch.equal(crop, TF.resized_crop(image, *box.tolist(), size=[size, size], antialias=antialias))
        assert torch.equal(crop, resized_crop(image, box, size, antialias))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [8, 19])
def test_every_length_and_position(size: int, antialias: bool) -> None:
    extent = 24
    boxes = np.array([[a, 1, n, 2] for n in range(1, extent + 1) for a in range(extent - n + 1)])
    images = random_images(len(boxes), extent, 4, seed=1)
    ours = resized_crops(images, boxes, size, antialias)
    theirs = torch.stack([resized_crop(image, box, size, antialias) for image, box in zip(images, boxes, strict=True)])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_the_weights_are_those_of_torchvision_on_floats(size: int, antialias: bool) -> None:
    # Rounded to integers they are the weights for uint8, unrounded those for float.
    lengths = np.arange(1.0, 41.0)[:, None]
    first, taps = (antialiased_taps if antialias else plain_taps)(lengths, size)  # (L, S), (L, S, K)
    assert np.abs(taps.sum(axis=2) - 1).max() < 1e-12
    assert taps.min() >= 0
    image = torch.rand(1, 45, 45, generator=torch.Generator().manual_seed(0))
    for h in range(1, 41):
        w = 41 - h
        down, across = np.zeros((size, 45 + taps.shape[2])), np.zeros((size, 45 + taps.shape[2]))
        for pixel in range(size):
            for k in range(taps.shape[2]):
                down[pixel, 3 + int(first[h - 1, pixel]) + k] += taps[h - 1, pixel, k]
                across[pixel, 2 + int(first[w - 1, pixel]) + k] += taps[w - 1, pixel, k]
        ours = down[:, :45] @ image[0].numpy().astype(np.float64) @ across[:, :45].T
        theirs = TF.resized_crop(image, 3, 2, h, w, size=[size, size], antialias=antialias)[0].numpy()
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("size", [3, 16])
def test_a_crop_without_antialiasing_is_within_a_level_of_a_float_crop(size: int) -> None:
    # Each of the two axes rounds by at most half a level, and its two weights by at most 2**-15 each.
    images, count = random_images(100, 40, 30), 100
    boxes = crop_boxes(keyed_uniform(4, 0, np.arange(count), 0, 22), 40, 30, (0.01, 1), RATIO)
    for image, box, crop in zip(images, boxes, resized_crops(images, boxes, size, antialias=False), strict=True):
        floats = TF.resized_crop(image.double(), *box.tolist(), size=[size, size], antialias=False)
        assert (crop - floats).abs().max() <= 1 + 4 * 255 * 2**-15


def test_a_crop_without_antialiasing_uses_single_pixels_and_an_antialiased_one_their_mean() -> None:
    columns = torch.arange(27).remainder(3).eq(1).to(torch.uint8) * 255  # every third column is white
    image, box = columns.expand(1, 3, 27, 27), np.array([[0, 0, 27, 27]])
    assert (resized_crops(image, box, 9, antialias=False) == 255).all()
    assert (resized_crops(image, box, 9)[..., 1:-1].int() - 255 / 3).abs().max() < 60
    # An enlarged crop averages nothing.
    assert torch.equal(resized_crops(image, box, 50, antialias=False), resized_crops(image, box, 50))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [4, 11])
def test_pixels_outside_the_box_have_no_influence(size: int, antialias: bool) -> None:
    sides = [(h, w) for h in (1, 2, 5, 12) for w in (1, 3, 12)]
    boxes = np.array([[top, left, h, w] for h, w in sides for top in (0, 14 - h) for left in (1, 15 - w)])
    black, white = (bordered_images(boxes, 14, 15, border) for border in (0, 255))
    ours = resized_crops(black, boxes, size, antialias)
    assert torch.equal(ours, resized_crops(white, boxes, size, antialias))
    for image, box, crop in zip(white, boxes, ours, strict=True):
        assert torch.equal(resized_crop(image, box, size, antialias), crop)
    point = (boxes[:, 2:] == 1).all(axis=1)  # boxes of one pixel, which fills the crop
    assert point.sum() == 4
    assert torch.equal(ours[point], ours[point][..., :1, :1].expand(-1, -1, size, size))


@pytest.mark.parametrize("antialias", [True, False])
def test_crops_are_exact_under_reduced_precision_settings(antialias: bool) -> None:
    images, uniforms = random_images(64, 32, 32), keyed_uniform(0, 0, np.arange(64), 0, 22)
    boxes = crop_boxes(uniforms, 32, 32, (0.2, 1), RATIO)
    expected = resized_crops(images, boxes, 32, antialias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resized_crops(images, boxes, 32, antialias), expected)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(resized_crops(images, boxes, 32, antialias), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_crop_does_not_depend_on_the_batch() -> None:
    images = random_images(200, 32, 32)
    boxes = crop_boxes(keyed_uniform(0, 0, np.arange(200), 0, 22), 32, 32, (0.2, 1), RATIO)
    together = resized_crops(images, boxes, 32)
    alone = [resized_crops(images[i : i + 1], boxes[i : i + 1], 32) for i in range(200)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("height", "width", "resize", "size"),
    [(300, 200, 256, 224), (200, 300, 64, 64), (33, 57, 40, 31), (32, 32, 32, 32), (500, 256, 256, 225)],
)
def test_evaluation_view_equals_torchvision(height: int, width: int, resize: int, size: int) -> None:
    image = random_images(2, height, width)[1]
    expected = TF.center_crop(TF.resize(image, [resize], antialias=True), [size, size])
    assert torch.equal(resize_center_crop(image, resize, size), expected)


def test_evaluation_view_returns_an_image_of_the_right_size() -> None:
    image = random_images(1, 32, 32)[0]
    assert resize_center_crop(image, 32, 32).data_ptr() == image.data_ptr()


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(1, 60), st.integers(1, 300)), st.booleans(), st.booleans(), st.data())
def test_the_center_alone_equals_the_enlarged_image_cropped(
    sides: tuple[int, int], tall: bool, channels_last: bool, data: st.DataObject
) -> None:
    height, width = sides[::-1] if tall else sides
    resize = data.draw(st.integers(min(sides) + 1, 3 * min(sides) + 20))
    size = data.draw(st.integers(1, resize))
    image = random_images(1, height, width)[0]
    if channels_last:  # as decoders write it
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = TF.center_crop(TF.resize(image, [resize], antialias=True), [size, size])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LARGEST_RESIZED", 0)
        assert torch.equal(resize_center_crop(image, resize, size), expected)


SHAPES = [(2, 20_000), (65_500, 2), (2, 65_500), (1, 1_000_000), (1, 1), (3, 50_000)]


def test_memory_is_bounded_for_every_shape() -> None:
    script = f"""
import resource, numpy as np, torch
from moco.data.crop import crop_boxes, resize_center_crop, resized_crop, resized_crops
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for height, width in {SHAPES}:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert resize_center_crop(image, 256, 224).shape == (3, 224, 224)
    boxes = crop_boxes(np.full((1, 22), 0.5, np.float32), height, width, (0.2, 1.0), (0.75, 1.33))
    alone = resized_crop(image, boxes[0], 224)
    assert torch.equal(resized_crops(image[None], boxes, 224)[0], alone)
    whole = np.array([[0, 0, height, width]])
    assert resized_crops(image[None], whole, 224).shape == (1, 3, 224, 224)
assert resize_center_crop(torch.zeros(3, 200, 300, dtype=torch.uint8), 100_000, 224).shape == (3, 224, 224)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 600  # MB; the old route took 13,000


def test_a_size_above_the_resize_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size=40 exceeds resize=32"):
        resize_center_crop(random_images(1, 32, 32)[0], 32, 40)
    with pytest.raises(ValueError, match=r"uniforms has shape \(5, 21\)"):
        crop_boxes(keyed_uniform(0, 0, np.arange(5), 0, 21), 32, 32, (0.2, 1), RATIO)
