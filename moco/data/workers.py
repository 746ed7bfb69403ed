"""Loader processes: signals are left to the parent process, and failures become one-sentence errors."""

import atexit
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from moco.runtime.preemption import STOP_SIGNALS

T = TypeVar("T")
TASK = 16  # rows per task of `in_order`
MOST_PROCESSES = 16  # by default; each holds batches in memory


class LoaderError(ValueError):
    """A loader process that cannot start, died, or cannot transfer its result; the message is one sentence."""


def start_worker(worker: int) -> None:
    """Ignore the signals of terminals and Slurm, which reach every process: the parent ends its loaders.

    If the parent is killed, end too. torch's worker would first wait until its results are read, which may be never.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process when its parent has ended: `getppid` then returns another number."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def to_shared_memory(tensors: list[Tensor]) -> list[Tensor]:
    """In a loader process, move the tensors to the shared memory in which they reach the parent.

    torch would do so in a thread of the loader process. An error in this thread never reaches the parent, which would
    wait forever.

    Raises:
        LoaderError: if there is no room.
    """
    if get_worker_info() is None:
        return tensors
    try:
        return [each.share_memory_() for each in tensors]
    except (RuntimeError, OSError) as error:
        size = sum(each.nbytes for each in tensors) / 1e6
        reason = " ".join(str(error).split()).removesuffix(": Success (0)")  # torch 2.11 loses the reason
        raise LoaderError(_no_room(f"has no shared memory for a batch of {size:,.1f} MB ({reason})")) from error


def count_processes(workers: int | None) -> int:
    """Return the number of loader processes: `workers`, or for None this rank's share of the CPU cores, 1 to 16."""
    if workers is not None:
        return workers
    known = hasattr(os, "sched_getaffinity")  # on Linux: a container or a job may be limited to a part of the cores
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(MOST_PROCESSES, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class _Tasks:
    """The data set of `in_order`: each item is the results of a range of rows."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, rows: range) -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about headers of images that it can read
            return [self.function(i) for i in rows]


def in_order(function: Callable[[int], T], rows: range, workers: int | None, field: str) -> Generator[T, None, None]:
    """Yield function(row) for each row in order, computed by worker processes; `close` ends the processes.

    At most `2 * workers` tasks of `TASK` rows are in progress. See `count_processes` for `workers`, and `loaded` for
    `field` and the errors.
    """
    tasks = (rows[at : at + TASK] for at in range(0, len(rows), TASK))
    for results in loaded(make_loader(_Tasks(function), workers, tasks), field):
        yield from results


def make_loader(
    dataset: Any, workers: int | None, sampler: Iterable[Any] | None = None, **options: Any
) -> DataLoader[Any]:
    """Return PyTorch's loader of the data set's items, one per entry of `sampler`, unchanged and in order.

    It limits the items in progress, and its workers end if their parent is killed.
    """
    options = {"worker_init_fn": start_worker} | options
    processes = count_processes(workers)
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=processes, collate_fn=_identity, **options)


def _identity(item: T) -> T:
    """Return the item: the default collate function would convert NumPy arrays to tensors."""
    return item


def loaded(loader: DataLoader[T], field: str) -> Iterator[T]:
    """Yield the loader's items in order; raise an item that is an error.

    The death of a loader process raises an error in the parent process at once, also in the middle of a step or an
    evaluation: torch's handler of SIGCHLD raises it, and this module replaces the message.

    Args:
        loader: from `make_loader`.
        field: the field that sets the number of processes, for errors.

    Raises:
        LoaderError: if a process cannot be started, or dies.
    """
    field = f"{field}={loader.num_workers}"
    items = _started(loader, field)
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    except RuntimeError as error:
        _reraise(error, field)
    finally:
        _end(items)


def _started(loader: DataLoader[T], field: str) -> Iterator[T]:
    """Start the loader's processes with signals blocked.

    A signal that arrives before the processes ignore signals would end them.
    """
    if loader.num_workers == 0:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.Semaphore()  # a test: if the loader could not create its locks, torch would print a traceback
        items = iter(loader)
    except OSError as error:  # no memory for a process, or no room in /dev/shm for its locks
        raise LoaderError(
            f"the loader processes cannot be started ({error.strerror or error}): lower {field} (0: none), or provide "
            "more memory; in a container also shared memory (docker run --shm-size=8g)"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(lambda alive: _end(alive()), weakref.ref(items))
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _ChildHandler):
        handler.field = field
    elif getattr(handler, "__module__", "").startswith("torch."):  # torch sets none outside of the main thread
        signal.signal(signal.SIGCHLD, _ChildHandler(handler, field))
    return items


def _end(items: Any) -> None:
    """End the processes."""
    # A traceback may keep the iterator alive until the program exits; then multiprocessing would wait forever, because
    # the processes ignore its SIGTERM.
    getattr(items, "_shutdown_workers", lambda: None)()


@dataclass
class _ChildHandler:
    """A handler of SIGCHLD that calls torch's handler and converts its error to one sentence."""

    torch_handler: Callable[[int, FrameType | None], Any]
    field: str

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.torch_handler(number, frame)
        except RuntimeError as error:
            _reraise(error, self.field)


def _reraise(error: RuntimeError, field: str) -> None:
    """Raise a LoaderError in place of torch's error about loader processes; raise any other error unchanged."""
    message = str(error)
    if isinstance(error.__cause__, LoaderError):  # raised by the handler while torch waited for an item
        raise error.__cause__ from error
    if message.startswith("Too many open files"):
        sentence = f"too many open files between the loader processes: raise ulimit -n, or lower {field}"
    elif not message.startswith("DataLoader worker"):
        raise error
    elif "Bus error" in message:
        sentence = _no_room("died (Bus error), most likely because shared memory is full", field.partition("=")[0])
    else:
        killed = re.search(r"killed by signal: ([^.]+)\.", message)
        reason = killed.group(1) if killed else "unknown cause"
        # The kernel sends SIGKILL when memory runs out; other signals come from elsewhere.
        guess = ", most likely because memory ran out" if reason in ("Killed", "unknown cause") else ""
        sentence = (
            f"a loader process died ({reason}){guess}: lower {field} (0: no loader processes) or provide more memory, "
            "and run the same command again"
        )
    raise LoaderError(sentence) from error


def _no_room(what: str, field: str = "data.workers") -> str:
    larger = "make /dev/shm larger (in a container docker run --shm-size=8g)"
    return f"a loader process {what}: {larger}, or set {field}=0, which does not use it"
