"""What all loader processes have in common: signals are the parent's business, and what goes wrong is one sentence."""

import atexit
import multiprocessing
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

T = TypeVar("T")
_THE_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class LoaderError(ValueError):
    """A loader process that died, or has no way to hand over what it made; the message is one sentence."""


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and Slurm reach every process; the parent ends its loaders itself, behind the step that it finishes."""
    for number in _THE_PARENTS:
        signal.signal(number, signal.SIG_IGN)


def identity_collate(item: T) -> T:
    """Leaves an item to the way between processes: torch's loader would make tensors of its arrays."""
    return item


def to_shared_memory(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, in a loader process put into the shared memory in which they reach the parent.

    torch does so in a thread of the process, of whose errors the parent never hears: it would wait for ever.

    Raises:
        LoaderError: if there is no room.
    """
    if get_worker_info() is None:
        return tensors
    try:
        return [each.share_memory_() for each in tensors]
    except (RuntimeError, OSError) as error:
        size = sum(each.nbytes for each in tensors) / 1e6
        why = " ".join(str(error).split()).removesuffix(": Success (0)")  # torch 2.11 forgets the reason
        raise LoaderError(_no_room(f"finds no shared memory for a batch of {size:,.1f} MB ({why})")) from error


def delivered(loader: DataLoader[T], field: str) -> Iterator[T]:
    """What a loader gives, in its order; an item that is an error is raised.

    A process that dies is told wherever this one is at that moment, in a step or in an evaluation: torch's handler of
    SIGCHLD raises there, and here its words are replaced.

    Args:
        loader: with `leave_signals_to_the_parent` and `identity_collate`, where it has processes.
        field: how errors call the number of processes, such as data.workers.

    Raises:
        LoaderError: if a process cannot be started, or dies.
    """
    items = _started(loader, f"{field}={loader.num_workers}")
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    except RuntimeError as error:
        told = _told(error, f"{field}={loader.num_workers}")
        if told is None:
            raise
        raise told from error
    finally:
        _end(items)


def _started(loader: DataLoader[T], field: str) -> Iterator[T]:
    """The loader's iterator, with its processes.

    They inherit that signals are held back: one that came before they ignore it would end them.
    """
    if loader.num_workers == 0:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _THE_PARENTS)
    try:
        multiprocessing.Semaphore()  # where the loader's locks fail, torch prints a traceback of its own besides
        items = iter(loader)
    except OSError as error:  # no memory for a process, or no room in /dev/shm for its locks
        raise LoaderError(
            f"the loader processes cannot be started ({error.strerror or error}): lower {field} (0: none), or give "
            "more memory, in a container also shared memory (docker run --shm-size=8g)"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(lambda heartbeat: _end(heartbeat()), weakref.ref(items))
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _Telling):
        handler.field = field
    elif getattr(handler, "__module__", "").startswith("torch."):  # it has set none outside of the main thread
        signal.signal(signal.SIGCHLD, _Telling(handler, field))
    return items


def _end(items: Any) -> None:
    """Ends the processes, as torch does when its iterator goes.

    An error's traceback may hold the iterator to the end of the program, where multiprocessing would send SIGTERM,
    which the processes ignore, and wait for ever.
    """
    getattr(items, "_shutdown_workers", lambda: None)()


@dataclass
class _Telling:
    """The handler of SIGCHLD that calls torch's and says in a sentence what that raises."""

    torchs: Callable[[int, FrameType | None], Any]
    field: str

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.torchs(number, frame)
        except RuntimeError as error:
            told = _told(error, self.field)
            if told is None:
                raise
            raise told from error


def _told(error: RuntimeError, field: str) -> LoaderError | None:
    """The sentence for an error of torch's about its processes; None: it is about something else."""
    if isinstance(error.__cause__, LoaderError):  # raised by the handler while torch waited for an item
        return error.__cause__
    said = str(error)
    if said.startswith("Too many open files"):
        return LoaderError(f"too many open files between the loader processes: raise ulimit -n, or lower {field}")
    if not said.startswith("DataLoader worker"):
        return None
    if "Bus error" in said:
        return LoaderError(_no_room("died (Bus error), most likely for want of shared memory"))
    how = re.search(r"killed by signal: ([^.]+)\.", said)
    why = how.group(1) if how else "no word of how"
    # The kernel ends with SIGKILL what takes the last memory. Other signals come from elsewhere.
    guess = ", most likely for want of memory" if why in ("Killed", "no word of how") else ""
    return LoaderError(
        f"a loader process died ({why}){guess}: lower {field} (0: no loader processes) or give more memory, and start "
        "the same command again"
    )


def _no_room(what: str) -> str:
    return (
        f"a loader process {what}: make /dev/shm larger (in a container docker run "
        "--shm-size=8g), or set data.workers=0, which does without it"
    )
