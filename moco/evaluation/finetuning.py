"""End-to-end fine-tuning: a linear classifier on a backbone, both trained on labeled images.

W processes compute the same steps as one: every random number is a function of (seed, step) or of (seed, epoch,
sample index), see laws 2 and 3 of CONTRIBUTING.md. Only the masks of dropout and drop-path depend on the number of
processes.

Legend: N labeled images, C channels, S image size, B global batch, n = B / W images of this rank, D features, L
classes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms import v2

from moco.config import OptimConfig
from moco.data.keyed import step_seed
from moco.data.loader import Batch
from moco.data.plan import Plan
from moco.distributed import gather, mean_over_ranks, rank, world_size
from moco.evaluation.steps import OnStep, Schedule, run_steps, seed_step
from moco.models.modes import set_training
from moco.models.norm import convert_batch_norm
from moco.optim.optimizers import build_optimizer, parameter_groups
from moco.runtime.precision import autocast

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images (B, C, S, S), labels (B,) -> mixed images, (B, L)


@dataclass(frozen=True)
class TrainSettings:
    """The loss and the learning rate of each step."""

    lr: float  # the peak, to be multiplied by each group's "lr_scale"; a cosine lowers it to 0
    warmup: float = 0.0  # fraction of the steps in which the learning rate rises to its peak
    mix: Mix | None = None  # see `mixing`
    label_smoothing: float = 0.0  # part of a target that is spread over all classes
    precision: torch.dtype = torch.float32  # data type of autocast; float32: no autocast


def classifier(backbone: nn.Module, classes: int, bn: str, seed: int) -> nn.Sequential:
    """Build `backbone` followed by `head`, a new linear layer: weights N(0, 0.01²), bias 0; in training mode.

    Everything is trained, including what pretraining kept fixed (MoCo v3's patch projection and positions), as the
    authors of MoCo v3 do.

    Args:
        backbone: changed in place; its `num_features` is D.
        bn: "sync" normalizes over the global batch and updates the running statistics; "frozen" uses the stored ones.
            Scale and shift are trained in both cases.
    """
    torch.manual_seed(seed)
    head = nn.Linear(cast(int, backbone.num_features), classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    if bn == "sync":
        backbone = convert_batch_norm(backbone, "sync", 0)
    network = nn.Sequential(OrderedDict(backbone=backbone, head=head)).requires_grad_(True)
    set_training(network, bn == "frozen")
    return network


def build_finetune_optimizer(
    network: nn.Module,
    optim: OptimConfig,
    nesterov: bool = False,
    head_lr_factor: float = 1.0,
    layer_decay: float | None = None,
) -> Optimizer:
    """Build an optimizer whose groups hold the factor of their learning rate in "lr_scale".

    Args:
        network: has the submodules `backbone` and `head`; their trainable parameters are optimized.
        optim: sgd (with `nesterov`) or adamw.
        head_lr_factor: "lr_scale" of the head.
        layer_decay: "lr_scale" of the backbone's last layer, and the ratio of the "lr_scale" of each earlier layer to
            that of the next layer (BEiT, Bao et al., 2022); for timm networks. Weight decay then excludes the
            backbone's one-dimensional parameters, and the parameters that its `no_weight_decay` lists. None:
            "lr_scale" is 1 in the whole backbone.
    """
    backbone: Any = network.get_submodule("backbone")
    optimizer = build_optimizer(network.get_submodule("head"), optim)
    for group in optimizer.param_groups:
        group["lr_scale"] = head_lr_factor
    groups: list[dict[str, Any]] = parameter_groups(backbone, optim.weight_decay, optim.exclude)
    if layer_decay is not None:
        # timm costs a second at start-up, so it is imported only here
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        undecayed = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
        groups = param_groups_layer_decay(backbone, optim.weight_decay, undecayed, layer_decay=layer_decay)
        for group in groups:
            group["lr_scale"] *= layer_decay  # timm counts from the backbone's last layer, not from the head
    for group in groups:
        optimizer.add_param_group({"lr_scale": 1.0} | group)
    if optim.name == "sgd":
        for group in optimizer.param_groups:
            group["nesterov"] = nesterov
    return optimizer


def plan_of(images: int, batch_size: int, epochs: int, min_steps: int, seed: int) -> Plan:
    """Plan the images of each step.

    A batch has at most as many images as there are in total, and `epochs` is raised to reach `min_steps` steps.

    Raises:
        ValueError: if the processes cannot share the batch evenly; a smaller batch would change the results.
    """
    processes = world_size()
    batch = min(batch_size, images)
    if batch % processes:
        even = batch // processes * processes
        fix = f"set batch_size={even}, or start fewer" if even else "start fewer"
        raise ValueError(f"{processes} processes cannot share a batch of the {batch} labeled images evenly: {fix}")
    return Plan(images, batch, max(epochs, -(-min_steps // (images // batch))), seed, rank(), processes)


def mixing(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """Return a transform that applies MixUp (Zhang et al., 2018) or CutMix (Yun et al., 2019), with these alphas.

    If both alphas are above 0, each step draws one of the two at random. An alpha of 0 turns MixUp or CutMix off. If
    both alphas are 0, return None.
    """
    chosen = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in chosen if alpha > 0]
    if not transforms:
        return None
    return cast(Mix, v2.RandomChoice(transforms) if len(transforms) > 1 else transforms[0])


def mixed(mix: Mix, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's share of the mixed global batch: (n, C, S, S), and the class proportions (n, L).

    MixUp and CutMix mix each image with the previous image of the batch. For the first image of a rank, the previous
    image is on the previous rank.
    """
    previous = (rank() - 1) % world_size()
    # (1 + n, ...)
    images, labels = (torch.cat([gather(each[-1:])[[previous]], each]) for each in (images, labels))
    images, parts = mix(images, labels)
    return images[1:], parts[1:]


def train_step(
    forward: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    lr: float,
    precision: torch.dtype,
) -> Tensor:
    """Train on one global batch; return its loss and the norm of its gradient, (2,).

    The host does not wait for the device, so the caller must check later that both are finite.

    Args:
        forward: the network, or DDP around it.
        images: this rank's share, (n, C, S, S).
        loss_of: computes this rank's loss from the float32 outputs; the mean over ranks is the loss of the batch.
        lr: of this step; multiplied by each group's "lr_scale".
        precision: data type of autocast; float32: no autocast.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        outputs = forward(images)
    loss = loss_of(outputs.float())
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # The loss is averaged here, and DDP has averaged the gradients over the ranks, so all ranks return the same.
    measured = torch.stack([mean_over_ranks(loss.detach()), nn.utils.get_total_norm(gradients)])
    optimizer.step()
    return measured


def train(
    forward: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    labels: Tensor,
    plan: Plan,
    settings: TrainSettings,
    start: int = 0,
    on_step: OnStep = lambda step: None,
) -> None:
    """Run the steps of a plan from `start` on.

    Args:
        forward, optimizer: see `train_step`; the network is in training mode.
        batches: the plan's batches from step `start` on, with one view of each image.
        labels: of all images of the plan, (N,), on the device.
        on_step: receives each finished step.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
        ImageError: if an image cannot be decoded; on every rank.
    """
    schedule = Schedule(settings.lr, plan.total_steps, "cosine", settings.warmup, epochs=plan.epochs)

    def step_of(batch: Batch, step: int, lr: float) -> Tensor:
        images, target = batch.views[0], labels[batch.index]
        if settings.mix is not None:
            torch.manual_seed(step_seed(plan.seed, step << 16))  # the same on all ranks
            images, target = mixed(settings.mix, images, target)
            seed_step(plan.seed, step)
        loss_of = partial(F.cross_entropy, target=target, label_smoothing=settings.label_smoothing)  # of logits (n, L)
        return train_step(forward, optimizer, images, loss_of, lr, settings.precision)

    run_steps(batches, step_of, optimizer, schedule, plan.seed, start, on_step)
