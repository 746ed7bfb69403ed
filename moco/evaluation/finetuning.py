"""End-to-end fine-tuning: a linear classifier on a backbone, both trained on labeled pictures.

Nothing of it depends on the topology: W processes make the steps of one (law 3), and every random number is a
function of (seed, step) or of a picture's own key (law 2).

Legend: N pictures with labels, B global batch, n = B / W of this rank, D features, L classes, S size.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from moco.config import OptimConfig
from moco.data.keyed import STEP, philox
from moco.data.loader import Batch
from moco.data.plan import Plan
from moco.distributed import gather, in_lockstep, mean_over_ranks, rank, world_size
from moco.models.norm import convert_batch_norm
from moco.optim.optimizers import build_optimizer, parameter_groups
from moco.optim.schedules import lr_factor
from moco.runtime.errors import NonFiniteLoss

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (B, 3, S, S) and (B,) -> mixed, and (B, L)


def classifier(backbone: nn.Module, classes: int, bn: str, seed: int) -> nn.Sequential:
    """`backbone`, then `head`: a new linear layer with weights from N(0, 0.01) and no bias at first; in training mode.

    All is trained, also what pretraining kept fixed (MoCo v3's patch projection and positions), as its authors do.

    Args:
        backbone: changed in place; its `num_features` is D.
        classes: L.
        bn: "sync" normalizes over the global batch and moves the running statistics; "frozen" uses them as they are.
            Scale and shift are trained either way.
        seed: of the head's weights.
    """
    torch.manual_seed(seed)
    head = nn.Linear(cast(int, backbone.num_features), classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    if bn == "sync":
        backbone = convert_batch_norm(backbone, "sync", 0)
    network = nn.Sequential(OrderedDict(backbone=backbone, head=head)).requires_grad_(True).train()
    if bn == "frozen":
        for layer in network.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
    return network


def optimizer_of(
    network: nn.Sequential,
    name: str,
    momentum: float,
    nesterov: bool,
    betas: Sequence[float],
    weight_decay: float,
    exclude: Sequence[str],
    head_lr_factor: float,
    layer_decay: float | None,
) -> torch.optim.Optimizer:
    """An optimizer whose groups each say in "lr_scale" what their learning rate is multiplied by.

    Args:
        network: from `classifier`.
        name: "sgd" or "adamw".
        momentum, nesterov: of SGD.
        betas: of AdamW.
        weight_decay, exclude: see `moco.optim.optimizers.parameter_groups`.
        head_lr_factor: the head's scale.
        layer_decay: of a timm network: each layer's scale is this times that of the layer above, the head's being 1
            (BEiT, Bao et al., 2022); weight decay then leaves out the backbone's vectors and what it names. None: the
            backbone's scale is 1.
    """
    backbone: Any = network.get_submodule("backbone")
    optimizer = build_optimizer(
        network.get_submodule("head"),
        OptimConfig(name=name, momentum=momentum, betas=list(betas), weight_decay=weight_decay, exclude=list(exclude)),
    )
    for group in optimizer.param_groups:
        group["lr_scale"] = head_lr_factor
    groups: list[dict[str, Any]] = parameter_groups(backbone, weight_decay, exclude)
    if layer_decay is not None:
        # timm costs a second at start-up, so only where it is used
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        spared = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
        groups = param_groups_layer_decay(backbone, weight_decay, spared, layer_decay=layer_decay)
        for group in groups:
            group["lr_scale"] *= layer_decay  # timm counts from the last layer it sees, and the head is ours
    for group in groups:
        optimizer.add_param_group({"lr_scale": 1.0} | group)
    if name == "sgd":
        for group in optimizer.param_groups:
            group["nesterov"] = nesterov
    return optimizer


def plan_of(pictures: int, batch_size: int, epochs: int, min_steps: int, seed: int) -> Plan:
    """Which pictures each step sees: the batch lowered to what there is, the epochs raised to reach `min_steps`.

    Raises:
        ValueError: if the processes cannot share that batch evenly. Another batch would fit them, but would give other
            figures than one process has.
    """
    processes = world_size()
    batch = min(batch_size, pictures)
    if batch % processes:
        even = batch // processes * processes
        fix = f"set batch_size={even}, or start fewer" if even else "start fewer"
        raise ValueError(f"{processes} processes cannot share a batch of the {batch} labeled pictures evenly: {fix}")
    return Plan(pictures, batch, max(epochs, -(-min_steps // (pictures // batch))), seed, rank(), processes)


def mixing(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019) with these alphas, one of them a step; None: neither."""
    chosen = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in chosen if alpha > 0]
    if not transforms:
        return None
    return cast(Mix, v2.RandomChoice(transforms) if len(transforms) > 1 else transforms[0])


