"""The training of a segmentation network, and its evaluation on whole images.

W processes compute the same steps as one process, as in moco/evaluation/finetuning.py. A saved state holds all that the
next step needs, so a resumed training equals an uninterrupted one.

Legend: B global batch, n = B / W images of this rank, M images, L classes, S size of the crops.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from moco.data.decode import ImageError
from moco.data.plan import Plan
from moco.data.workers import count_processes, loaded, make_loader
from moco.distributed import all_gather_object, rank, sum_over_ranks, world_size
from moco.evaluation.finetuning import train_step
from moco.evaluation.steps import OnStep, Schedule, run_steps
from moco.models.modes import evaluating
from moco.runtime.device import many_shapes
from moco.segmentation.crop import CropDataset, CropSettings
from moco.segmentation.masks import IGNORED, WORKERS, MaskedImages
from moco.segmentation.measure import Overlap, overlap_of


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained."""

    crops: CropSettings
    schedule: Schedule
    precision: torch.dtype = torch.float32  # of autocast; no autocast with float32
    workers: int | None = 0  # loader processes


def pixel_loss(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the cross-entropy as a function of the scores (n, L, S, S), for `train_step`.

    Its mean over ranks is the mean over all pixels of the global batch that have a class; 0 without such pixels.

    Args:
        mask: the class of each pixel of this rank's images, (n, S, S); `IGNORED` for pixels without a class.
    """
    target = mask.long()
    count = sum_over_ranks((target != IGNORED).sum().float()).clamp(min=1)

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum") * world_size() / count

    return loss


def train(
    forward: nn.Module,
    optimizer: Optimizer,
    images: MaskedImages,
    plan: Plan,
    settings: TrainSettings,
    start: int = 0,
    on_step: OnStep = lambda step: None,
) -> None:
    """Run the steps from `start` to the end of the schedule.

    Args:
        forward: the network, or DDP around it, in training mode.
        optimizer: its groups hold the factor of their learning rate in "lr_scale".
        on_step: receives each finished step.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
        ImageError: if an image or mask cannot be used; on every rank.
    """
    device = next(forward.parameters()).device
    dataset = CropDataset(images, settings.crops, plan.seed)
    sampler = islice(plan.samples(start), settings.schedule.steps - start)
    loader = make_loader(dataset, settings.workers, sampler, pin_memory=device.type == "cuda")

    def step_of(batch: tuple[Tensor, Tensor], step: int, lr: float) -> Tensor:
        crops, masks = (each.to(device, non_blocking=True) for each in batch)
        return train_step(forward, optimizer, crops, pixel_loss(masks), lr, settings.precision)

    run_steps(loaded(loader, WORKERS), step_of, optimizer, settings.schedule, plan.seed, start, on_step)


class _WholeImages:
    """The data set of the evaluation: whole images, normalized, with their masks."""

    def __init__(self, images: MaskedImages, settings: CropSettings) -> None:
        self.images, self.settings = images, settings

    def __getitem__(self, row: int) -> tuple[Tensor, np.ndarray] | ImageError:
        try:
            image, mask = self.images.read(row)
        except ImageError as error:
            return error
        return self.settings.normalized(image), mask


@torch.no_grad()
def predict(
    network: nn.Module, images: MaskedImages, rows: range, settings: CropSettings, workers: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the predicted and the true class of each pixel, (H, W) each, for the given images, one at a time.

    The network is in eval mode meanwhile.
    """
    device = next(network.parameters()).device
    with evaluating(network), many_shapes():
        processes = min(count_processes(workers), len(rows))
        for image, mask in loaded(make_loader(_WholeImages(images, settings), processes, rows), WORKERS):
            scores = network(image[None].to(device))  # (1, L, H, W)
            yield scores.argmax(dim=1)[0].cpu().numpy(), mask


def evaluate(
    network: nn.Module,
    images: MaskedImages,
    settings: CropSettings,
    workers: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Overlap:
    """Compare predictions with the masks of a split.

    Each rank predicts the masks of a part of the images. Every rank returns the pixel counts of all images.
    """
    rows = range(rank(), len(images), world_size())

    def part() -> list[np.ndarray]:
        counts = []
        for predicted, mask in predict(network, images, rows, settings, workers):
            counts.append(overlap_of(predicted, mask, len(images.classes)))
            progress(len(counts), len(rows))
        return counts

    parts = all_gather_object(part)
    counts = np.empty((len(images), 3, len(images.classes)), dtype=np.int64)
    for number, each in enumerate(parts):
        counts[number :: len(parts)] = np.stack(each) if each else counts[:0]
    return Overlap(*counts.transpose(1, 0, 2))
