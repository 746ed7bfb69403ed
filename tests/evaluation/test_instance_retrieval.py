"""Retrieval of the other crop of an image: the value, and the measurement on a folder."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from moco.config import DataConfig
from moco.data.duplicates import content_groups
from moco.data.sources import load_source
from moco.evaluation.features import EvalTransform, Inference, pixels
from moco.evaluation.instance_retrieval import images_used, instance_retrieval, retrieval_at_1
from moco.evaluation.knn_classifier import Accuracy
from tests.data import images as example_images


def reference(first: Tensor, second: Tensor, groups: list[int]) -> float:
    """Compare each crop with all crops of the other kind, in loops."""
    found = 0
    for queries, keys in ((first, second), (second, first)):
        for i, query in enumerate(queries):
            similarities = [float(torch.cosine_similarity(query.double(), key.double(), dim=0)) for key in keys]
            found += groups[similarities.index(max(similarities))] == groups[i]
    return 100 * found / (2 * len(first))


def measure(folder: Path, batch_size: int = 4) -> dict[str, Accuracy]:
    """Measure raw pixels and their mean color on a folder of ten images."""
    source = load_source(DataConfig(name="folder", root=str(folder))).train
    networks = {"raw_pixels": pixels, "color": lambda images: images.mean(dim=(2, 3))}
    return instance_retrieval(networks, source, EvalTransform(16), Inference(torch.device("cpu"), batch_size))


def test_the_value_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 8, generator=generator)
    second = first + torch.randn(40, 8, generator=generator)
    alone, pairs = torch.arange(40), torch.arange(40) // 2
    found = [retrieval_at_1(first, second, groups).mean for groups in (alone, pairs)]
    assert found == pytest.approx([reference(first, second, groups.tolist()) for groups in (alone, pairs)], abs=1e-9)
    assert 0 < found[0] < found[1] < 100


def test_perfect_features_find_every_crop_and_constant_features_one() -> None:
    assert retrieval_at_1(torch.eye(9), 3 * torch.eye(9), torch.arange(9)) == (100, 0, 9)
    constant = retrieval_at_1(torch.ones(8, 3), torch.ones(8, 3), torch.arange(8))
    share = 1 / 8
    assert constant == pytest.approx((100 * share, 100 * (share * (1 - share) / 7) ** 0.5, 8))
    assert str(constant) == "12.5 % ± 12.5"
    assert retrieval_at_1(torch.ones(1, 3), torch.ones(1, 3), torch.arange(1)) == (100, 0, 1)


def test_complete_batches_of_at_most_1024_images_are_used() -> None:
    assert [images_used(*each) for each in ((250, 32), (10**6, 256), (50_000, 4096), (32, 32))] == [
        224,
        1024,
        4096,
        32,
    ]


def test_a_copy_of_the_image_is_an_equally_right_answer(tmp_path: Path) -> None:
    """Four images, each under two names: their color finds one of the two crops, whichever comes first."""
    for i, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 200, 0)] * 2):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{i}.png")
    assert measure(tmp_path) == {"raw_pixels": (100, 0, 8), "color": (100, 0, 8)}
    source = load_source(DataConfig(name="folder", root=str(tmp_path))).train
    assert content_groups(source).tolist() == [0, 1, 2, 3] * 2


def test_a_folder_is_measured_the_same_twice_and_leaves_modules_in_their_mode(tmp_path: Path) -> None:
    folder = example_images.folder(tmp_path / "images", 10)
    found = measure(folder)
    assert found == measure(folder)
    assert all(
        100 / 8 < value.mean <= 100 for value in found.values()
    )  # eight images; gradients differ in their colors
    norm = torch.nn.BatchNorm1d(3 * 16 * 16)
    network = torch.nn.Sequential(torch.nn.Flatten(), norm)
    source = load_source(DataConfig(name="folder", root=str(folder))).train
    instance_retrieval({"network": network}, source, EvalTransform(16), Inference(torch.device("cpu"), 4))
    assert network.training
    assert norm.num_batches_tracked == 0
