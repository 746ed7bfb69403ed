"""Pictures out of a stream of tar shards that cannot be read at random: from a web server, a bucket, a pipe.

What differs from every other source:

- An epoch is `length` images by count; which ones come in it follows from the shards' order and the workers' pace.
- The shards are dealt to the workers of all ranks anew in each pass, and each worker mixes what it reads in a buffer.
  With the same number of ranks and workers the stream is the same every time; with another one it is another.
- A run that goes on does not read again all that it had read: it begins a new pass over the shards, in an order of its
  own. Some pictures of the interrupted epoch come twice, others wait for the next. The views' random numbers stay a
  function of (seed, epoch, running number in the epoch, view).

Legend: B global batch, n = B / W this rank's share, S shards.
"""

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moco.config import RunWarning
from moco.data.decode import ImageError, decode_bytes
from moco.data.keyed import MIXING, SHARDS, keyed_uniform, permutation
from moco.data.tars import pictures
from moco.data.walk import IMAGE_ENDINGS
from moco.data.workers import LoaderError
from moco.distributed import is_rank_zero

SCHEMES = ("http", "https", "hf", "gs", "s3", "ais", "ftps", "sftp", "scp")  # opened by a program that gets the address
_DRAWN_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class RemoteSource:
    """Tar shards that are read from their beginning to their end; only `moco.data.loader.batches` can."""

    addresses: tuple[str, ...]
    length: int  # images in an epoch
    buffer: int  # pictures that a worker mixes

    labels: None = None
    classes: tuple[str, ...] = ()

    @property
    def images(self) -> None:
        return None

    def __len__(self) -> int:
        return self.length

    def image(self, i: int) -> Tensor:
        raise ValueError(
            "data.name=webdataset is a stream, of which no picture can be asked for by its number: only moco.train "
            "reads it; pack the pictures with moco.pack and set data=shards"
        )

    def name(self, i: int) -> str:
        return f"webdataset/{i}"


def open_remote(root: str, length: int, buffer: int, allow_pipe: bool) -> RemoteSource:
    """The shards that `root` names.

    Args:
        root: addresses or paths; {000000..000099} counts, :: stands between several.
        length: images in an epoch.
        buffer: pictures that each worker mixes.
        allow_pipe: let an address run a shell command.

    Raises:
        FileNotFoundError: if a local shard is not there.
        ValueError: if webdataset is not installed, or an argument cannot be.
    """
    _webdataset()
    from webdataset.shardlists import expand_urls

    if length < 1:
        raise ValueError(f"data.length={length}: a stream does not know its length; say how many images make an epoch")
    if buffer < 1:
        raise ValueError(f"data.shuffle_buffer={buffer} must be at least 1 (no mixing)")
    try:
        addresses = tuple(str(each) for each in expand_urls(root))
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"data.root={root} names a variable that is not set: ${{NAME}} is what the environment's WDS_NAME holds"
        ) from error
    except ValueError as error:  # of braceexpand
        raise ValueError(f"data.root={root}: {error}; it counts like this: train-{{000000..000099}}.tar") from error
    for address in addresses:
        _check_address(address, allow_pipe)
    return RemoteSource(addresses, length, buffer)


def _webdataset() -> Any:
    try:
        import webdataset  # only this source needs it
    except ImportError as error:
        raise ValueError(
            "data.name=webdataset needs webdataset: pip install 'momentum-contrast[webdataset]'; shards of moco.pack "
            "on disk need nothing, data=shards"
        ) from error
    return webdataset


def _check_address(address: str, allow_pipe: bool) -> None:
    """Refuses what is not there, and what would run a command without having been allowed to."""
    scheme = urlparse(address).scheme  # in lower case, as webdataset sees it
    if scheme == "pipe":
        if not allow_pipe:
            raise ValueError(
                f"data.root={address} would run a shell command on this machine: set data.allow_pipe=true if it is one "
                "of yours"
            )
    elif scheme in ("", "file"):
        path = Path(url2pathname(urlparse(address).path) if scheme else address)
        if not path.is_file():
            raise FileNotFoundError(f"data.root: the shard {address} does not exist: correct the path")
    elif scheme not in SCHEMES:
        raise ValueError(
            f"data.root={address}: {scheme}: is no way to a shard; there are a path, {', '.join(SCHEMES)}, and pipe "
            "with data.allow_pipe=true"
        )


