"""Features of a whole source, in its order, computed by all ranks together.

Legend: M samples, D dimension, W processes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco.data.crop import resize_center_crop
from moco.data.decode import ImageError
from moco.data.sources import Source
from moco.data.workers import LoaderError, identity_collate, ignore_signals, loaded, to_shared_memory
from moco.distributed import gather, on_all_ranks, rank, world_size


class _Plain:
    """The streamed path of evaluation: a worker decodes and center-crops."""

    def __init__(self, source: Source, resize: int, size: int) -> None:
        self.source, self.resize, self.size = source, resize, size

    def __getitem__(self, rows: list[int]) -> Tensor | ImageError | LoaderError:
        try:
            images = torch.stack([evaluation_view(self.source.image(row), self.resize, self.size) for row in rows])
            return to_shared_memory([images])[0]
        except (ImageError, LoaderError) as error:
            return error  # raised here it would reach the user as the worker's traceback


def evaluation_view(image: Tensor, resize: int, size: int) -> Tensor:
    """The one deterministic view of an image, uint8 (3, H, W); with resize 0 one that has the size stays as it is."""
    if resize == 0 and image.shape[-2:] == (size, size):
        return image
    return resize_center_crop(image, resize or size, size)


def _images(source: Source, rows: Sequence[int], resize: int, size: int, batch: int, workers: int) -> Iterator[Tensor]:
    """uint8 batches (<= batch, 3, size, size) of the given rows."""
    parts = [list(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    if source.images is not None and source.images.shape[-2:] == (size, size) and resize in (0, size):
        yield from (source.images[torch.tensor(part)] for part in parts)
        return
    loader: DataLoader[Tensor] = DataLoader(
        _Plain(source, resize, size),  # type: ignore[arg-type]
        sampler=parts,
        batch_size=None,
        num_workers=min(workers, len(parts)),
        collate_fn=identity_collate,
        worker_init_fn=ignore_signals,
    )
    yield from loaded(loader, "data.workers")


Network = nn.Module | Callable[[Tensor], Tensor]


@torch.no_grad()
def stream(
    network: Network,
    source: Source,
    rows: Sequence[int],
    size: int,
    resize: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Features of the given rows of a source on this process, in their order: batches (<= batch_size, D), float32.

    Args:
        network: images (N, 3, S, S) to features (N, D); a module is put into eval mode, and back at the end.
        source: the images.
        rows: which of them.
        size, resize: of the evaluation view: shorter side to `resize`, central `size`.
        mean, std: normalization.
        device: where the network is.
        batch_size: images at once.
        workers: loader processes for images that are not in memory.

    Raises:
        ImageError: for an image that cannot be decoded.
        LoaderError: if a loader process dies, or finds no shared memory.
    """
    center = torch.tensor(mean, device=device).view(3, 1, 1)
    spread = torch.tensor(std, device=device).view(3, 1, 1)
    training = isinstance(network, nn.Module) and network.training
    if isinstance(network, nn.Module):
        network.eval()
    try:
        for images in _images(source, rows, resize, size, batch_size, workers):
            yield network((images.to(device).float() / 255 - center) / spread).float()
    finally:
        if isinstance(network, nn.Module):
            network.train(training)


def extract(
    network: Network,
    source: Source,
    size: int,
    resize: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
) -> Tensor:
    """Features (M, D) of every image of a source, in the source's order, on every rank.

    Each rank computes M / W of them; a rank that runs short repeats the last row, and the repeats
    are cut off again, so no image counts twice. Arguments and errors: see `stream`; an error of one rank is
    raised on all.
    """
    share = -(-len(source) // world_size())  # rows of a rank, rounded up
    rows = [min(row, len(source) - 1) for row in range(rank() * share, (rank() + 1) * share)]
    features = on_all_ranks(
        lambda: torch.cat(list(stream(network, source, rows, size, resize, mean, std, device, batch_size, workers)))
    )
    return gather(features)[: len(source)]


def pixels(images: Tensor) -> Tensor:
    """The raw pixels as features: what an encoder has to beat; (N, 3, S, S) -> (N, 3 S S)."""
    return images.flatten(1)
