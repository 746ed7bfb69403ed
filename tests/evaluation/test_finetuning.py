"""Fine-tuning: against plain loops, closed forms, and one process against two."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from moco.config import OptimConfig
from moco.data.keyed import step_seed
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.data.view import View
from moco.distributed import rank, world_size, wrap_ddp
from moco.evaluation import finetuning
from moco.evaluation.features import EvalTransform, Inference, extract
from moco.evaluation.finetuning import (
    TrainSettings,
    build_finetune_optimizer,
    classifier,
    mixed,
    mixing,
    plan_of,
    train,
)
from moco.evaluation.resumable import ResumableTraining, Supervision, train_resumably
from moco.evaluation.steps import OnStep
from moco.evaluation.subject import labels_of
from moco.models.backbones import build_backbone
from moco.runtime.errors import NonFiniteLoss
from moco.runtime.preemption import PreemptionHandler
from moco.runtime.watchdog import Watchdog

CPU = torch.device("cpu")
SGD = OptimConfig(name="sgd", momentum=0.9, weight_decay=1e-2, exclude=[])


class Smooth(nn.Module):
    """A small smooth network, so that rounding errors stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.num_features = 24

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def smooth(bn: str = "sync", classes: int = 3) -> nn.Sequential:
    torch.manual_seed(5)
    return classifier(Smooth(), classes, bn, seed=1)


def source(count: int) -> ArraySource:
    """Return images whose class is their brightest channel."""
    labels = np.arange(count) % 3
    images = torch.randint(0, 160, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(count), torch.from_numpy(labels)] += 90
    return ArraySource(images, [str(i) for i in range(count)], labels, ("r", "g", "b"))


def fit(
    network: nn.Sequential, plan: Plan, settings: TrainSettings, optim: OptimConfig = SGD, **more: Any
) -> list[float]:
    """Train on `source`; return the losses."""
    images = source(plan.length)
    losses: list[float] = []
    stream = batches(images, plan, [View(8, crop_scale=(0.5, 1.0), flip_p=0.5)], CPU, workers=0)
    labels = torch.from_numpy(labels_of(images))
    optimizer = build_finetune_optimizer(network, optim, **more)
    forward = wrap_ddp(network, CPU)
    train(forward, optimizer, stream, labels, plan, settings, 0, lambda step: losses.append(step.loss))
    return losses


