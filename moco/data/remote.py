"""A stream of tar shards without random access: from a web server, a bucket, or a pipe.

The stream differs from every other source:

- An epoch is `length` images. Its images depend on the order of the shards and on the number of workers.
- In each pass the shards are distributed anew over the workers of all ranks, and each worker shuffles its images in a
  buffer. With the same numbers of ranks and workers, the order of the images is reproducible; with other numbers, the
  order is different.
- A resumed run starts a new pass over the shards, in an order of its own. Some images of the interrupted epoch repeat,
  others are delayed to the next epoch. The random numbers of the views remain a function of (seed, epoch, position in
  the epoch, view).

Legend: n samples of this rank's batch.
"""

import contextlib
import hashlib
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moco.config import DataConfig, RunWarning
from moco.config.base import optional_module
from moco.data.base import Source, Sources, entries_digest
from moco.data.decode import ImageError, decode_bytes
from moco.data.keyed import MIXING, SHARDS, keyed_uniform, permutation
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.plan import Plan
from moco.data.tars import images_of
from moco.data.walk import IMAGE_ENDINGS
from moco.data.workers import LoaderError, make_loader
from moco.distributed import is_rank_zero

SCHEMES = ("http", "https", "hf", "gs", "s3", "ais", "ftps", "sftp", "scp")  # each needs a download program
_DRAWS = 1024  # random numbers drawn together

# A rank's batch: epoch; positions in the epoch, (n,); identities, (n,); a list of the crops of each view and, as its
# last element, the heights and widths of the images, (n, 2); unreadable images by identity.
Item = tuple[int, NDArray[np.int64], NDArray[np.int64], list[Tensor], dict[int, str]]
CropFunction = Callable[[int, NDArray[np.int64], Iterable[Tensor]], list[Tensor]]  # epoch, positions, images -> crops


