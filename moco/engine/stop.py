"""Leaving a run before its end without losing a step: signals, the time limit, and the status of the process.

Nothing here needs torch: commands know of `Stopped` before there is work to do.
"""

import os
import signal
import threading
import time
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


class Stopped(Exception):
    """The run has stopped before its end, with everything saved; its message is one sentence."""

    def __init__(self, reason: Reason, done: int, total: int) -> None:
        self.status = INTERRUPTED if reason is Reason.SIGINT else PREEMPTED
        by = "the time limit stop_after" if reason is Reason.TIME_LIMIT else reason.name
        super().__init__(
            f"stopped by {by} behind step {done} of {total}, which is saved; the same command goes on from there "
            f"(status {self.status})"
        )


class Stop:
    """Hears SIGTERM, SIGUSR1 and SIGINT in place of dying of them, and watches the time limit.

    In use as a context. A second SIGINT raises KeyboardInterrupt at once. A signal that the process was started to
    ignore (nohup) stays ignored, and outside the main thread, where Python allows no handler, only the time counts.

    Args:
        minutes: the time limit, counted from now; 0: none.
        stay: behind a `Stopped` be deaf to SIGTERM and SIGUSR1 to the end of the process: torchrun sends SIGTERM to
            all other ranks once one has left, and that must not change the status with which the slower ones leave.
    """

    def __init__(self, minutes: float, stay: bool = False) -> None:
        self._until = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._stay = stay
        self._heard = Reason.NONE
        self._before: dict[signal.Signals, Any] = {}

    def reason(self) -> Reason:
        """Why this process wants to stop by now; NONE while it does not."""
        late = Reason.TIME_LIMIT if time.monotonic() >= self._until else Reason.NONE
        return max(self._heard, late)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        leaving = self._stay and kind is Stopped
        if leaving:
            _stop_torchrun()
        for number, handler in self._before.items():
            # Not `_hear`: Python takes its handlers away while it shuts down, and the default would strike then.
            signal.signal(number, signal.SIG_IGN if leaving and number != signal.SIGINT else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._heard is Reason.SIGINT:
            raise KeyboardInterrupt
        self._heard = max(self._heard, Reason[signal.Signals(number).name])


def _stop_torchrun() -> None:
    """Ends a torchrun that would start the processes again (--max-restarts), for to it a stopped run has failed."""
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
