"""Stop a run before its end without losing a step: signals, the time limit, and the exit status.

Does not import torch, which is slow: every command imports `Preempted` at its start.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

PREEMPTED = os.EX_TEMPFAIL  # 75, "try again later": running the same command again resumes
INTERRUPTED = 130  # 128 + SIGINT, the exit status that shells report for a command that Ctrl-C has ended


class Reason(IntEnum):
    """Why a run stops before its end. If ranks have different reasons, all ranks use the highest one."""

    NONE = 0
    TIME_LIMIT = 1
    SIGXCPU = 2  # the limit of CPU time, `ulimit -t`
    SIGUSR1 = 3  # SIGUSR1 and SIGUSR2: batch systems announce the end of a job with them
    SIGUSR2 = 4
    SIGHUP = 5  # the terminal was closed
    SIGTERM = 6
    SIGINT = 7
    NOT_SAVED = 8  # the last checkpoint could not be written


STOP_SIGNALS = tuple(signal.Signals[each.name] for each in Reason if each.name in signal.Signals.__members__)
"""The signals after which a run saves and ends. Loader processes ignore them: their parent process ends the loaders
after the step."""


@contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for each of `STOP_SIGNALS`, except those that this process ignores (nohup).

    Outside the main thread, where Python allows no handlers, this does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    caught = [number for number in STOP_SIGNALS if main and signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, before in previous.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # see `prevent_restart`
                signal.signal(number, before)


class Terminated(BaseException):
    """A signal, which the message names, has stopped a command that saves no state when it is stopped."""


@contextmanager
def raise_terminated() -> Iterator[None]:
    """Raise `Terminated` at each of `STOP_SIGNALS` but SIGINT, so that a command cleans up and says how to continue.

    This does nothing outside the main thread, for a signal that this process ignores (nohup), and in a process of
    torchrun, which sends SIGTERM to all processes when one has failed.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    if "WORLD_SIZE" in os.environ or threading.current_thread() is not threading.main_thread():
        caught = []
    for number in caught:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in caught:
            if signal.getsignal(number) is terminate:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def keeping(what: str, is_some: Callable[[], bool]) -> Iterator[None]:
    """Add a note to the exception of a stop: whether any of `what`, such as "finished features", is kept.

    If so, the same command resumes from there; otherwise it starts from the beginning.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stopped:
        kept = f"{what} are kept: run the same command again to resume"
        stopped.add_note(kept if is_some() else f"no {what} yet: run the same command again to start")
        raise


class Preempted(Exception):
    """The run was stopped before its end, and everything is saved; the message is one sentence.

    `done` of `total` steps are saved; `done` is None if this attempt has not taken a step.
    """

    def __init__(self, reason: Reason, done: int | None = None, total: int = 0) -> None:
        self._arguments = reason, done, total
        self.status = INTERRUPTED if reason is Reason.SIGINT else PREEMPTED
        by = "the time limit stop_after" if reason is Reason.TIME_LIMIT else reason.name
        text = f"after step {done} of {total}, which is saved: run the same command again to resume"
        if done is None:
            text = "before the first step: nothing new to save; run the same command again to start"
        super().__init__(f"stopped by {by} {text} (status {self.status})")

    def __reduce__(self) -> tuple[type["Preempted"], tuple[Reason, int | None, int]]:
        """Let the exception be sent to the other ranks."""
        return Preempted, self._arguments


class PreemptionHandler:
    """Catches the signals of `STOP_SIGNALS` and checks the time limit.

    Use it as a context manager around as much as possible: a signal that arrives during imports or while data is opened
    is remembered until all ranks can act on it together. SIGINT raises KeyboardInterrupt, except that within `stepping`
    the first SIGINT is remembered, too. Outside the main thread only the time limit counts.

    Args:
        minutes: the time limit, from now; 0: none.
    """

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._received, self._stepping = Reason.NONE, False
        self._handling = handle_stop_signals(self._receive)

    def signal_received(self) -> Reason:
        """Return the signal received so far, regardless of the time limit."""
        return self._received

    def reason(self) -> Reason:
        """Return why this process should stop now, or NONE."""
        late = Reason.TIME_LIMIT if time.monotonic() >= self._deadline else Reason.NONE
        return max(self._received, late)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Remember the first SIGINT instead of raising KeyboardInterrupt: training stops after the current step."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def __enter__(self) -> "PreemptionHandler":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Preempted:
            prevent_restart()
        self._handling.__exit__(None, None, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._received is Reason.SIGINT or not self._stepping):
            raise KeyboardInterrupt
        self._received = max(self._received, Reason[signal.Signals(number).name])


def prevent_restart() -> None:
    """Stop torchrun from restarting this job. Call it before an intended exit or a repeatable error.

    Without a launcher it does nothing. First, this process ignores all stop signals except SIGINT: torchrun sends
    SIGTERM to the other ranks when one has left, and this signal must not change their exit status. Then local rank 0
    ends a torchrun that would restart the job (--max-restarts), because torchrun takes every status other than 0 as a
    failure.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    if threading.current_thread() is threading.main_thread():
        for number in set(STOP_SIGNALS) - {signal.SIGINT}:
            # Not a Python handler: the interpreter removes those at exit, and then the default would end the process.
            signal.signal(number, signal.SIG_IGN)
    most, so_far = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    if so_far >= most or os.environ.get("LOCAL_RANK") != "0":
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if b"torchrun" in command or b"torch.distributed.run" in command:
        os.kill(parent, signal.SIGTERM)  # torchrun forwards it to the other processes, which ignore it by now
