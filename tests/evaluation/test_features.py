"""Features are in the source's order, one per image, and equal for memory and files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from moco.config import DataConfig
from moco.data.decode import ImageError
from moco.data.sources import ArraySource, Source, load_source
from moco.evaluation.features import EvalTransform, Inference, evaluation_view, extract, pixels

SIZE, MEAN, STD = 6, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CPU = torch.device("cpu")


def in_memory(count: int, height: int = SIZE, width: int = SIZE) -> ArraySource:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    return ArraySource(images, [f"random/{i}" for i in range(count)])


def on_disk(source: ArraySource, folder: Path) -> Source:
    """Write the same images as PNG files in a folder."""
    for i, image in enumerate(source.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return load_source(DataConfig("folder", str(folder))).train


def features(network: nn.Module, source: Source, batch: int, resize: int = 0, workers: int = 0) -> Tensor:
    return extract(network, source, EvalTransform(SIZE, resize, MEAN, STD), Inference(CPU, batch, workers))


@pytest.fixture
def network() -> nn.Module:
    """A network with batch normalization, whose outputs differ in training mode."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten())
    layer = network[1]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_var is not None
    layer.running_var.fill_(2.0)
    return network


# ---- order and coverage ----


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_every_sample_once_and_in_order_for_any_batch_size(count: int, batch: int, network: nn.Module) -> None:
    source = in_memory(count)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    got = features(network, source, batch)
    assert sum(seen) == count
    assert max(seen) <= batch
    network.eval()
    for i in range(count):
        image = (source.images[i].double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        torch.testing.assert_close(got[i], network(image.float()[None])[0].detach(), rtol=1e-5, atol=1e-5)


def test_pixels_are_the_image_itself() -> None:
    source = in_memory(3)
    got = extract(pixels, source, EvalTransform(SIZE), Inference(CPU, 2))
    assert torch.equal(got, source.images.flatten(1).float() / 255)


# ---- the network ----


@pytest.mark.parametrize("training", [True, False])
def test_the_network_returns_to_its_previous_mode(training: bool, network: nn.Module) -> None:
    network.train(training)
    modes: list[bool] = []
    network[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))  # type: ignore[index]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    got = features(network, in_memory(5), 2)
    assert modes == [False] * 3
    assert all(layer.training == training for layer in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not got.requires_grad


# ---- files ----


@pytest.mark.parametrize("workers", [0, 1])
def test_files_give_the_features_of_the_same_images_in_memory(workers: int, network: nn.Module, tmp_path: Path) -> None:
    source = in_memory(7)
    assert torch.equal(features(network, on_disk(source, tmp_path), 3, 0, workers), features(network, source, 3))


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (SIZE, 9), (12, 8)])
@pytest.mark.parametrize("resize", [0, SIZE, SIZE + 2])
def test_files_and_memory_agree_for_any_evaluation_view(
    resize: int, height: int, width: int, network: nn.Module, tmp_path: Path
) -> None:
    source = in_memory(3, height, width)
    expected = torch.stack([evaluation_view(image, resize, SIZE) for image in source.images])
    assert expected.shape == (3, 3, SIZE, SIZE)
    reference = features(network, ArraySource(expected, source.names), 2)
    assert torch.equal(features(network, source, 2, resize), reference)
    assert torch.equal(features(network, on_disk(source, tmp_path), 2, resize), reference)


def test_evaluation_view_is_the_center() -> None:
    image = torch.from_numpy(np.arange(3 * 10 * 14, dtype=np.uint8).reshape(3, 10, 14))
    assert torch.equal(evaluation_view(image, 10, 6), image[:, 2:8, 4:10])
    assert evaluation_view(image, 0, 6).equal(evaluation_view(image, 6, 6))
    assert evaluation_view(image[:, :6, :6], 0, 6).equal(image[:, :6, :6])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_named(workers: int, network: nn.Module, tmp_path: Path) -> None:
    source = on_disk(in_memory(3), tmp_path)
    (tmp_path / "001.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"001\.png"):
        features(network, source, 2, 0, workers)