class Sample(NamedTuple):
    """One picture of the stream."""

    identity: int  # of its name and shard: the queue knows by it whose keys it holds
    name: str
    content: bytes


# A batch of one rank: epoch, running numbers (n,), identities (n,), views, and what could not be read; see the loader.
Item = tuple[int, NDArray[np.int64], NDArray[np.int64], list[Tensor], dict[int, str]]
Cut = Callable[[int, NDArray[np.int64], Iterable[Tensor]], list[Tensor]]  # epoch, running numbers, images -> views


class Steps(Protocol):
    """What a stream asks of `moco.data.loader.Plan`."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def processes(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...


class _Stream(IterableDataset[Any]):
    """One rank's batches. Worker w of V makes those of every V-th step; V = 1 without worker processes."""

    def __init__(self, source: RemoteSource, cut: Cut, plan: Steps, steps: range, replace: bool) -> None:
        self.source, self.cut, self.plan, self.steps, self.replace = source, cut, plan, steps, replace

    def __iter__(self) -> Iterator[Item | ValueError]:
        plan, about = self.plan, get_worker_info()
        worker, workers = (about.id, about.num_workers) if about else (0, 1)
        slot, slots = plan.rank * workers + worker, plan.processes * workers
        buffer = max(1, min(self.source.buffer, len(self.source) // slots))  # more would hold a picture twice
        samples = mixed(
            endless(self.source.addresses, plan.seed, self.steps.start, slot, slots),
            buffer,
            plan.seed,
            self.steps.start,
            slot,
        )
        share = plan.batch_size // plan.processes
        for step in self.steps[worker::workers]:
            epoch, position = divmod(step, plan.steps_per_epoch)
            first = position * plan.batch_size + plan.rank * share
            index, shown = np.arange(first, first + share), np.empty(share, np.int64)
            bad: dict[int, str] = {}
            try:
                yield epoch, index, shown, self.cut(epoch, index, self._images(samples, shown, bad)), bad
            except (ImageError, StreamError, LoaderError) as error:
                yield error  # raised here it would reach the user as the worker's traceback
                return

    def _images(self, samples: Iterator[Sample], shown: NDArray[np.int64], bad: dict[int, str]) -> Iterator[Tensor]:
        """The next pictures that can be read, whose identities go into `shown`, (n,), and of the others into `bad`."""
        row = 0
        while row < len(shown):
            sample = next(samples)
            try:
                image = decode_bytes(sample.name, sample.content)
            except ImageError as error:
                if not self.replace:
                    raise
                bad[sample.identity] = f"{sample.name}: {error.reason}"
                continue
            shown[row] = sample.identity
            row += 1
            yield image


class StreamError(ValueError):
    """A shard that could not be read; the message is one sentence."""


def stream_loader(
    source: RemoteSource,
    cut: Cut,
    plan: Steps,
    steps: range,
    workers: int,
    replace: bool,
    options: Mapping[str, Any],
) -> DataLoader[Any]:
    """This rank's batches of the given steps, as `moco.data.loader` takes them from its other workers.

    Args:
        source: the shards.
        cut: makes a batch's views of its images, in the worker.
        plan: batch size, rank, seed.
        steps: to make; their first is where the run goes on.
        workers: loader processes; fewer are used where there are not so many shards.
        replace: leave out pictures that cannot be decoded, and say which.
        options: further ones of PyTorch's loader.

    Raises:
        ValueError: if there are fewer shards than ranks.
    """
    count = len(source.addresses)
    if count < plan.processes:
        raise ValueError(
            f"data.root names {count} shards for {plan.processes} processes, each of which reads shards of its own: "
            "make more and smaller ones, or run fewer processes"
        )
    if steps.start and is_rank_zero():
        warnings.warn(
            f"data.name=webdataset: a stream cannot be entered where it was left, so the run goes on at step "
            f"{steps.start} with a new pass over the shards; some pictures of this epoch come twice, others later",
            RunWarning,
            stacklevel=2,
        )
    stream = _Stream(source, cut, plan, steps, replace)
    return DataLoader(stream, num_workers=min(workers, count // plan.processes), **options)


def endless(addresses: tuple[str, ...], seed: int, start: int, slot: int, slots: int) -> Iterator[Sample]:
    """The pictures of one of `slots` workers, pass after pass: in each, every shard belongs to one of them.

    A worker whose shards of a pass hold no picture shows the next shard that holds any.

    Warns:
        RunWarning: once, of the first shard of which something is left out.

    Raises:
        StreamError: if a shard cannot be read, or none holds a picture.
    """
    passes, told = start, False  # so that a run which goes on begins with another order
    while True:
        order = permutation(seed, passes, len(addresses), SHARDS)
        mine, others = order[slot::slots], np.delete(order, np.s_[slot::slots])
        found = False
        for number, at in enumerate(np.concatenate([mine, others])):
            if found and number >= len(mine):
                break
            left: Counter[str] = Counter()
            for sample in samples_of(addresses[at], left):
                found = True
                yield sample
            if found and left.total() and not told:
                told = True
                warnings.warn(_left_out(addresses[at], left), RunWarning, stacklevel=2)
        if not found:
            raise StreamError(
                f"data.root: no picture in {addresses[order[slot]]}, nor in any other shard: pictures are files that "
                f"end in {' '.join(IMAGE_ENDINGS)}"
            )
        passes += 1


def _left_out(address: str, left: Counter[str]) -> str:
    counts = ", ".join(f"{what} ({count:,})" for what, count in left.items() if count)
    return (
        f"data.root: left out of {address}, and likewise of the other shards: {counts}; pictures are files that end in "
        f"{' '.join(IMAGE_ENDINGS)}"
    )


def samples_of(address: str, left: Counter[str] | None = None) -> Iterator[Sample]:
    """The pictures of one shard, in its order.

    Args:
        address: of the shard.
        left: gets what is left out of it, see `moco.data.tars.pictures`.

    Raises:
        StreamError: if it cannot be opened or read to its end.
    """
    from webdataset.gopen import gopen

    stream = None
    try:
        stream = gopen(address)
        for member, content in pictures(stream, Counter() if left is None else left):
            name = f"{member} of {address}"
            digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            yield Sample(int.from_bytes(digest) >> 1, name, content)
        while stream.read(2**16):  # to the very end, so that the program which sends it can say how it went
            pass
        stream.close()
    except Exception as error:  # tarfile, the program that fetches, the pipe: each has errors of its own
        said = str(error.args[0]) if error.args else type(error).__name__
        raise StreamError(f"data.root: the shard {address} cannot be read ({' '.join(said.split())})") from error
    finally:
        if stream is not None:
            with contextlib.suppress(OSError):  # a program that is ended before its last byte says that it was
                stream.close()


def mixed(samples: Iterable[Sample], size: int, seed: int, start: int, slot: int) -> Iterator[Sample]:
    """The samples out of order: each comes from a place of a buffer of `size`, drawn by a key, which the next fills."""
    buffer: list[Sample] = []
    places = _places(size, seed, start, slot)
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = next(places)
        yield buffer[place]
        buffer[place] = sample


def _places(size: int, seed: int, start: int, slot: int) -> Iterator[int]:
    first = 0
    while True:
        numbers = np.arange(first, first + _DRAWN_AT_ONCE)
        drawn = keyed_uniform(seed, start, numbers, MIXING + slot, 1)[:, 0]
        yield from (drawn * size).astype(int).tolist()
        first += _DRAWN_AT_ONCE
