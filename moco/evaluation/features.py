"""Features of all images of a source, in its order, computed by all ranks together.

Legend: N images of a batch, M images of the source, S image size, D feature dimension, W processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moco.data.crop import resize_center_crop
from moco.data.decode import ImageError
from moco.data.pixel_format import per_channel, to_float
from moco.data.sources import Source
from moco.data.workers import LoaderError, count_processes, loaded, make_loader, to_shared_memory
from moco.distributed import copy_to_device, gather, on_all_ranks, rank, world_size
from moco.models.modes import evaluating
from moco.runtime.device import float64_device
from moco.runtime.precision import autocast

Network = nn.Module | Callable[[Tensor], Tensor]  # images (N, C, S, S) -> features (N, D)


@dataclass(frozen=True)
class EvalTransform:
    """The preparation of an image: resize, crop the center, normalize. By default, mean and std change nothing."""

    size: int  # side of the central crop in pixels
    resize: int = 0  # length to which the shorter side is resized before the crop; 0: to `size`
    mean: Sequence[float] = (0.0, 0.0, 0.0)  # mean and std have one number per channel, for pixels after `to_float`
    std: Sequence[float] = (1.0, 1.0, 1.0)

    def unnormalized(self) -> "EvalTransform":
        """Return the same transform without normalization."""
        return replace(self, mean=(0.0,) * len(self.mean), std=(1.0,) * len(self.mean))


@dataclass(frozen=True)
class Inference:
    """How a network computes the features of images."""

    device: torch.device  # of the network; the features are on `float64_device(device)`, which is the CPU for MPS
    batch_size: int = 512  # images per forward pass
    workers: int | None = 0  # loader processes for images that are not in memory; None: see `count_processes`
    precision: torch.dtype = torch.float32  # of autocast; the features are float32


class _CroppedBatches:
    """Dataset of the loader workers: the given rows, decoded and cropped."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.resize, self.size = source, transform.resize, transform.size

    def __getitem__(self, rows: list[int]) -> Tensor | ImageError | LoaderError:
        try:
            images = torch.stack([evaluation_view(self.source.image(row), self.resize, self.size) for row in rows])
            return to_shared_memory([images])[0]
        except (ImageError, LoaderError) as error:
            return error  # not raised: the user would see the worker's traceback


def evaluation_view(image: Tensor, resize: int, size: int) -> Tensor:
    """Return the central crop of an image, (C, size, size); `resize` as in `EvalTransform`."""
    if resize == 0 and image.shape[-2:] == (size, size):
        return image
    return resize_center_crop(image, resize or size, size)


def _crops(
    source: Source, rows: Sequence[int], transform: EvalTransform, batch_size: int, workers: int | None
) -> Iterator[Tensor]:
    """Yield batches (<= batch_size, C, S, S) of the given rows."""
    size = transform.size
    parts = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    if source.images is not None and source.images.shape[-2:] == (size, size) and transform.resize in (0, size):
        yield from (source.images[torch.tensor(part)] for part in parts)
        return
    loader = make_loader(_CroppedBatches(source, transform), min(count_processes(workers), len(parts)), parts)
    yield from loaded(loader, "data.workers")


@torch.no_grad()
def stream(
    network: Network,
    source: Source,
    rows: Sequence[int],
    transform: EvalTransform,
    inference: Inference,
    heartbeat: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield the features of the given rows on this process, in their order: batches (<= batch_size, D), float32.

    Args:
        network: a module is put into eval mode, and into its previous mode at the end.
        heartbeat: called before each batch.

    Raises:
        ImageError: if an image cannot be decoded.
        LoaderError: if a loader process dies or finds no shared memory.
    """
    device = inference.device
    mean, std = per_channel(transform.mean, device), per_channel(transform.std, device)
    with evaluating(network) if isinstance(network, nn.Module) else nullcontext():
        for images in _crops(source, rows, transform, inference.batch_size, inference.workers):
            heartbeat()
            normalized = (to_float(copy_to_device(images, device)) - mean) / std
            with autocast(device, inference.precision):
                features = network(normalized)
            yield features.float().to(float64_device(device))


def extract(
    network: Network,
    source: Source,
    transform: EvalTransform,
    inference: Inference,
    heartbeat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the features (M, D) of all images of a source, in its order, on every rank.

    Each rank computes M / W rows, rounded up. A rank with fewer images repeats the last image of the source. The
    repeated rows are removed, so every image counts once. Arguments and errors: see `stream`; an error of one rank is
    raised on all ranks.
    """
    share = -(-len(source) // world_size())  # rows per rank, rounded up
    rows = [min(row, len(source) - 1) for row in range(rank() * share, (rank() + 1) * share)]
    features = on_all_ranks(lambda: torch.cat(list(stream(network, source, rows, transform, inference, heartbeat))))
    return gather(features)[: len(source)]


def pixels(images: Tensor) -> Tensor:
    """Return the raw pixels as features, the baseline for every encoder: (N, C, S, S) -> (N, C S S)."""
    return images.flatten(1)