def test_the_steps_are_those_of_a_plain_loop() -> None:
    plan = plan_of(images=27, batch_size=12, epochs=4, min_steps=0, seed=3)
    assert plan.total_steps == 8
    network = smooth()
    reference = nn.Sequential(copy.deepcopy(Smooth()), nn.Linear(24, 3))
    torch.manual_seed(5)
    reference[0] = Smooth()  # with torch's own BN
    reference[1].load_state_dict(network[1].state_dict())
    fit(network, plan, TrainSettings(0.05, 0.2, label_smoothing=0.1), head_lr_factor=4.0, nesterov=True)

    groups = [{"params": reference[0].parameters(), "scale": 1.0}, {"params": reference[1].parameters(), "scale": 4.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    images = source(27)
    view = View(8, crop_scale=(0.5, 1.0), flip_p=0.5)
    for step, batch in enumerate(batches(images, plan, [view], CPU, workers=0)):
        epoch = step / 2
        rise = 0.2 * 4
        factor = (
            min(1.0, (step + 1) / 2 / rise)
            if epoch < rise
            else (1 + math.cos(math.pi * (epoch - rise) / (4 - rise))) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor * group["scale"]
        optimizer.zero_grad()
        F.cross_entropy(
            reference(batch.views[0]), torch.from_numpy(labels_of(images))[batch.index], label_smoothing=0.1
        ).backward()
        optimizer.step()
    for mine, theirs in zip(network.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def steps(mixup: float, name: str) -> tuple[dict[str, Tensor], list[float], Tensor]:
    network = smooth()
    plan = plan_of(images=31, batch_size=8, epochs=3, min_steps=0, seed=3)
    assert (plan.rank, plan.processes) == (rank(), world_size())
    settings = TrainSettings(0.05 if name == "sgd" else 0.003, 0.2, mixing(mixup, mixup, 3), 0.1)
    losses = fit(network, plan, settings, replace(SGD, name=name))
    scores = extract(network, source(23), EvalTransform(8), Inference(CPU, batch_size=4))
    return dict(network.state_dict()), losses, scores


def test_frozen_bn_keeps_its_statistics_and_trains_its_scale() -> None:
    network = smooth("frozen")
    before = copy.deepcopy(network.state_dict())
    fit(network, plan_of(24, 12, 2, 0, seed=0), TrainSettings(0.05))
    bn = "backbone.layers.1."
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(network.state_dict()[bn + name], before[bn + name])
    assert not torch.equal(network.state_dict()[bn + "weight"], before[bn + "weight"])


def test_mixup_and_cutmix_pair_each_image_with_the_previous_one() -> None:
    images, labels = torch.rand(5, 3, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    hot = F.one_hot(labels, 3).float()
    mixup = mixing(0.7, 0.0, 3)
    assert mixup is not None
    torch.manual_seed(4)
    out, parts = mixed(mixup, images, labels)
    torch.manual_seed(4)
    share = torch.distributions.Beta(torch.tensor(0.7), torch.tensor(0.7)).sample().item()
    for i in range(5):
        torch.testing.assert_close(out[i], share * images[i] + (1 - share) * images[i - 1])
        torch.testing.assert_close(parts[i], share * hot[i] + (1 - share) * hot[i - 1])

    cutmix = mixing(0.0, 1.0, 3)
    assert cutmix is not None
    torch.manual_seed(9)
    out, parts = mixed(cutmix, images, labels)
    assert 0 < int((out == images).sum()) < out.numel()
    for i in range(5):
        kept = (out[i] == images[i]).all(0)
        assert torch.equal(out[i][:, ~kept], images[i - 1][:, ~kept])
        torch.testing.assert_close(parts[i], kept.float().mean() * hot[i] + (~kept).float().mean() * hot[i - 1])
    assert mixing(0.0, 0.0, 3) is None


def test_each_step_draws_one_of_the_two_mixings() -> None:
    both = mixing(1.0, 1.0, 2)
    assert both is not None
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 9, 9), torch.tensor([0, 1])
    kinds = []
    for step in range(12):
        for _ in range(2):  # the same step mixes the same
            torch.manual_seed(step_seed(0, step))
            out, _ = mixed(both, images, labels)
            kinds.append("cut" if set(out.unique().tolist()) <= {0.0, 1.0} else "mix")
    assert kinds[::2] == kinds[1::2]
    assert {"cut", "mix"} == set(kinds)


def test_seeds_of_steps_differ() -> None:
    seeds = {step_seed(seed, number) for seed in range(3) for number in range(200)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "min_steps", "expected"),
    [
        (10, 128, 30, 300, (10, 300, 300)),  # fewer than a batch
        (130, 128, 30, 300, (128, 300, 300)),
        (1297, 128, 30, 305, (128, 31, 310)),  # 10 steps an epoch
        (1297, 128, 40, 300, (128, 40, 400)),
    ],
)
def test_few_labels_get_more_epochs(
    images: int, batch: int, epochs: int, min_steps: int, expected: tuple[int, int, int]
) -> None:
    plan = plan_of(images, batch, epochs, min_steps, seed=0)
    assert (plan.batch_size, plan.epochs, plan.total_steps) == expected


def test_the_lowered_batch_is_the_same_for_any_number_of_processes_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [plan_of(images, 8, 1, 0, seed=0).batch_size for images in (6, 7, 1)] == [6, 7, 1]
    monkeypatch.setattr(finetuning, "world_size", lambda: 2)
    assert plan_of(6, 8, 1, 0, seed=0).batch_size == 6
    for images, fix in ((7, "set batch_size=6, or start fewer"), (1, "start fewer")):
        with pytest.raises(ValueError, match=rf"2 processes cannot share a batch of the {images} .*: {fix}"):
            plan_of(images, 8, 1, 0, seed=0)


def test_layer_decay_scales_each_layer_as_timm_does_with_a_head_of_its_own() -> None:
    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    network = classifier(build_backbone("timm/vit_tiny_patch16_224", options), 5, "sync", seed=0)
    optimizer = build_finetune_optimizer(network, replace(SGD, name="adamw"), head_lr_factor=2.0, layer_decay=0.5)
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {names[each]: group for group in optimizer.param_groups for each in group["params"]}
    assert set(found) == set(names.values())
    assert found["head.weight"]["lr_scale"] == 2.0
    assert found["backbone.blocks.2.attn.qkv.weight"]["lr_scale"] == 0.5
    assert found["backbone.patch_embed.proj.weight"]["lr_scale"] == 0.0625

    with_head: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    theirs = param_groups_layer_decay(with_head, 1e-2, with_head.no_weight_decay(), layer_decay=0.5)
    names = {parameter: name for name, parameter in with_head.named_parameters()}
    for group in theirs:
        for each in group["params"]:
            if not names[each].startswith("head."):
                ours = found[f"backbone.{names[each]}"]
                assert (ours["lr_scale"], ours["weight_decay"]) == (group["lr_scale"], group["weight_decay"])
    assert found["backbone.pos_embed"]["weight_decay"] == 0


def test_exclude_and_the_two_learning_rates() -> None:
    network = smooth()
    optimizer = build_finetune_optimizer(network, replace(SGD, exclude=["norm", "bias"]), head_lr_factor=10.0)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    found = {
        name: (groups[id(each)]["lr_scale"], groups[id(each)]["weight_decay"])
        for name, each in network.named_parameters()
    }
    assert found == {
        "backbone.layers.0.weight": (1.0, 1e-2),
        "backbone.layers.1.weight": (1.0, 0.0),
        "backbone.layers.1.bias": (1.0, 0.0),
        "head.weight": (10.0, 1e-2),
        "head.bias": (10.0, 0.0),
    }


@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_a_non_finite_step_is_an_error_and_is_never_saved(tmp_path: Path, wrong: int) -> None:
    """The error of a step can come one step later; the state is saved after each step here."""
    network, plan = smooth(), plan_of(24, 12, 2, 0, seed=0)
    optimizer = build_finetune_optimizer(network, SGD)
    stream = [Batch(torch.arange(12), [torch.rand(12, 3, 8, 8)]) for _ in range(4)]
    stream[wrong - 1].views[0][3, 0, 0, 0] = math.inf
    labels = torch.from_numpy(labels_of(source(24)))
    training = ResumableTraining(tmp_path / "finetune" / "pretrained", "pretrained", 0, "0" * 64, 4, 12)

    def steps(start: int, after: OnStep) -> None:
        train(network, optimizer, stream, labels, plan, TrainSettings(0.05), start, after)

    supervision = Supervision(torch.device("cpu"), Watchdog(0), PreemptionHandler(0), save_every=1, log_every=10)
    with pytest.raises(NonFiniteLoss, match=rf"step {wrong} of 4 .*loss nan, .*lr=0.05"):
        train_resumably(supervision, training, network, optimizer, steps, lambda line: None)
    assert training.state.exists() == (wrong > 1)
    if wrong > 1:
        saved = torch.load(training.state)
        assert saved["step"] == wrong - 1
        assert all(weight.isfinite().all() for weight in saved["network"].values())


def test_bf16_autocast_stays_near_float32() -> None:
    for precision in (torch.float32, torch.bfloat16):
        network = smooth()
        losses = fit(network, plan_of(24, 12, 2, 0, seed=0), TrainSettings(0.05, precision=precision))
        assert losses[0] == pytest.approx(math.log(3), abs=0.05)  # chance, at the start
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
