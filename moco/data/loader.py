"""Batches of views: crops of the images, augmented on the device.

Legend: n samples of this rank's batch, V views, C channels, S x S pixels, D = CROP_DRAWS.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.data.augment import augment, crop_batch, crop_one, largest_shrink
from moco.data.base import Source
from moco.data.decode import Decoded, ImageError, decode_scaled
from moco.data.places import places_of
from moco.data.plan import Plan
from moco.data.prefetch import prefetched
from moco.data.remote import Item
from moco.data.unreadable import OnUnreadable, image_or_substitute
from moco.data.view import View, draw, draw_crop
from moco.data.workers import LoaderError, count_processes, loaded, make_loader, to_shared_memory
from moco.distributed import copy_to_device
from moco.runtime.device import float64_device


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch."""

    index: Tensor  # (n,), index of the image in each row, or of its substitute; for a stream `Sample.identity`
    views: list[Tensor]  # V of (n, C, S, S), float32, normalized
    places: Tensor | None = None  # (V, n, 3, 3), float64, see `moco.data.places`; None unless asked for


def batches(
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    workers: int | None,
    start: int = 0,
    on_unreadable: OnUnreadable | None = None,
    places: bool = False,
) -> Generator[Batch, None, None]:
    """Yield this rank's batches from step `start` to the end of training.

    Closing the generator ends the loader processes earlier.

    Args:
        source: the images; if `source.images` is None, loader processes decode them.
        device: computes the augmentation and holds the batches. If it lacks float64 (MPS), the CPU computes the
            augmentation and holds `places`.
        workers: number of loader processes; 0 decodes in this process; None: see `count_processes`.
        on_unreadable: called with unreadable images, which are replaced by substitutes (`moco.data.unreadable`). The
            views of a substitute use the random numbers of the unreadable image, so they differ from the substitute's
            views at its own position in the epoch. None: an unreadable image ends the run.
        places: also return the place of each view in its image.

    Raises:
        ImageError: for an unreadable image that is not replaced.
        LoaderError: if a loader process dies, or the shared memory is full.
    """
    maker = float64_device(device)
    cropped = crops(source, plan, views, maker, workers, start, on_unreadable)
    made: Iterable[Batch] = (_augmented(plan, views, maker, each, places) for each in cropped)
    if device.type == "cuda":
        made = prefetched(made, device, _tensors)
    elif device != maker:
        made = (Batch(each.index.to(device), [x.to(device) for x in each.views], each.places) for each in made)
    yield from made


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.index, *batch.views, *([] if batch.places is None else [batch.places])]


# The epoch; the indices of the plan, (n,); the indices of the images used, possibly substitutes, (n,); the crops of
# each view on the device, V of (n, C, S, S); the heights and widths of the images, (n, 2).
CroppedBatch = tuple[int, NDArray[np.int64], NDArray[np.int64], list[Tensor], NDArray[np.int64]]