def mixed(mix: Mix, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of the mixed global batch: (n, 3, S, S), and the classes' parts (n, L).

    Both transforms mix each picture with the one before it in the batch. A rank's first has it on the rank before.
    """
    before = (rank() - 1) % world_size()
    images, labels = (
        torch.cat([gather(each[-1:])[before : before + 1], each]) for each in (images, labels)
    )  # (1 + n, ...)
    images, parts = mix(images, labels)
    return images[1:], parts[1:]


def step_seed(seed: int, step: int, process: int) -> int:
    """For `torch.manual_seed`, as mixing and dropout draw from torch's generator: process 0 is all ranks together."""
    words = philox((seed & 0xFFFFFFFF, seed >> 32), (process, STEP, step, 0))
    return int(words[0] << 31 | words[1] >> 1)  # 63 bits


def train_step(
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    target: Tensor,
    lr: float,
    label_smoothing: float,
    precision: torch.dtype,
) -> float:
    """Trains on one global batch and returns its loss.

    Args:
        forward: the network, or DDP around it.
        optimizer: from `optimizer_of`.
        images: this rank's share, (n, 3, S, S).
        target: its classes (n,), or their parts (n, L).
        lr: of this step, before each group's own scale.
        label_smoothing: this much of a target is spread over all classes.
        precision: autocast's type; float32 is no autocast.

    Raises:
        NonFiniteLoss: on every rank together, before any weight has changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logits = forward(images)  # (n, L)
    loss = F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    value = mean_over_ranks(loss.detach())
    # Loss and gradients are averages over the ranks by now, so all ranks decide alike.
    if not torch.isfinite(torch.stack([value, norm])).all():
        raise NonFiniteLoss(f"loss {value:.4g}, gradient norm {norm:.4g}")
    optimizer.step()
    return value.item()


def train(
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    labels: Tensor,
    plan: Plan,
    lr: float,
    warmup: float,
    mix: Mix | None,
    label_smoothing: float,
    precision: torch.dtype,
    on_step: Callable[[int, float], None],
) -> None:
    """All steps of a plan.

    Args:
        forward: the network in training mode, or DDP around it.
        optimizer: from `optimizer_of`.
        batches: the plan's, one view each.
        labels: of all pictures of the plan, (N,), on the device.
        plan: the length of training and its seed.
        lr: the peak; a cosine leads from it to 0.
        warmup: part of all steps in which it rises.
        mix: from `mixing`.
        label_smoothing, precision: see `train_step`.
        on_step: gets the steps done and the last one's loss.

    Raises:
        NonFiniteLoss: naming the step and the way out.
        ImageError: for a picture that cannot be decoded, on every rank.
    """
    warmup_epochs = warmup * plan.epochs
    for step, batch in enumerate(in_lockstep(batches)):
        images, target = batch.views[0], labels[batch.index]
        if mix is not None:
            torch.manual_seed(step_seed(plan.seed, step, 0))
            images, target = mixed(mix, images, target)
        torch.manual_seed(step_seed(plan.seed, step, 1 + rank()))  # dropout and drop-path: masks differ between ranks
        factor = lr_factor(step, plan.steps_per_epoch, plan.epochs, OptimConfig(warmup_epochs=warmup_epochs))
        try:
            loss = train_step(forward, optimizer, images, target, lr * factor, label_smoothing, precision)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(
                f"step {step + 1} of {plan.total_steps} gave {error} at lr {lr * factor:.3g}: lower lr={lr:g} or "
                "head_lr_factor, or lengthen warmup"
            ) from error
        on_step(step + 1, loss)
