"""The official linear probe: one linear layer on a frozen backbone, trained on augmented images.

Source: main_lincls.py of facebookresearch/moco and of facebookresearch/moco-v3. Deviations: the accuracy is that of the
last epoch (in main_lincls.py it is the best of all epochs on the held-out images), and an epoch consists of full
batches: the last images of its order are left out if they do not fill a batch.

Legend: M training images, N images to classify, n images of a rank's batch, C channels, S image size, D features, L
classes.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moco.config import OptimConfig, require
from moco.data.loader import Batch
from moco.data.plan import Plan
from moco.digest import digest
from moco.distributed import in_lockstep, mean_over_ranks
from moco.files import cause
from moco.interop.weights import save_weights
from moco.optim.schedules import lr_factor
from moco.runtime.device import float64_device
from moco.runtime.precision import autocast
from moco.untrusted import parse_json, refuse_special_file


class BackboneChanged(RuntimeError):
    """A weight or buffer of the frozen backbone changed, so the result would be that of another network."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The content of `linear.safetensors`: a linear classifier of features."""

    weight: Tensor  # (L, D)
    bias: Tensor  # (L,)
    about: dict[str, Any]  # "layer", "unit" (features of unit length), "classes" and more

    def __call__(self, features: Tensor) -> Tensor:
        """Compute class scores (N, L) of the backbone's features (N, D)."""
        features = F.normalize(features, dim=1) if self.about["unit"] else features
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))


def save_head(path: Path, head: LinearHead) -> None:
    """Write weight (L, D) and bias (L,), and each entry of `about` as JSON in the metadata."""
    about = {name: json.dumps(value) for name, value in head.about.items()}
    save_weights(path, {"weight": head.weight, "bias": head.bias}, about)


def load_head(path: Path) -> LinearHead:
    """Read a head that `save_head` wrote; raise FileNotFoundError, or ValueError if the file is something else."""
    try:
        refuse_special_file(path)
        with safe_open(path, "pt") as file:
            about = {name: parse_json(value) for name, value in (file.metadata() or {}).items()}
            require({"layer", "unit", "classes"} <= about.keys(), "it has other metadata")
            return LinearHead(file.get_tensor("weight"), file.get_tensor("bias"), about)
    except (SafetensorError, ValueError) as error:
        fix = "give the path of a linear.safetensors"
        raise ValueError(f"{path} is no classifier of moco.linear ({cause(error)}): {fix}") from error


def new_head(width: int, classes: int, std: float, seed: int) -> nn.Linear:
    """Build a head with weights from N(0, std²) and bias 0, as main_lincls.py does; it depends only on the seed."""
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


def train_head(
    backbone: nn.Module,
    head: nn.Linear,
    batches: Iterable[Batch],
    labels: Tensor,
    plan: Plan,
    optim: OptimConfig,
    on_epoch: Callable[[str], None] = lambda _: None,
    precision: torch.dtype = torch.float32,
) -> list[tuple[float, float]]:
    """Train the head in place, on all ranks together.

    Args:
        backbone: images (n, C, S, S) to features (n, D); put into eval mode, never changed.
        batches: the plan's batches, one view each.
        labels: of all M images of the plan, (M,), on the device of the networks; (M, L) if images can have several.
        optim: peak learning rate and schedule, momentum, weight decay; the optimizer is SGD.
        on_epoch: receives a line about each epoch.
        precision: data type of the backbone's autocast; the head computes in float32.

    Returns:
        Mean loss and top-1 accuracy (percent) of each epoch, on augmented images. With several labels per image the
        accuracy is the share of correct decisions, with one decision for each image and class.

    Raises:
        BackboneChanged: if a weight or buffer of the backbone changed, even in a single bit.
        FloatingPointError: if the mean loss of an epoch is not finite.
        ImageError: if an image cannot be decoded; on every rank.
    """
    loaded = _digests(backbone)
    backbone.eval()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay)
    epochs: list[tuple[float, float]] = []
    sums = torch.zeros(2, dtype=torch.float64, device=float64_device(labels.device))  # loss and accuracy of the epoch
    for step, batch in enumerate(in_lockstep(batches, labels.device)):
        with torch.no_grad(), autocast(labels.device, precision):
            features = backbone(batch.views[0])  # (n, D)
        scores = head(features.float())  # (n, L)
        truth = labels[batch.index]
        loss = loss_of(scores, truth)
        optimizer.zero_grad()
        loss.backward()
        for parameter in head.parameters():
            assert parameter.grad is not None
            parameter.grad = mean_over_ranks(parameter.grad)
        optimizer.param_groups[0]["lr"] = optim.lr * lr_factor(step, plan.steps_per_epoch, plan.epochs, optim)
        optimizer.step()
        right = scores.argmax(dim=1) == truth if truth.ndim == 1 else (scores > 0) == truth
        sums += torch.stack([loss.detach(), right.float().mean()]).to(sums.device).double()
        if (step + 1) % plan.steps_per_epoch == 0:
            mean_loss, accuracy = (mean_over_ranks(sums) / plan.steps_per_epoch).tolist()
            if not np.isfinite(mean_loss):
                fix = "lower official.lr or official.weight_decay"
                raise FloatingPointError(f"the probe's mean loss in epoch {len(epochs) + 1} is {mean_loss}: {fix}")
            epochs.append((mean_loss, 100 * accuracy))
            on_epoch(f"loss {mean_loss:.3f} · training accuracy {100 * accuracy:.1f} %")
            sums.zero_()
    _check_frozen(backbone, loaded)
    return epochs


def _check_frozen(backbone: nn.Module, loaded: dict[str, str]) -> None:
    """Raise BackboneChanged unless the backbone still has these digests: the sanity check of main_lincls.py."""
    now = _digests(backbone)
    changed = sorted(name for name in now.keys() | loaded.keys() if now.get(name) != loaded.get(name))
    if changed:
        raise BackboneChanged(f"the frozen backbone changed while its head was trained: {', '.join(changed[:5])}")


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy; with several labels, the mean of the binary cross entropies summed over classes.

    Args:
        scores: (n, L).
        labels: classes (n,); or which classes each image has, (n, L).
    """
    if labels.ndim == 1:
        return F.cross_entropy(scores, labels)
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="sum") / len(scores)


def _digests(module: nn.Module) -> dict[str, str]:
    return {name: digest(value) for name, value in module.state_dict().items()}


def fitting_batch(batch_size: int, count: int) -> int:
    """Return the batch size, or if there are fewer images, the largest power of two up to `count`.

    A power of two can be divided over 2, 4, 8, ... ranks.
    """
    return batch_size if batch_size <= count else 2 ** (count.bit_length() - 1)