class StreamError(ValueError):
    """A shard that cannot be read; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class RemoteSource(Source):
    """Tar shards that are read from start to end, by `moco.data.loader.batches` only."""

    addresses: tuple[str, ...]
    length: int  # images per epoch
    buffer: int  # images that a worker buffers to shuffle them
    labels: None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB

    def __len__(self) -> int:
        return self.length

    def image(self, i: int) -> Tensor:
        raise _NO_ACCESS

    def name(self, i: int) -> str:
        return f"webdataset/{i}"

    def subset(self, rows: NDArray[np.int64]) -> "RemoteSource":
        raise _NO_ACCESS

    def encoded_names(self) -> Iterable[bytes]:
        return (os.fsencode(Path(urlparse(each).path).name) for each in self.addresses)

    def content_digest(self) -> str:
        return entries_digest([self.name(i)] for i in range(len(self)))

    def stream(
        self, crop: CropFunction, plan: Plan, start: int, workers: int, replace: bool, pin_memory: bool
    ) -> DataLoader[Any]:
        """Return a loader of this rank's batches, as `Item`s, from step `start` to the end of training.

        Args:
            crop: makes the crops of all views from a batch's images, in the worker.
            workers: loader processes; at most one per shard of this rank is used.
            replace: skip unreadable images and report them; False: they end the stream.

        Raises:
            ValueError: if there are fewer shards than ranks.
        """
        count = len(self.addresses)
        if count < plan.processes:
            raise ValueError(
                f"data.root names {count} shards for {plan.processes} processes, and each needs at least one: make "
                "more and smaller shards, or run fewer processes"
            )
        if start and is_rank_zero():
            warnings.warn(
                f"data.name=webdataset: a stream cannot resume in the middle: training continues at step {start} with "
                "a new pass over the shards; some images repeat in this epoch, others are delayed",
                RunWarning,
                stacklevel=2,
            )
        stream = _Stream(self, crop, plan, range(start, plan.total_steps), replace)
        return make_loader(stream, min(workers, count // plan.processes), pin_memory=pin_memory)


_NO_ACCESS = ValueError(
    "data.name=webdataset is a stream without access to single images, for moco.train only: pack the images with "
    "moco.pack and set data=shards"
)


def open_remote(config: DataConfig) -> Sources:
    """Open the shards of data.root: {000000..000099} expands to all numbers, and :: separates several addresses."""
    local = "; shards of moco.pack on a local disk do not need it: set data=shards"
    expand_urls = optional_module("webdataset.shardlists", "data.name=webdataset", "webdataset", local).expand_urls
    if config.length < 1:
        raise ValueError(f"data.length={config.length}: set it to the number of images per epoch")
    try:
        addresses = tuple(str(each) for each in expand_urls(config.root))
    except (AssertionError, KeyError) as error:
        unset = "contains ${...} without a value: to give ${NAME} a value, set the environment variable WDS_NAME"
        raise ValueError(f"data.root={config.root} {unset}") from error
    except ValueError as error:  # of braceexpand
        raise ValueError(f"data.root={config.root}: {error}; the syntax is train-{{000000..000099}}.tar") from error
    for address in addresses:
        _check_address(address, config.allow_pipe)
    return Sources(RemoteSource(addresses, config.length, config.shuffle_buffer))


def _check_address(address: str, allow_pipe: bool) -> None:
    """Refuse a missing file, an unknown scheme, and a command that was not allowed."""
    scheme = urlparse(address).scheme  # in lower case, as in webdataset
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"data.root={address} would run a shell command here: set data.allow_pipe=true to allow it")
    if scheme in ("", "file"):
        path = Path(url2pathname(urlparse(address).path) if scheme else address)
        if not path.is_file():
            raise FileNotFoundError(f"data.root: the shard {address} does not exist: correct the path")
    elif scheme not in ("pipe", *SCHEMES):
        raise ValueError(
            f"data.root={address}: {scheme}: is not supported: use a path, {', '.join(SCHEMES)}, or pipe with "
            "data.allow_pipe=true"
        )


class Sample(NamedTuple):
    """One image of the stream."""

    identity: int  # a hash of its name and shard: the queue stores it instead of an image index
    name: str
    content: bytes


class _Stream(IterableDataset[Any]):
    """One rank's batches. Each of k workers makes the batches of every k-th step; without workers, k is 1."""

    def __init__(self, source: RemoteSource, crop: CropFunction, plan: Plan, steps: range, replace: bool) -> None:
        self.source, self.crop, self.plan, self.steps, self.replace = source, crop, plan, steps, replace

    def __iter__(self) -> Iterator[Item | ValueError]:
        plan, info = self.plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot, slots = plan.rank * workers + worker, plan.processes * workers
        buffer = max(1, min(self.source.buffer, len(self.source) // slots))  # a larger buffer could hold an image twice
        start = self.steps.start
        endings = self.source.pixel_format.endings
        ordered = endless(self.source.addresses, plan.seed, start, slot, slots, endings)
        samples = shuffled(ordered, buffer, plan.seed, start, slot)
        for step in self.steps[worker::workers]:
            epoch, position = divmod(step, plan.steps_per_epoch)
            first = position * plan.batch_size + plan.rank * plan.share
            index, identities = np.arange(first, first + plan.share), np.empty(plan.share, np.int64)
            unreadable: dict[int, str] = {}
            try:
                views = self.crop(epoch, index, self._images(samples, identities, unreadable))
                yield epoch, index, identities, views, unreadable
            except (ImageError, StreamError, LoaderError) as error:
                yield error  # raised here, it would reach the user as the worker's traceback
                return

    def _images(
        self, samples: Iterator[Sample], identities: NDArray[np.int64], unreadable: dict[int, str]
    ) -> Iterator[Tensor]:
        """Yield the next n readable images and write their `identities`, (n,); add unreadable ones to `unreadable`."""
        row = 0
        while row < len(identities):
            sample = next(samples)
            try:
                image = decode_bytes(sample.name, sample.content, self.source.pixel_format)
            except ImageError as error:
                if not self.replace:
                    raise
                unreadable[sample.identity] = f"{sample.name}: {error.reason}"
                continue
            identities[row] = sample.identity
            row += 1
            yield image


def endless(
    addresses: tuple[str, ...], seed: int, start: int, slot: int, slots: int, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> Iterator[Sample]:
    """Yield the images of worker `slot` of the `slots` workers of all ranks, pass after pass.

    In each pass, each shard belongs to one worker. A worker whose shards of a pass contain no image reads the next
    shard that contains one. A RunWarning reports the first shard with files that are skipped.

    Raises:
        StreamError: if a shard cannot be read, or no shard contains an image.
    """
    warned = False
    for number_of_pass in itertools.count(start):  # from `start` on, so that a resumed run uses another order
        order = permutation(seed, number_of_pass, len(addresses), SHARDS)
        own, others = order[slot::slots], np.delete(order, np.s_[slot::slots])
        found = False
        for number, at in enumerate(np.concatenate([own, others])):
            if found and number >= len(own):
                break
            skipped: Counter[str] = Counter()
            for sample in samples_of(addresses[at], skipped, endings):
                found = True
                yield sample
            if found and skipped.total() and not warned:
                warned = True
                counts = ", ".join(f"{what} ({count:,})" for what, count in skipped.items() if count)
                warnings.warn(
                    f"data.root: skipped in {addresses[at]}, and likewise in the other shards: {counts}; images are "
                    f"files that end in {' '.join(endings)}",
                    RunWarning,
                    stacklevel=2,
                )
        if not found:
            raise StreamError(
                f"data.root: no image in {addresses[order[slot]]}, nor in any other shard: images are files that end "
                f"in {' '.join(endings)}"
            )


def samples_of(
    address: str, skipped: Counter[str] | None = None, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> Iterator[Sample]:
    """Yield the images of one shard in its order; raise a StreamError if it cannot be opened or read to its end.

    `skipped` and `endings` are those of `moco.data.tars.images_of`.
    """
    from webdataset.gopen import gopen

    stream = None
    try:
        stream = gopen(address)
        for member, content in images_of(stream, Counter() if skipped is None else skipped, endings):
            name = f"{member} of {address}"
            hashed = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            yield Sample(int.from_bytes(hashed) >> 1, name, content)
        while stream.read(2**16):  # to the end, so that the sending program ends by itself, with its own exit status
            pass
        stream.close()
    except Exception as error:  # tarfile, the downloading program and the pipe have errors of their own
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise StreamError(f"data.root: the shard {address} cannot be read ({' '.join(reason.split())})") from error
    finally:
        if stream is not None:
            with contextlib.suppress(OSError):  # a program that is stopped before its last byte reports an error
                stream.close()


def shuffled(samples: Iterable[Sample], size: int, seed: int, start: int, slot: int) -> Iterator[Sample]:
    """Yield the samples in random order: take one from a random position of a buffer, and put the next one there."""
    samples = iter(samples)
    buffer = list(itertools.islice(samples, size))
    parts = (np.arange(first, first + _DRAWS) for first in itertools.count(0, _DRAWS))
    drawn = (u for part in parts for u in keyed_uniform(seed, start, part, MIXING + slot, 1)[:, 0])
    for sample, u in zip(samples, drawn, strict=False):
        position = int(u * size)
        yield buffer[position]
        buffer[position] = sample
