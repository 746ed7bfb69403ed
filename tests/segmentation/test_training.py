"""Segmentation networks and their training: crops, the loss, two processes against one, resuming."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import ConfigError, OptimConfig
from moco.data.plan import Plan
from moco.distributed import rank, world_size, wrap_ddp
from moco.evaluation.steps import Schedule
from moco.interop.encoder_file import EncoderFile
from moco.models.backbones import build_backbone
from moco.optim.optimizers import build_optimizer
from moco.segmentation.crop import CropSettings, training_crop
from moco.segmentation.masks import IGNORED, MaskedImages, _table
from moco.segmentation.network import HEADS, SegmentationNetwork, build_network, with_output_stride
from moco.segmentation.training import TrainSettings, evaluate, pixel_loss, train
from scripts.canvases import draw_canvas, write_canvases
from tests.distributed.launch import run_ranks

PLAIN = CropSettings(8, (1.0, 1.0), 0.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def encoder_file(name: str, **options: Any) -> EncoderFile:
    torch.manual_seed(0)
    return EncoderFile("x.pt", "plain", name, options, dict(build_backbone(name, options).state_dict()))


def build(file: EncoderFile, head: str = "linear", frozen: bool = False) -> SegmentationNetwork:
    return build_network(file, head, 11, seed=0, untrained=False, frozen=frozen, bn="sync")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["resnet18", "convnet", "timm/resnet10t", "timm/convnext_atto"])
def test_every_head_scores_each_pixel(name: str, head: str) -> None:
    network = build(encoder_file(name), head)
    assert network(torch.rand(2, 3, 65, 96)).shape == (2, 11, 65, 96)


def test_output_stride_dilates_the_last_stages_with_the_same_weights() -> None:
    file = encoder_file("resnet50")
    images = torch.rand(1, 3, 64, 64)
    for stride in (32, 16, 8, None):
        network = build(with_output_stride(file, stride)).eval()
        assert network.feature_map(images).shape == (1, 2048, *[64 // (stride or 32)] * 2)
        assert network.backbone.state_dict().keys() == file.weights.keys()
    with pytest.raises(ConfigError, match="output_stride=16 needs ResNet-50 or a deeper one"):
        with_output_stride(encoder_file("resnet18"), 16)


def test_a_network_without_a_feature_map_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"timm/test_vit takes images of one size: moco\.segment needs a"):
        build(encoder_file("timm/test_vit"))


def test_a_frozen_encoder_keeps_weights_and_statistics(tmp_path: Path) -> None:
    write_canvases(tmp_path, 8, 1, side=16)
    network = build(encoder_file("convnet", width=4), frozen=True)
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    head = network.head.weight.clone()  # type: ignore[operator]
    _train(network, masked(tmp_path / "train"), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in network.backbone.state_dict().items())
    assert not torch.equal(head, network.head.weight)  # type: ignore[arg-type]


def test_a_crop_moves_image_and_mask_together() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (20, 30), dtype=np.uint8)
    image = torch.from_numpy(mask)[None].repeat(3, 1, 1) * 50
    settings = CropSettings(8, (1.0, 1.0), 0.5, PLAIN.mean, PLAIN.std)
    for _ in range(50):
        uniforms = rng.random(4).tolist()
        crop, labels = training_crop(image, mask, uniforms, settings)
        assert torch.equal((crop[0] * 255 / 50).round().to(torch.uint8), labels)
        top, left = int(uniforms[1] * 13), int(uniforms[2] * 23)
        expected = mask[top : top + 8, left : left + 8]
        assert np.array_equal(labels.numpy(), expected[:, ::-1] if uniforms[3] < 0.5 else expected)


def test_a_crop_is_filled_up_with_the_mean_and_without_a_class() -> None:
    image, mask = torch.full((3, 5, 6), 255, dtype=torch.uint8), np.ones((5, 6), np.uint8)
    settings = CropSettings(8, (1.0, 1.0), 0.0, (0.5,) * 3, (0.25,) * 3)
    crop, labels = training_crop(image, mask, [0.9, 0.9, 0.9, 0.9], settings)
    assert (crop[:, :5, :6] == 2).all()
    assert (labels[:5, :6] == 1).all()
    assert crop.count_nonzero() == 3 * 5 * 6
    assert (labels == IGNORED).sum() == 64 - 30
    larger, _ = training_crop(image, mask, [0.999, 0, 0, 0], CropSettings(12, (0.5, 2.0), 0.0, (0.5,) * 3, (0.25,) * 3))
    assert (larger[0] == 2).sum() == 10 * 12  # twice as large


def test_the_loss_is_the_mean_over_the_pixels_with_a_class() -> None:
    torch.manual_seed(0)
    scores, mask = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    mask[0, :3] = IGNORED
    losses = [
        -F.log_softmax(scores[n, :, y, x], dim=0)[int(mask[n, y, x])]
        for n, y, x in np.ndindex(2, 4, 5)
        if mask[n, y, x] != IGNORED
    ]
    assert pixel_loss(mask)(scores).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-7)
    assert pixel_loss(torch.full_like(mask, IGNORED))(scores).item() == 0


def test_the_schedules_have_the_values_of_the_papers() -> None:
    step = Schedule(0.003, 1000, "step", 0.0)
    assert [step.at(each) for each in (0, 699, 700, 899, 900)] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5])
    cosine = Schedule(0.1, 100, "cosine", 0.1)
    assert [cosine.at(each) for each in (0, 9, 10, 55)] == pytest.approx([0.01, 0.1, 0.1, 0.05])


def masked(folder: Path) -> MaskedImages:
    pairs = tuple((str(each), str(folder / "masks" / each.name)) for each in sorted((folder / "images").iterdir()))
    return MaskedImages(pairs, tuple("abcdefghijk"), _table(11, IGNORED))


def _train(network: SegmentationNetwork, images: MaskedImages, steps: int) -> list[float]:
    plan = Plan(len(images), 4, steps, 3, rank(), world_size())
    crops = CropSettings(12, (0.5, 2.0), 0.5, (0.5,) * 3, (0.2,) * 3)
    settings = TrainSettings(crops, Schedule(0.1, steps, "step", 0.0))
    optimizer = build_optimizer(network, OptimConfig(momentum=0.9))
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    losses = list[float]()
    forward = wrap_ddp(network, torch.device("cpu"))
    train(forward, optimizer, images, plan, settings, 0, lambda step: losses.append(step.loss))
    return losses


def _trained(folder: Path) -> tuple[list[float], dict[str, Tensor], float]:
    """Train in float64 on all ranks."""
    torch.set_default_dtype(torch.float32)
    network = _double(build(encoder_file("convnet", width=4), "linear"))
    images = masked(folder)
    losses = _train(network, images, steps=3)
    return losses, dict(network.state_dict()), evaluate(network, images, PLAIN, 0).mean


def _double(network: SegmentationNetwork) -> SegmentationNetwork:
    """Compute in float64, from images of float32."""
    network.double().register_forward_pre_hook(lambda _, images: images[0].double())
    return network


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    write_canvases(tmp_path, 8, 1, side=16)
    one, two = run_ranks(1, _trained, tmp_path / "train"), run_ranks(2, _trained, tmp_path / "train")
    for other in two:
        assert one[0][0] == pytest.approx(other[0], rel=1e-6)
        for name, value in one[0][1].items():
            assert torch.allclose(value, other[1][name], rtol=1e-6, atol=1e-8), name
        assert one[0][2] == pytest.approx(other[2])


def test_evaluation_keeps_the_mode_of_each_layer(tmp_path: Path) -> None:
    write_canvases(tmp_path, 2, 1, side=16)
    network = build(encoder_file("convnet", width=4), frozen=True)
    modes = [module.training for module in network.modules()]
    evaluate(network, masked(tmp_path / "train"), PLAIN, 0)
    assert [module.training for module in network.modules()] == modes
    assert any(isinstance(each, nn.Conv2d) and each.training for each in network.modules())


def test_canvases_have_true_masks_and_boxes() -> None:
    rng = np.random.default_rng(0)
    scans = np.zeros((1, 8, 8))
    scans[0, 2:6, 3:5] = 16
    for _ in range(20):
        pixels, mask, boxes = draw_canvas(rng, scans, np.array([7]))
        assert pixels.shape == (64, 64, 3)
        assert set(np.unique(mask)) == {0, 8}
        inside = np.zeros_like(mask)
        for digit, left, top, right, bottom in boxes:
            assert digit == 7
            inside[top:bottom, left:right] = 1
            assert mask[top, left:right].any()
            assert mask[bottom - 1, left:right].any()
        assert not mask[inside == 0].any()


def test_a_canvas_for_pretraining_shows_one_digit_and_has_no_labels(tmp_path: Path) -> None:
    write_canvases(tmp_path, 1, 1, pretrain=3)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pretrain").rglob("*.*"))
    assert written == [f"pretrain/images/0000{number}.png" for number in range(3)]
    scans = np.full((1, 8, 8), 16.0)
    for seed in range(20):
        pixels, _, boxes = draw_canvas(np.random.default_rng(seed), scans, np.array([3]), alone=True)
        assert pixels.shape == (32, 32, 3)
        ((digit, left, top, right, bottom),) = boxes
        assert digit == 3
        assert 24 <= right - left == bottom - top <= 32


def test_backgrounds_do_not_tell_canvases_apart() -> None:
    blank = np.zeros((1, 8, 8))
    blank[0, 0, 0] = 16  # a dot, because each digit has a box
    canvases = np.stack([draw_canvas(np.random.default_rng(seed), blank, np.array([0]))[0] for seed in range(20)])
    assert canvases.mean(axis=(1, 2, 3)).std() < 0.1 * canvases.std()
    assert canvases.std(axis=(1, 2, 3)).std() < 0.1 * canvases.std()
