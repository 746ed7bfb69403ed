"""Random resized crops: torchvision's boxes, ATen's bits."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from moco.data.crop import crop_boxes, resize_center_crop, resized_crop, resized_crops
from moco.data.keyed import keyed_uniform

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Images this small gain nothing from threads, and wait for each other when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Half of them noise, half of them black and white, whose resized values reach the rounding's extremes."""
    images = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    images[::2] = (images[::2] > 127) * 255
    return images.to(torch.uint8)


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


def test_scale_one_keeps_a_square_image_whole() -> None:
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
    # The check has teeth: a slightly wrong area or ratio is seen.
    assert not same_boxes_in_distribution(crop_boxes(uniforms, 60, 80, (0.08, 1), RATIO), theirs)
    assert not same_boxes_in_distribution(crop_boxes(uniforms, 60, 80, (0.2, 1), (1, 1)), theirs)


@pytest.mark.parametrize(
    ("height", "width", "size", "count"),
    [
        (32, 32, 32, 1_000),  # CIFAR, enlarging
        (16, 16, 16, 600),  # digits
        (96, 96, 64, 150),  # STL-10, both ways
        (33, 47, 20, 300),  # odd sides, float32 sums at a scale of up to 2
        (300, 200, 224, 12),  # several parts of the batch
        (300, 200, 32, 30),  # float64 sums
        (700, 900, 7, 5),  # scales of up to 100
    ],
)
def test_resident_crops_equal_torchvision_bit_for_bit(height: int, width: int, size: int, count: int) -> None:
    images = random_images(count, height, width)
    boxes = crop_boxes(keyed_uniform(3, 0, np.arange(count), 0, 22), height, width, (0.08, 1), RATIO)
    ours = resized_crops(images, boxes, size)
    assert ours.shape == (count, 3, size, size)
    assert ours.dtype == torch.uint8
    for image, box, crop in zip(images, boxes, ours, strict=True):
        assert torch.equal(crop, TF.resized_crop(image, *box.tolist(), size=[size, size], antialias=True))
        assert torch.equal(crop, resized_crop(image, box, size))


@pytest.mark.parametrize("size", [8, 19])
def test_every_length_and_place(size: int) -> None:
    extent = 24
    boxes = np.array([[a, 1, n, 2] for n in range(1, extent + 1) for a in range(extent - n + 1)])
    images = random_images(len(boxes), extent, 4, seed=1)
    ours = resized_crops(images, boxes, size)
    theirs = torch.stack([resized_crop(image, box, size) for image, box in zip(images, boxes, strict=True)])
    assert torch.equal(ours, theirs)


def test_crops_survive_reduced_precision() -> None:
    images, uniforms = random_images(64, 32, 32), keyed_uniform(0, 0, np.arange(64), 0, 22)
    boxes = crop_boxes(uniforms, 32, 32, (0.2, 1), RATIO)
    expected = resized_crops(images, boxes, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resized_crops(images, boxes, 32), expected)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(resized_crops(images, boxes, 32), expected)
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


def test_evaluation_view_is_free_when_nothing_is_to_be_done() -> None:
    image = random_images(1, 32, 32)[0]
    assert resize_center_crop(image, 32, 32).data_ptr() == image.data_ptr()


def test_errors_name_field_value_and_fix() -> None:
    with pytest.raises(ValueError, match=r"size=40 exceeds resize=32"):
        resize_center_crop(random_images(1, 32, 32)[0], 32, 40)
    with pytest.raises(ValueError, match=r"uniforms has shape \(5, 21\)"):
        crop_boxes(keyed_uniform(0, 0, np.arange(5), 0, 21), 32, 32, (0.2, 1), RATIO)
