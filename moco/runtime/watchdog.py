"""Detect a hang, name the rank that causes it, and end the run so that its launcher can restart it.

When one rank hangs, the others block in a collective and cannot tell which rank they are waiting for. Therefore a
thread of each rank publishes the rank's state every few seconds, in torchrun's store: how many steps and how many other
parts of work the rank has finished and, after a long time without progress, the line of code that the rank is at. A
second thread measures the time without progress and ends the process. A training step only makes two assignments for
these threads, and does not wait for the device.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from moco.config.base import StoppableConfig
from moco.distributed import on_rank_zero, rank, world_size
from moco.runtime.device import compute_context
from moco.runtime.stdio import print_error

HUNG = os.EX_UNAVAILABLE  # 69
LONGEST_WAIT = 60.0 * 24 * 365  # minutes that a process group waits with hang_after=0

_PACKAGE = Path(__file__).parents[1]
_CHECKS = 12  # fewest checks, and fewest published states, within the time limit
_MISSED = 4  # published states that a rank may miss before it counts as silent


@dataclass(frozen=True)
class RankState:
    """What is known about a rank."""

    done: int  # number of steps; -1: unknown
    location: str  # the line of code that it is at; "" if unknown
    waiting: bool  # the line is in a training step or a collective, where ranks wait for each other
    silent_for: float = 0.0  # seconds since its last published state; 0 unless it has missed several


def code_location(thread: int) -> tuple[str, bool]:
    """Return the innermost line of this package in a thread, and whether ranks wait for each other there."""
    frame = sys._current_frames().get(thread)
    ours = [each for each in traceback.extract_stack(frame) if Path(each.filename).is_relative_to(_PACKAGE)]
    if frame is None or not ours:
        return "", False
    file = Path(ours[-1].filename).relative_to(_PACKAGE.parent).as_posix()
    # In `moco.distributed`, only the innermost line counts: while a function of that module calls other code, as
    # `in_lockstep` does to read a batch, the others wait for this rank.
    waiting = file == "moco/distributed.py" or any(each.name == "train_step" for each in ours)
    return f"{file}:{ours[-1].lineno} ({ours[-1].name})", waiting


def hang_message(states: Sequence[RankState], minutes: float) -> str:
    """Return a sentence that names the ranks for which the others wait, after `minutes` without progress.

    The sentence names the silent ranks. If no rank is silent, it names the ranks with fewer steps than another rank. If
    all ranks have the same number of steps, it names those that are neither in a step nor in a collective, for example
    at a disk that does not respond. If there are no such ranks either, it names all ranks.
    """
    ranks = range(len(states))
    hung = [each for each in ranks if states[each].silent_for]
    hung = hung or [each for each in ranks if states[each].done < max(state.done for state in states)]
    hung = hung or [each for each in ranks if not states[each].waiting] or list(ranks)
    others = [each for each in ranks if each not in hung]
    waiting = f"; the others wait, {_describe(states, others)}" if others else ""
    return (
        f"{_list(hung)} hang{'s' * (len(hung) == 1)}: no progress for {minutes:.3g} minutes; {_describe(states, hung)}"
        f"{waiting} (status {HUNG}; run the same command again to resume from the last checkpoint; if a step or a "
        "batch can take that long, raise hang_after)"
    )


def _list(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" * (len(ranks) > 8)
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def _describe(states: Sequence[RankState], ranks: Sequence[int]) -> str:
    """Return the states of these ranks; ranks in the same state are listed together."""
    groups: dict[str, list[int]] = {}
    for each in ranks:
        state = states[each]
        place = f"at {state.location or 'an unknown line'}"
        text = f"silent for {state.silent_for:.0f} s" if state.silent_for else place
        groups.setdefault(f"after step {state.done}, {text}" if state.done >= 0 else text, []).append(each)
    return "; ".join(f"{_list(each)} {text}" for text, each in groups.items())


def rendezvous_store() -> Store | None:
    """Return a connection to torchrun's store, where the ranks publish their states. Every rank must call it.

    Returns None for one process, and for a process group that was not configured through the environment.
    """
    if world_size() == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    attempt = on_rank_zero(time.time_ns)  # states of an earlier attempt must not be read
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return PrefixStore(f"moco/watch/{attempt}", store)


class Watchdog:
    """Ends this process with status 69 after too long without progress, and names the ranks that hang.

    Use it as a context manager around the run. Progress is a step, or a part of other work (`heartbeat`), of any rank:
    if one rank works while the others wait for it, that is not a hang. The lowest rank that is not silent prints the
    message. The process ends by `os._exit`, because a thread that waits in a collective receives no exception. This
    damages no file: a file that is being written has not replaced the earlier one yet (`atomic_write`).

    Args:
        minutes: time limit for a step, or a part of other work; 0: no watchdog.
        store: see `rendezvous_store`; None: this rank does not know about other ranks.
    """

    def __init__(self, minutes: float, store: Store | None = None, rank: int = 0, world: int = 1) -> None:
        self._limit, self._store = 60 * minutes, store
        self._rank, self._world = (rank, world) if store is not None else (0, 1)
        self._interval = min(5.0, self._limit / _CHECKS)
        self._done, self._parts, self._paused, self._idle = 0, 0, False, 0.0
        self._progress_elsewhere = 0  # how often `_read` found that a rank had made progress
        self._progress: list[tuple[int, int]] = []  # (steps, parts) of each rank, as last read; []: not read
        self._over = threading.Event()
        self._thread = 0
        # per rank: its state, the number of its last publication, and when that was read (0: never)
        self._states = [(RankState(-1, "", False), -1, 0.0)] * self._world

    def finished(self, done: int) -> None:
        """Record that `done` steps are finished."""
        self._done = done
        self.heartbeat()

    def heartbeat(self, *_: object) -> None:
        """Record that a part of other work is finished, such as a batch of an evaluation. Ignores its arguments."""
        self._parts += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the time limit during work that cannot report progress, such as a download by another library."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> "Watchdog":
        self._thread = threading.get_ident()
        if self._limit:
            threading.Thread(target=self._watch, daemon=True).start()
        if self._limit and self._store is not None:
            threading.Thread(target=self._publish, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        """Measure the time without progress; end the process after the limit. Never reads the store, which may hang."""
        seen, before = (0, 0), time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            # At most two intervals: a process that was itself stopped (Ctrl-Z) has not waited for others.
            self._idle += min(now - before, 2 * self._interval)
            before = now
            progress = (self._parts, self._progress_elsewhere)
            if progress != seen or self._paused:
                seen, self._idle = progress, 0.0
            if self._idle > self._limit:
                self._exit()

    def _publish(self) -> None:
        """Write this rank's state to the store; once this rank has long been idle, read the others' states too."""
        assert self._store is not None
        number = 0  # of publications
        while not self._over.is_set():
            number += 1
            idle = self._idle > self._limit / 2
            try:
                location, waiting = code_location(self._thread) if idle else ("", False)
                parts = self._parts + self._paused * number  # while paused, each publication counts as progress
                state = [number, self._done, parts, location, waiting]
                self._store.set(str(self._rank), json.dumps(state))
                self._progress = self._read() if idle else []
            except Exception:  # the store does not respond: the other ranks then count as silent
                pass
            self._over.wait(self._interval)

    def _read(self) -> list[tuple[int, int]]:
        """Read the states of all ranks and return their progress."""
        assert self._store is not None
        now = time.monotonic()
        self._states = [(state, number, at or now) for state, number, at in self._states]  # silence counts from here
        progress = []
        for other, text in enumerate(self._store.multi_get([str(each) for each in range(self._world)])):
            number, done, parts, location, waiting = json.loads(text)
            progress.append((done, parts))
            if number != self._states[other][1]:
                self._states[other] = (RankState(done, location, waiting), number, now)
        if self._progress and progress != self._progress:
            self._progress_elsewhere += 1
        return progress

    def _exit(self) -> None:
        now = time.monotonic()
        states = []
        for state, _, at in self._states:
            silent = now - at if at else self._limit
            silent_for = silent if silent > _MISSED * self._interval else 0.0
            states.append(RankState(state.done, state.location, state.waiting, silent_for))
        states[self._rank] = RankState(self._done, *code_location(self._thread))
        if any(not state.silent_for for state in states[: self._rank]):
            # torchrun ends all ranks once one has left: let the lower rank print its message first.
            time.sleep(_MISSED * self._interval)
        elif not self._over.is_set():
            print_error(f"moco: {hang_message(states, self._limit / 60)}")
        if not self._over.is_set():  # otherwise the run has ended in the meantime
            os._exit(HUNG)


@contextmanager
def watched_context(config: StoppableConfig) -> Iterator[tuple[torch.device, Watchdog]]:
    """Enter `compute_context` and start a watchdog with the limit `hang_after`; yield the device and the watchdog."""
    # In minutes. The watchdog should report before the process group, which needs a finite timeout.
    timeout = max(10.0, config.hang_after + 5) if config.hang_after else LONGEST_WAIT
    with (
        compute_context(config, timeout) as device,
        Watchdog(config.hang_after, rendezvous_store(), rank(), world_size()) as watchdog,
    ):
        yield device, watchdog
