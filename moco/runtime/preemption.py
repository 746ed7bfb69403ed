"""Leaving a run before its end without losing a step: signals, the time limit, and the status of the process.

Nothing here needs torch: commands know of `Preempted` before there is work to do.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

PREEMPTED = os.EX_TEMPFAIL  # 75: "try again later", as the same command does
INTERRUPTED = 130  # what a shell calls ended by Ctrl-C; a loop in a shell script ends too


class Reason(IntEnum):
    """Why a run stops before its end. Ranks that have different ones all act on the highest."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    SIGINT = 4
    NOT_SAVED = 5
    """the last checkpoint could not be written"""


class Preempted(Exception):
    """The run has stopped before its end, with everything saved; its message is one sentence.

    Args:
        reason: why.
        done, total: how many steps are saved, of how many; None: no step of this attempt was begun.
    """

    def __init__(self, reason: Reason, done: int | None = None, total: int = 0) -> None:
        self.status = INTERRUPTED if reason is Reason.SIGINT else PREEMPTED
        by = "the time limit stop_after" if reason is Reason.TIME_LIMIT else reason.name
        if done is None:
            what = f"stopped by {by} before its first step: there is nothing new to save; the same command starts again"
        else:
            what = f"stopped by {by} behind step {done} of {total}, which is saved; the same command goes on from there"
        super().__init__(f"{what} (status {self.status})")


class PreemptionHandler:
    """Hears SIGTERM, SIGUSR1 and SIGINT in place of dying of them, and watches the time limit.

    In use as a context, as wide as can be: what is heard while torch is imported or data are opened is remembered and
    looked at once the ranks can act alike. SIGINT waits for the step's end where there are steps, see `stepping`;
    before and behind them, and where it is the second one, it raises KeyboardInterrupt at once. A signal that the
    process was started to ignore (nohup) stays ignored, and outside the main thread, where Python allows no handler,
    only the time counts.

    Args:
        minutes: the time limit, counted from now; 0: none.
    """

    def __init__(self, minutes: float) -> None:
        self._until = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._received, self._stepping = Reason.NONE, False
        self._before: dict[signal.Signals, Any] = {}

    def signal_received(self) -> Reason:
        """The signal that has arrived so far; the time limit does not count."""
        return self._received

    def reason(self) -> Reason:
        """Why this process wants to stop by now; NONE while it does not."""
        late = Reason.TIME_LIMIT if time.monotonic() >= self._until else Reason.NONE
        return max(self._received, late)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """While steps are taken: the first SIGINT is remembered as well."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Preempted:
            prevent_restart()
        for number, handler in self._before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._received is Reason.SIGINT or not self._stepping):
            raise KeyboardInterrupt
        self._received = max(self._received, Reason[signal.Signals(number).name])


def prevent_restart() -> None:
    """Before an end that is wanted, or that the same processes, started again at once, would come to once more.

    Without a launcher does nothing. Makes this process deaf to SIGTERM and SIGUSR1: torchrun sends SIGTERM to all other
    ranks once one has left, and that must not change the status with which the slower ones leave. Then ends a torchrun
    that would start them again (--max-restarts), for to it every status but 0 has failed.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # No handler of ours: Python takes those away while it shuts down, and the default would strike then.
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
        os.kill(parent, signal.SIGTERM)  # which it hands on to the other processes; those are deaf to it by now
