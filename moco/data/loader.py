"""Batches of views: which samples a step sees, and their crops, resident or streamed.

The order is a function of (seed, epoch) on the global batch (law 2, law 3): step s of an epoch takes the samples at
s * B ... (s + 1) * B of that epoch's permutation, and rank r the r-th part of them. So a run
resumes at any step, on any number of processes, by starting to count there.

Legend: B global batch, n = B / W this rank's share, V views, S size.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from moco.data.augment import augment, crop_batch, crop_one, largest_shrink
from moco.data.bad_images import readable
from moco.data.crop import queue_copy
from moco.data.decode import Decoded, ImageError, decode_scaled
from moco.data.keyed import ORDER, SHUFFLE, permutation
from moco.data.prefetch import made_ahead
from moco.data.remote import RemoteSource, stream_loader
from moco.data.sources import ArraySource, FileSource, Source
from moco.data.view import View, draw, draw_crop
from moco.data.workers import LoaderError, delivered, identity_collate, leave_signals_to_the_parent, to_shared_memory


@dataclass(frozen=True)
class Plan:
    """Which samples each step of training sees: a function of its fields and the step, nothing else."""

    length: int  # samples in the data set
    batch_size: int  # B
    epochs: int
    seed: int
    rank: int = 0
    processes: int = 1  # W

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the rest of an epoch's permutation waits for another epoch's, as in the official code."""
        return self.length // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def samples(self, start: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, this rank's sample indices (n,)) of each step from `start` to the end of training."""
        share = self.batch_size // self.processes
        order_of, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order_of, order = epoch, permutation(self.seed, epoch, self.length, ORDER)
            first = position * self.batch_size + self.rank * share
            yield epoch, order[first : first + share]

    def shuffles(self, step: int, views: int) -> list[NDArray[np.int64]]:
        """For each view the permutation of the global batch under which its keys are encoded."""
        return [permutation(self.seed, step, self.batch_size, SHUFFLE + view) for view in range(views)]


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch."""

    index: Tensor  # (n,), sample indices; of a substitute its own, for the queue and labels go by what is seen
    views: list[Tensor]  # V of (n, 3, S, S), float32, normalized


OnBad = Callable[[Mapping[int, str]], None]  # gets the indices of pictures that cannot be read, and why


def batches(
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    workers: int,
    start: int = 0,
    on_bad: OnBad | None = None,
) -> Generator[Batch, None, None]:
    """This rank's batches from step `start` to the end of training; `close` ends the loader processes before that.

    Args:
        source: the images; resident if `source.images` is there, streamed by loader processes otherwise.
        plan: which samples when.
        views: one recipe a view.
        device: where augmentation runs and the batch ends up.
        workers: loader processes for the streamed path; 0 decodes in this one.
        start: first step.
        on_bad: told of pictures that cannot be decoded, replaced by substitutes (`moco.data.bad_images`).
            The views' random numbers stay those of the picture that was wanted, so that a substitute which is in the
            batch itself does not show the same views twice. None: such a picture ends the run.

    Raises:
        ImageError: for an image that cannot be decoded, and is not to be replaced.
        LoaderError: if a loader process dies, or finds no shared memory.
    """
    cut_views = crops(source, plan, views, device, workers, start, on_bad)
    made: Iterable[Batch] = (_augmented(plan, views, device, *each) for each in cut_views)
    if device.type == "cuda":
        made = made_ahead(made, device, lambda batch: (batch.index, *batch.views))
    yield from made


# epoch, wanted samples (n,), shown samples (n,), V of (n, 3, S, S) uint8 on the device
Crops = Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], list[Tensor]]]


def crops(
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    workers: int,
    start: int = 0,
    on_bad: OnBad | None = None,
) -> Crops:
    """The first stage of `batches`: for a streamed source what its workers deliver, brought to the device."""
    if source.images is None:
        return _streamed(source, plan, views, device, workers, start, on_bad)
    return _resident(source, plan, views, device, start, on_bad)


def _augmented(
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    epoch: int,
    index: NDArray[np.int64],
    shown: NDArray[np.int64],
    cut: Sequence[Tensor],
) -> Batch:
    """The second stage, on the device."""
    out = [
        augment(each, draw(view, plan.seed, epoch, index, stream), view)
        for stream, (view, each) in enumerate(zip(views, cut, strict=True))
    ]
    return Batch(queue_copy(torch.from_numpy(shown), device), out)


def _resident(
    source: Source, plan: Plan, views: Sequence[View], device: torch.device, start: int, on_bad: OnBad | None
) -> Crops:
    assert isinstance(source, ArraySource)
    instead = np.arange(len(source))
    if source.bad:
        if on_bad is None:
            raise source.bad[min(source.bad)]
        on_bad({i: error.reason for i, error in source.bad.items()})
        for i in source.bad:
            instead[i], _ = readable(source, i, {})
    images = source.images.to(device)
    for epoch, index in plan.samples(start):
        shown = instead[index]
        picked = images[queue_copy(torch.from_numpy(shown), device)]  # (n, 3, H, W)
        cut = [
            crop_batch(picked, draw_crop(plan.seed, epoch, index, stream), view) for stream, view in enumerate(views)
        ]
        yield epoch, index, shown, cut


# What a worker hands over: epoch, wanted, shown, the views, and what could not be read.
Item = tuple[int, NDArray[np.int64], NDArray[np.int64], list[Tensor], dict[int, str]]


class Cutter:
    """The data set of the streamed path: a worker decodes each image once and cuts all views from it."""

    def __init__(self, source: Source, views: Sequence[View], seed: int, replace: bool) -> None:
        self.source, self.views, self.seed, self.replace = source, views, seed, replace

    def __getitem__(self, step: tuple[int, NDArray[np.int64]]) -> Item | ImageError | LoaderError:
        epoch, index = step
        shown, bad = index.copy(), dict[int, str]()
        drawn = self._draw(epoch, index)
        try:
            return epoch, index, shown, to_shared_memory(self._cut(drawn, self._pictures(shown, drawn, bad))), bad
        except (ImageError, LoaderError) as error:
            return error  # raised here it would reach the user as the worker's traceback

    def cut(self, epoch: int, index: NDArray[np.int64], images: Iterable[Tensor]) -> list[Tensor]:
        """All views of each image as it comes: V of (n, 3, S, S), by the keys of the samples `index` (n,)."""
        return to_shared_memory(self._cut(self._draw(epoch, index), (Decoded.whole(image) for image in images)))

    def _draw(self, epoch: int, index: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """The crops' uniforms, V of (n, 22)."""
        return [draw_crop(self.seed, epoch, index, stream) for stream in range(len(self.views))]

    def _cut(self, drawn: Sequence[NDArray[np.float32]], pictures: Iterable[Decoded]) -> list[Tensor]:
        cut: list[list[Tensor]] = [[] for _ in self.views]
        for row, picture in enumerate(pictures):
            for view, uniforms, out in zip(self.views, drawn, cut, strict=True):
                out.append(crop_one(picture.pixels, uniforms[row], view, picture.size, picture.factor))
        return [torch.stack(each) for each in cut]

    def _pictures(
        self, shown: NDArray[np.int64], drawn: Sequence[NDArray[np.float32]], bad: dict[int, str]
    ) -> Iterator[Decoded]:
        """The pictures of `shown`, in which substitutes then stand for those that cannot be read."""
        for row, i in enumerate(shown.tolist()):
            picture = self._decoded(i, [uniforms[row] for uniforms in drawn])
            if picture is None and self.replace:
                shown[row], image = readable(self.source, i, bad)
                picture = Decoded.whole(image)
            yield picture or Decoded.whole(self.source.image(i))

    def _decoded(self, i: int, uniforms: Sequence[NDArray[np.float32]]) -> Decoded | None:
        """Picture i, no larger than its crops need; None if it has no file, or a bad one: then the source says why."""
        if not isinstance(self.source, FileSource):
            return None
        try:
            shrink = partial(largest_shrink, self.views, uniforms)
            return decode_scaled(self.source.name(i), self.source.content(i), shrink)
        except ImageError:
            return None


def _streamed(
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    workers: int,
    start: int,
    on_bad: OnBad | None,
) -> Crops:
    # One loader for all epochs: its workers never restart, and the sampler tells them the epoch.
    cutter = Cutter(source, views, plan.seed, replace=on_bad is not None)
    options: dict[str, Any] = {
        "batch_size": None,
        "collate_fn": identity_collate,
        "worker_init_fn": leave_signals_to_the_parent,
        "pin_memory": device.type == "cuda",
    }
    if isinstance(source, RemoteSource):  # has no order to take samples from
        loader = stream_loader(
            source, cutter.cut, plan, range(start, plan.total_steps), workers, cutter.replace, options
        )
    else:
        loader = DataLoader(cutter, sampler=plan.samples(start), num_workers=workers, **options)  # type: ignore[arg-type]
    for epoch, index, shown, cut, bad in delivered(loader, "data.workers"):
        if on_bad is not None and bad:
            on_bad(bad)
        yield epoch, index, shown, [each.to(device, non_blocking=True) for each in cut]