def crops(
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    workers: int | None,
    start: int = 0,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[CroppedBatch]:
    """Yield the crops of each batch on the device: the first stage of `batches`, which describes the arguments."""
    if source.images is not None:
        yield from _resident(source, source.images.to(device), plan, views, start, on_unreadable)
        return
    # One loader for all epochs: its workers never restart, and the sampler provides the epoch.
    workers = count_processes(workers)
    dataset = CropDataset(source, views, plan.seed, replace=on_unreadable is not None)
    pin_memory = device.type == "cuda"
    if source.stream is not None:
        loader = source.stream(dataset.crop_views, plan, start, workers, dataset.replace, pin_memory)
    else:
        loader = make_loader(dataset, workers, plan.samples(start), pin_memory=pin_memory)
    for epoch, index, used, (*crops_of_views, sizes), unreadable in loaded(loader, "data.workers"):
        if on_unreadable is not None and unreadable:
            on_unreadable(unreadable)
        yield epoch, index, used, [each.to(device, non_blocking=True) for each in crops_of_views], sizes.numpy()


def _augmented(plan: Plan, views: Sequence[View], device: torch.device, batch: CroppedBatch, places: bool) -> Batch:
    """Augment a batch of crops on the device: the second stage."""
    epoch, index, used, crops_of_views, sizes = batch
    out, maps = [], []
    for stream, (crops_of_view, view) in enumerate(zip(crops_of_views, views, strict=True)):
        params = draw(view, plan.seed, epoch, index, stream)
        out.append(augment(crops_of_view, params, view))
        if places:
            maps.append(places_of(view, draw_crop(plan.seed, epoch, index, stream), params, sizes))
    on_device = copy_to_device(torch.from_numpy(np.stack(maps)), device) if places else None  # (V, n, 3, 3)
    return Batch(copy_to_device(torch.from_numpy(used), device), out, on_device)


def _resident(
    source: Source, images: Tensor, plan: Plan, views: Sequence[View], start: int, on_unreadable: OnUnreadable | None
) -> Iterator[CroppedBatch]:
    """Crop images that are in memory, on their device."""
    substitute = np.arange(len(source))  # the image to use for each image: a readable one stands for itself
    if source.unreadable:
        if on_unreadable is None:
            raise source.unreadable[min(source.unreadable)]
        on_unreadable({i: error.reason for i, error in source.unreadable.items()})
        for i in source.unreadable:
            substitute[i], _ = image_or_substitute(source, i, {})
    for epoch, index in plan.samples(start):
        used = substitute[index % len(source)]
        picked = images[copy_to_device(torch.from_numpy(used), images.device)]  # (n, C, H, W)
        cut = [
            crop_batch(picked, draw_crop(plan.seed, epoch, index, stream), view) for stream, view in enumerate(views)
        ]
        yield epoch, index, used, cut, np.tile(images.shape[2:], (len(index), 1))


class CropDataset:
    """The data set of a loader process, which decodes each image once and crops all views from it."""

    def __init__(self, source: Source, views: Sequence[View], seed: int, replace: bool) -> None:
        self.source, self.views, self.seed, self.replace = source, views, seed, replace

    def __getitem__(self, step: tuple[int, NDArray[np.int64]]) -> Item | ImageError | LoaderError:
        epoch, index = step
        used, unreadable = index % len(self.source), dict[int, str]()
        drawn = self._draw(epoch, index)
        try:
            return epoch, index, used, self._crop(drawn, self._images(used, drawn, unreadable)), unreadable
        except (ImageError, LoaderError) as error:
            return error  # raised here, it would reach the user as the worker's traceback

    def crop_views(self, epoch: int, index: NDArray[np.int64], images: Iterable[Tensor]) -> list[Tensor]:
        """Return the crops of each view, V of (n, C, S, S), and as the last tensor the images' sizes, (n, 2).

        A size is height and width. The random numbers of the crops depend on `epoch` and on `index`, (n,).
        """
        return self._crop(self._draw(epoch, index), (Decoded.full(image) for image in images))

    def _draw(self, epoch: int, index: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Draw the uniform numbers of the crops, V of (n, D)."""
        return [draw_crop(self.seed, epoch, index, stream) for stream in range(len(self.views))]

    def _crop(self, drawn: Sequence[NDArray[np.float32]], images: Iterable[Decoded]) -> list[Tensor]:
        crops_of_views: list[list[Tensor]] = [[] for _ in self.views]
        sizes = []
        for row, image in enumerate(images):
            sizes.append(image.size)
            for view, uniforms, out in zip(self.views, drawn, crops_of_views, strict=True):
                out.append(crop_one(image.pixels, uniforms[row], view, image.size, image.factor))
        return to_shared_memory([*(torch.stack(each) for each in crops_of_views), torch.tensor(sizes)])

    def _images(
        self, used: NDArray[np.int64], drawn: Sequence[NDArray[np.float32]], unreadable: dict[int, str]
    ) -> Iterator[Decoded]:
        """Yield the images of `used`, (n,), as large as the crops need; write the substitutes' indices to `used`."""
        source = self.source
        for row, i in enumerate(used.tolist()):
            with suppress(ImageError):  # raised again below
                if (content := source.content(i)) is not None:
                    shrink = partial(largest_shrink, self.views, [uniforms[row] for uniforms in drawn])
                    yield decode_scaled(source.name(i), content, shrink, source.pixel_format)
                    continue
            if self.replace:
                used[row], pixels = image_or_substitute(source, i, unreadable)
            else:
                pixels = source.image(i)
            yield Decoded.full(pixels)
