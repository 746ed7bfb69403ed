"""The training of a detector, and its predictions for whole images.

Several processes compute the same steps as one process.

Legend: k detections of an image, H x W the size of this image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.detection.roi_heads import paste_masks_in_image

from moco.data.plan import Plan
from moco.data.workers import count_processes, loaded, make_loader
from moco.detection.images import WORKERS, BoxedImages, coco_masks
from moco.detection.views import EvaluationDataset, Example, TrainingDataset, ViewSettings
from moco.distributed import in_lockstep
from moco.evaluation.finetuning import train_step
from moco.evaluation.steps import OnStep, Schedule, run_steps
from moco.models.modes import evaluating
from moco.models.norm import GroupedBatchNorm
from moco.runtime.precision import autocast


@dataclass(frozen=True)
class TrainSettings:
    """How a detector is trained."""

    views: ViewSettings
    schedule: Schedule
    precision: torch.dtype = torch.float32  # of autocast; float32: no autocast
    workers: int | None = 0  # loader processes


class Detections(NamedTuple):
    """What a detector finds in an image, in pixels of the file."""

    boxes: NDArray[np.float32]  # left, top, right, bottom, (k, 4)
    scores: NDArray[np.float32]  # (k,), descending
    labels: NDArray[np.int64]  # (k,), from 1
    masks: tuple[dict[str, Any], ...] = ()  # run lengths of pycocotools, which need less memory than pixels


def train(
    forward: nn.Module,
    optimizer: Optimizer,
    images: BoxedImages,
    plan: Plan,
    settings: TrainSettings,
    start: int = 0,
    on_step: OnStep = lambda step: None,
) -> None:
    """Run the steps from `start` to the end of the schedule.

    Args:
        forward: a `DetectorLoss`, or DDP around it, in training mode.
        optimizer: its groups hold the factor of their learning rate in "lr_scale".
        images: each with a box.
        plan: the images of each step.
        settings: see `TrainSettings`.
        start: finished steps.
        on_step: receives each finished step.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite.
        ImageError: if an image cannot be used; on every rank.
    """
    first = next(forward.parameters())
    loader = _loader(images, plan, settings, first.device, start, settings.schedule.steps)

    def step_of(batch: Sequence[Example], step: int, lr: float) -> Tensor:
        pixels, targets, keys = _on_device(batch, first)

        def loss_of(_: Tensor) -> Tensor:
            loss: Tensor = forward(pixels, targets, keys)
            return loss

        return train_step(loss_of, optimizer, pixels[0], lambda loss: loss, lr, settings.precision)

    run_steps(loaded(loader, WORKERS), step_of, optimizer, settings.schedule, plan.seed, start, on_step)


@torch.no_grad()
def recompute_statistics(
    loss: nn.Module,
    images: BoxedImages,
    plan: Plan,
    settings: TrainSettings,
    batches: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Replace BN's running statistics by the mean batch statistics of the first batches, with the present weights.

    The running averages of the training lag behind its weights. Detectron2 calls this PRECISE_BN; see Rethinking
    "Batch" in BatchNorm (Wu and Johnson, 2021), section 3. Collective.

    Args:
        loss: a `DetectorLoss` in training mode.
        batches: the number of batches, at most the number of steps in the plan.
        heartbeat: called for each batch; its exception is raised on all ranks.
    """
    first = next(loss.parameters())
    layers = [layer for layer in loss.modules() if isinstance(layer, GroupedBatchNorm)]
    momenta = [layer.momentum for layer in layers]
    loader = _loader(images, plan, settings, first.device, 0, batches)

    def watched() -> Iterator[Sequence[Example]]:
        for batch in loaded(loader, WORKERS):
            heartbeat()
            yield batch

    for number, batch in enumerate(in_lockstep(watched(), first.device), start=1):
        for layer in layers:
            layer.momentum = 1 / number  # the running average is then the mean of all batches so far
        with autocast(first.device, settings.precision):
            loss(*_on_device(batch, first))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _loader(
    images: BoxedImages, plan: Plan, settings: TrainSettings, device: torch.device, start: int, stop: int
) -> Any:
    """Return the loader of the batches from step `start` up to `stop`."""
    sampler = islice(plan.samples(start), stop - start)
    dataset = TrainingDataset(images, settings.views, plan.seed)
    return make_loader(dataset, settings.workers, sampler, pin_memory=device.type == "cuda")


def _on_device(batch: Sequence[Example], first: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]], Sequence[Any]]:
    """Return images and targets on the device of the weight `first`, and keys; the images have the dtype of `first`."""
    pixels, targets, keys = zip(*batch, strict=True)
    moved = [{name: each.to(first.device, non_blocking=True) for name, each in one.items()} for one in targets]
    return [each.to(first.device, first.dtype, non_blocking=True) for each in pixels], moved, keys


@torch.no_grad()
def predict(
    network: nn.Module, images: BoxedImages, rows: range, settings: ViewSettings, workers: int | None
) -> Iterator[Detections]:
    """Yield what the detector finds in each of the given images. The network is in eval mode meanwhile."""
    first = next(network.parameters())
    with evaluating(network):
        processes = min(count_processes(workers), len(rows))
        loader = make_loader(EvaluationDataset(images, settings), processes, rows)
        for row, image in loaded(loader, WORKERS):
            (found,) = network([image.to(first.device, first.dtype)])
            yield detections_in(found, image, images.images[row].width, images.images[row].height)


def detections_in(found: dict[str, Tensor], image: Tensor, width: int, height: int) -> Detections:
    """Convert what a network found in a resized image to detections in pixels of its file, W x H."""
    scale = found["boxes"].new_tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
    boxes = found["boxes"] * scale  # (k, 4)
    masks: tuple[dict[str, Any], ...] = ()
    if "masks" in found:
        pasted = paste_masks_in_image(found["masks"], boxes, (height, width)) > 0.5  # (k, 1, H, W)
        encode = coco_masks().encode
        masks = tuple(encode(np.asfortranarray(each)) for each in pasted[:, 0].cpu().numpy().astype(np.uint8))
    scores, labels = found["scores"].float().cpu().numpy(), found["labels"].cpu().numpy()
    return Detections(boxes.float().cpu().numpy(), scores, labels, masks)
