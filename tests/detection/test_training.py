"""Detectors and their training: form, sampling, the loss of the global batch, two processes against one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from moco.config import ConfigError, OptimConfig
from moco.config.detect import DETECTORS
from moco.data.plan import Plan
from moco.detection.images import BoxedImage
from moco.detection.measure import evaluate
from moco.detection.network import DetectorSettings, Padding, build_detector
from moco.detection.sampling import DetectorLoss, KeyedSampler
from moco.detection.training import TrainSettings, predict, recompute_statistics, train
from moco.detection.views import TrainingDataset, ViewSettings, resized, training_example
from moco.distributed import rank, sum_over_ranks, world_size, wrap_ddp
from moco.evaluation.steps import Schedule
from moco.models.norm import GroupedBatchNorm
from moco.optim.optimizers import build_optimizer
from scripts.canvases import write_canvases
from tests.detection.examples import canvases, encoder_file
from tests.distributed.launch import run_ranks

MEAN = (0.5, 0.5, 0.5)
CONVNET = {"width": 4, "strides": [2, 2, 1, 2, 1]}  # its stages have strides 2, 4 and 8


def views(masks: bool = False, sizes: tuple[int, ...] = (32, 40), flip_p: float = 0.5) -> ViewSettings:
    return ViewSettings(sizes, 32, 64, flip_p, MEAN, MEAN, masks)


def detector(form: str, name: str = "resnet18", width: int = 16, **settings: Any) -> Any:
    file = encoder_file(name, **(CONVNET if name == "convnet" else {}))
    return build_detector(file, DetectorSettings(form, width=width, **settings), 10, seed=0, untrained=False)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("form", DETECTORS)
def test_every_detector_trains_all_weights_and_finds_boxes(form: str, norm: bool, tmp_path: Path) -> None:
    write_canvases(tmp_path, 2, 1, side=32)
    masks = form.startswith("mask")
    network = detector(form, norm=norm)
    loss = DetectorLoss(network, 16, 16)
    batch = TrainingDataset(canvases(tmp_path / "train", masks), views(masks), 0)[0, np.array([0, 1])]
    assert isinstance(batch, list)
    images, targets, keys = zip(*batch, strict=True)
    value = loss(list(images), list(targets), list(keys))
    assert torch.isfinite(value)
    assert value > 0
    value.backward()
    lacking = [name for name, each in network.named_parameters() if each.grad is None]
    assert lacking == []
    norms = [
        name for name, each in network.named_modules() if isinstance(each, GroupedBatchNorm) and "body" not in name
    ]
    assert any("norm" in each or "fpn" in each for each in norms) == norm
    found = list(predict(network, canvases(tmp_path / "test", masks), range(1), views(masks), 0))
    assert len(found) == 1
    assert found[0].boxes.shape == (len(found[0].scores), 4)
    assert network.training


def test_the_stages_keep_the_pretrained_weights() -> None:
    file = encoder_file("resnet18")
    for form in DETECTORS:
        state = detector(form).state_dict()
        known = {name.removeprefix("backbone.body."): value for name, value in state.items()}
        known |= {name.removeprefix("roi_heads.box_head.stage."): value for name, value in state.items()}
        for name, value in file.weights.items():
            assert torch.equal(known[name], value), (form, name)


def test_an_untrained_detector_has_other_weights_in_its_backbone_only_by_the_seed() -> None:
    file, settings = encoder_file("convnet", **CONVNET), DetectorSettings("retinanet", width=8)
    one, same, other = (build_detector(file, settings, 3, seed=seed, untrained=True) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    weights = [each.state_dict()["backbone.body.0.weight"] for each in (one, other)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], file.weights["layers.0.weight"])


def test_frozen_normalization_keeps_its_statistics(tmp_path: Path) -> None:
    write_canvases(tmp_path, 2, 1, side=32)
    network = detector("faster_rcnn_fpn", bn="frozen")
    before = network.state_dict()["backbone.body.bn1.running_mean"].clone()
    _train(network, tmp_path / "train", 1)
    assert torch.equal(network.state_dict()["backbone.body.bn1.running_mean"], before)
    assert any(isinstance(each, GroupedBatchNorm) and each.training for each in network.modules())  # of new layers


def test_recomputed_statistics_are_means_over_batches_with_the_final_weights(tmp_path: Path) -> None:
    write_canvases(tmp_path, 4, 1, side=32)
    network = detector("faster_rcnn_fpn")
    first = network.backbone.body.bn1
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    _train(network, tmp_path / "train", steps=3, precise_bn=2)
    assert len(seen) == 5
    variances, means = zip(*(torch.var_mean(each, [0, 2, 3]) for each in seen[3:]), strict=True)
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(dim=0))
    torch.testing.assert_close(first.running_var, torch.stack(variances).mean(dim=0))
    assert first.momentum == 0.1


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="without the stages of feature maps that a detector needs"):
        build_detector(encoder_file("timm/test_vit"), DetectorSettings("retinanet"), 2, seed=0, untrained=False)
    with pytest.raises(ConfigError, match=r"detector=faster_rcnn_c4 needs the four stages of a ResNet"):
        detector("faster_rcnn_c4", "convnet")
    with pytest.raises(ConfigError, match=r"anchor_sizes=\[8\.0\] must hold a size for each of the 5 levels"):
        detector("faster_rcnn_fpn", anchor_sizes=(8.0,))


def test_padding_holds_the_largest_image_and_multiples_of_32() -> None:
    images = [torch.ones(3, 20, 50), torch.ones(3, 33, 10)]
    padded, _ = Padding()(images)
    assert padded.tensors.shape == (2, 3, 64, 64)
    assert padded.image_sizes == [(20, 50), (33, 10)]
    assert padded.tensors.sum() == 3 * (20 * 50 + 33 * 10)


@pytest.mark.parametrize("counts", [(3, 50), (40, 2), (0, 9), (30, 100)])
def test_the_sampler_draws_the_numbers_that_torchvision_draws(counts: tuple[int, int]) -> None:
    labels = [torch.tensor([1] * counts[0] + [0] * counts[1] + [-1] * 5)]
    theirs = BalancedPositiveNegativeSampler(32, 0.25)(labels)
    sampler = KeyedSampler(32, 0.25)
    sampler.keys = [7]
    found = sampler(labels)
    for ours, other in zip(found, theirs, strict=True):
        assert ours[0].sum() == other[0].sum()
    assert not (found[0][0] & (labels[0] != 1)).any()
    assert not (found[1][0] & (labels[0] != 0)).any()
    assert sampler.drawn == sum(int(each[0].sum()) for each in found)
    assert sampler.drawn_positive == int(found[0][0].sum())


def test_the_sampler_is_a_function_of_the_key_and_draws_evenly() -> None:
    labels, sampler, counts = torch.tensor([1] * 20 + [0] * 60), KeyedSampler(16, 0.5), torch.zeros(80)
    for key in range(400):
        sampler.keys = [key, key]
        first, again = ([each[number] for each in sampler([labels, labels])] for number in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        counts += sum(first)
    shares = counts / 400
    assert (shares[:20] - 8 / 20).abs().max() < 0.12  # 5 standard deviations
    assert (shares[20:] - 8 / 60).abs().max() < 0.09


def test_an_example_moves_image_boxes_and_masks_together(tmp_path: Path) -> None:
    write_canvases(tmp_path, 3, 1, side=48)
    for image in canvases(tmp_path / "train", masks=True).images:
        for flip in (0.0, 0.9):
            found = training_example(image, (0.0, flip), (1, 2), views(True, (96,)))
            assert found.image.shape == (3, 64, 64)  # of at most 64 pixels
            for box, mask in zip(found.target["boxes"], found.target["masks"], strict=True):
                rows, columns = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
                edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert (box - edges).abs().max() <= 1.4  # the nearest pixel
            plain = resized(image.pixels(), 96, views())
            assert torch.equal(found.image, plain.flip(2) if flip == 0.0 else plain)
            assert found.keys == (1, 2)


def test_examples_are_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    write_canvases(tmp_path, 4, 1, side=32)
    dataset = TrainingDataset(canvases(tmp_path / "train"), views(), 5)
    both, second = dataset[3, np.array([0, 1])], dataset[3, np.array([1])]
    assert isinstance(both, list)
    assert isinstance(second, list)
    assert torch.equal(both[1].image, second[0].image)
    assert both[1].keys == second[0].keys
    steps = (dataset[epoch, np.array([0, 1])] for epoch in range(20))
    keys = {key for step in steps if isinstance(step, list) for each in step for key in each.keys}
    assert len(keys) == 80


def _train(network: nn.Module, folder: Path, steps: int, batch: int = 2, precise_bn: int = 0) -> list[float]:
    masks = isinstance(network, MaskRCNN)
    images = canvases(folder, masks)
    plan = Plan(len(images), batch, steps, 3, rank(), world_size())
    settings = TrainSettings(views(masks), Schedule(0.02, steps, "step", 0.0))
    loss = DetectorLoss(network, 24, 16)
    optimizer = build_optimizer(network, OptimConfig(momentum=0.9, exclude=["norm"]))
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    losses = list[float]()
    forward = wrap_ddp(loss, torch.device("cpu"))
    train(forward, optimizer, images, plan, settings, 0, lambda step: losses.append(step.loss))
    recompute_statistics(loss, images, plan, settings, precise_bn)
    return losses


def _trained(folder: Path) -> list[Any]:
    """Train small detectors in float64 on all ranks, and evaluate them; and normalize uneven numbers of boxes."""
    found: list[Any] = [_uneven()]
    for form in ("mask_rcnn_fpn", "retinanet"):
        network = detector(form, "convnet", width=8).double()
        losses = _train(network, folder, steps=3, batch=4, precise_bn=2)
        result = evaluate(network, canvases(folder, form.startswith("mask")), views(form.startswith("mask")), 0)
        found.append((losses, dict(network.state_dict()), result.figures))
    return found


def _uneven() -> tuple[Tensor, Tensor]:
    """Normalize 3 boxes on rank 0 and 5 on rank 1; return the running mean and the gradient."""
    torch.manual_seed(0)
    boxes = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    parts = [slice(0, 3), slice(3, 8)]
    mine = boxes[parts[rank()]] if world_size() == 2 else boxes
    layer = GroupedBatchNorm(2, 0).double()
    layer.uneven = True
    x = mine.clone().requires_grad_(True)
    weights = torch.arange(8.0, dtype=torch.float64).view(8, 1, 1, 1)
    weights = weights[parts[rank()]] if world_size() == 2 else weights
    (layer(x).square() * weights).sum().backward()
    assert x.grad is not None
    gradient = torch.zeros_like(boxes)
    gradient[parts[rank()] if world_size() == 2 else slice(None)] = x.grad
    return layer.running_var, sum_over_ranks(gradient)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    """Images of different sizes, in batches whose padding and numbers of samples differ between the ranks."""
    write_canvases(tmp_path, 6, 1, side=40)
    (one, *detectors), two = _trained(tmp_path / "train"), run_ranks(2, _trained, tmp_path / "train")
    for uneven, *others in two:
        for expected, found in zip(one, uneven, strict=True):
            assert torch.allclose(expected, found, rtol=1e-10, atol=1e-12)
        for (losses, weights, figures), other in zip(detectors, others, strict=True):
            assert losses == pytest.approx(other[0], rel=1e-6)  # they are float32
            for name, value in weights.items():
                assert torch.allclose(value, other[1][name], rtol=1e-7, atol=1e-9), name
            assert figures == pytest.approx(other[2])


def test_a_boxed_image_without_objects_has_no_masks() -> None:
    nothing = BoxedImage("x", 4, 3, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    assert nothing.masks().shape == (0, 3, 4)
