"""The official linear probe: one linear layer on a frozen backbone, trained on augmented pictures.

facebookresearch/moco and facebookresearch/moco-v3, main_lincls.py. Deviations: the figure is that of the last epoch
(theirs is the best of all epochs on the held-out pictures), and an epoch is whole batches, the rest of its order waits
for another epoch.

Legend: n this rank's share of a batch, D dimension, L classes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Source
from moco.data.view import View
from moco.digest import digest
from moco.distributed import in_lockstep, mean_over_ranks
from moco.interop.weights import save_weights


class BackboneChanged(RuntimeError):
    """A weight or a buffer of the frozen backbone is not what was loaded: the figure would be of another network."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """What `linear.safetensors` holds: a classifier of features."""

    weight: Tensor  # (L, D)
    bias: Tensor  # (L,)
    about: dict[str, Any]  # "layer", "unit" (features of unit length), "classes" and what else is known

    def __call__(self, features: Tensor) -> Tensor:
        """Class scores (N, L) of the backbone's features (N, D)."""
        features = F.normalize(features, dim=1) if self.about["unit"] else features
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))


def save_head(path: Path, head: LinearHead) -> None:
    """Writes weight (L, D) and bias (L,), each entry of `about` as JSON in the metadata."""
    about = {name: json.dumps(value) for name, value in head.about.items()}
    save_weights(path, {"weight": head.weight, "bias": head.bias}, about)


def load_head(path: Path) -> LinearHead:
    """Reads a head that `save_head` wrote."""
    with safe_open(path, "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
        return LinearHead(file.get_tensor("weight"), file.get_tensor("bias"), about)


def new_head(width: int, classes: int, std: float, seed: int) -> nn.Linear:
    """Weights N(0, std²), bias 0, as in main_lincls.py; a function of the seed alone."""
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


def train_head(
    backbone: nn.Module,
    head: nn.Linear,
    source: Source,
    plan: Plan,
    view: View,
    lr_at: Callable[[int], float],
    momentum: float,
    weight_decay: float,
    device: torch.device,
    workers: int = 0,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> None:
    """Trains the head, in place, on all ranks together.

    Args:
        backbone: pictures (n, 3, S, S) to features (n, D); put into eval mode, never changed.
        head: on the device.
        source: the labeled training pictures.
        plan: which of them each step sees; its seed is also the augmentation's.
        view: the augmentation.
        lr_at: learning rate at a step.
        momentum, weight_decay: of SGD.
        device: where backbone and head are.
        workers: loader processes for pictures that are not in memory.
        on_epoch: called with (epochs done, mean loss, top-1 accuracy in percent) on the augmented training pictures.

    Raises:
        BackboneChanged: if any weight or buffer of the backbone is another afterwards, by a single bit.
        FloatingPointError: if the loss stops being finite.
        ImageError: for a picture that cannot be decoded, on every rank.
    """
    assert source.labels is not None
    labels = torch.from_numpy(source.labels).to(device)
    loaded = _fingerprints(backbone)
    backbone.eval()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the epoch: loss, accuracy
    for step, batch in enumerate(in_lockstep(batches(source, plan, [view], device, workers))):
        with torch.no_grad():
            features = backbone(batch.views[0])  # (n, D)
        scores = head(features)  # (n, L)
        truth = labels[batch.index]
        loss = F.cross_entropy(scores, truth)
        optimizer.zero_grad()
        loss.backward()
        for parameter in head.parameters():
            assert parameter.grad is not None
            parameter.grad = mean_over_ranks(parameter.grad)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        sums += torch.stack([loss.detach(), (scores.argmax(dim=1) == truth).float().mean()]).double()
        if (step + 1) % plan.steps_per_epoch == 0:
            mean_loss, accuracy = (mean_over_ranks(sums) / plan.steps_per_epoch).tolist()
            if not np.isfinite(mean_loss):
                raise FloatingPointError(
                    f"the loss of the linear probe is {mean_loss} at step {step}: lower official.lr"
                )
            if on_epoch is not None:
                on_epoch((step + 1) // plan.steps_per_epoch, mean_loss, 100 * accuracy)
            sums.zero_()
    require_unchanged(backbone, loaded)


def require_unchanged(backbone: nn.Module, loaded: dict[str, str]) -> None:
    """The sanity check of main_lincls.py, of buffers too.

    Raises:
        BackboneChanged: naming what differs.
    """
    now = _fingerprints(backbone)
    changed = sorted(name for name in now.keys() | loaded.keys() if now.get(name) != loaded.get(name))
    if changed:
        raise BackboneChanged(f"the frozen backbone changed while its head was trained: {', '.join(changed[:5])}")


def _fingerprints(module: nn.Module) -> dict[str, str]:
    return {name: digest(value) for name, value in module.state_dict().items()}


def fitting_batch(batch_size: int, count: int) -> int:
    """The batch, or, of a data set with fewer pictures, the largest power of two in it: any usual world divides it."""
    return batch_size if batch_size <= count else 2 ** (count.bit_length() - 1)
