"""Names the rank that a run hangs on, and ends the run so that its launcher can start it again.

A rank that stands still takes all others with it: each waits for it in a collective, and none can say for whom. So each
rank tells the others now and then that it lives, behind which step it is, whether it gets on and, once it has waited
for long, where in the code it stands. Two threads beside training do that; a step costs them one assignment, and the
device is not asked.
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

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from moco.distributed import on_rank_zero, world_size
from moco.runtime.stdio import log

HUNG = os.EX_UNAVAILABLE  # 69

_PACKAGE = Path(__file__).parents[1]
_BEATS = 12  # signs of life within the time after which a rank counts as hung
_SILENT = 4  # so many missed: no sign of life


@dataclass(frozen=True)
class Sign:
    """What is known of a rank."""

    done: int  # steps; -1: not known
    place: str  # where in the code it stands; "" while that is of no interest
    waits: bool  # it stands where ranks wait for each other: in a step, for its result, or in a collective
    silent: float = 0.0  # seconds since its last sign of life, if that is suspiciously long


def place(thread: int) -> tuple[str, bool]:
    """The line of this package that a thread executes or waits in, and whether ranks wait for each other there."""
    frame = sys._current_frames().get(thread)
    ours = [each for each in traceback.extract_stack(frame) if Path(each.filename).is_relative_to(_PACKAGE)]
    if frame is None or not ours:
        return "", False
    files = {Path(each.filename).name for each in ours}
    waits = any(each.name == "train_step" for each in ours) or bool(files & {"distributed.py", "finite.py"})
    file = Path(ours[-1].filename).relative_to(_PACKAGE.parent).as_posix()
    return f"{file}:{ours[-1].lineno} ({ours[-1].name})", waits


def report(signs: Sequence[Sign], minutes: float) -> str:
    """One sentence that names the ranks which the others wait for.

    Those are the ranks that give no sign of life; if all do, those that are steps behind the others; if none is, those
    that stand outside of the step and of collectives, as at a disk that does not answer. Where all stand alike none
    can be told from the others, and all are named.

    Args:
        signs: of each rank.
        minutes: for which nothing was finished.
    """
    ranks = range(len(signs))
    hung = [each for each in ranks if signs[each].silent]
    hung = hung or [each for each in ranks if signs[each].done < max(sign.done for sign in signs)]
    hung = hung or [each for each in ranks if not signs[each].waits]
    named = hung or list(ranks)
    others = [each for each in ranks if each not in named]
    who = f"rank{'s' * (len(named) > 1)} {_list(named)} hang{'s' * (len(named) == 1)}"
    sentence = f"{who}: nothing was finished for {minutes:.3g} minutes; {_where(signs, named)}"
    if others:
        sentence += f"; the others wait, {_where(signs, others)}"
    return (
        f"{sentence} (status {HUNG}; the same command goes on from the last checkpoint; if a step or a batch does "
        "take that long, raise hang_after)"
    )


def _list(ranks: Sequence[int], most: int = 8) -> str:
    return ", ".join(str(each) for each in ranks[:most]) + (f" and {len(ranks) - most} more" * (len(ranks) > most))


def _where(signs: Sequence[Sign], ranks: Sequence[int]) -> str:
    """What is known of these ranks, those that stand alike together."""
    alike: dict[str, list[int]] = {}
    for each in ranks:
        sign = signs[each]
        state = f"no sign of life for {sign.silent:.0f} s" if sign.silent else f"at {sign.place or 'an unknown place'}"
        alike.setdefault(f"behind step {sign.done}, {state}" if sign.done >= 0 else state, []).append(each)
    return "; ".join(f"rank{'s' * (len(of) > 1)} {_list(of)} {state}" for state, of in alike.items())


def rendezvous_store() -> Store | None:
    """Where the ranks of this attempt leave their signs: torchrun's store, over a connection of our own.

    Collective. None for one process, and for a process group that was not announced in the environment.
    """
    if world_size() == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    attempt = on_rank_zero(time.time_ns)  # signs of an attempt before this one are none
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=10)
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    return PrefixStore(f"moco/watch/{attempt}", store)


class Watchdog:
    """Ends this process with status 69 when nothing was finished for too long, naming the ranks that hang.

    In use as a context around all that a run does. What counts is a step, or a part of other work (`heartbeat`), of any
    rank: while one is busy alone the others wait for it, and that is no hang. Of the living ranks the lowest speaks. It
    is `os._exit` that ends the process: a thread that waits in a collective hears no exception. What is being written
    then has no checkpoint's name yet.

    Args:
        minutes: how long a step, or a part of other work, may take; 0: nothing is watched.
        store: where ranks meet, see `rendezvous_store`; None: this rank knows of itself only.
        rank, world: this one, of how many.
    """

    def __init__(self, minutes: float, store: Store | None = None, rank: int = 0, world: int = 1) -> None:
        self._limit, self._store = 60 * minutes, store
        self._rank, self._world = (rank, world) if store is not None else (0, 1)
        self._every = min(5.0, self._limit / _BEATS)
        self._done, self._parts, self._paused, self._idle = 0, 0, False, 0.0
        self._elsewhere = 0  # how often others were seen to get on while this rank was idle
        self._known: list[tuple[int, int]] = []  # what others had done when they were last asked; []: they were not
        self._over = threading.Event()
        self._thread = 0
        self._signs = [(Sign(-1, "", False), -1, 0.0)] * self._world  # each rank's, which beat it was, when it changed

    def finished(self, done: int) -> None:
        """So many steps are done."""
        self._done = done
        self.heartbeat()

    def heartbeat(self, *_: object) -> None:
        """A part of some other work is done: a batch of an evaluation, a picture that was read; takes any arguments."""
        self._parts += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that takes as long as it takes and gives no sign: a download by somebody else's code."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> "Watchdog":
        self._thread = threading.get_ident()
        if self._limit:
            for target in (self._count, self._talk)[: 1 + (self._store is not None)]:
                threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _count(self) -> None:
        """Adds up the time in which nothing was finished. It never asks the store, which may not answer."""
        seen, before = (0, 0), time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            # No more than the wait: a process that was stopped itself (Ctrl-Z) has not been waiting for anybody.
            self._idle += min(now - before, 2 * self._every)
            before = now
            now_seen = (self._parts, self._elsewhere)
            if now_seen != seen or self._paused:
                seen, self._idle = now_seen, 0.0
            if self._idle > self._limit:
                self._leave()

    def _talk(self) -> None:
        """Leaves this rank's sign; reads the others' once there is reason to."""
        assert self._store is not None
        beat = 0
        while not self._over.is_set():
            beat += 1
            reason = self._idle > self._limit / 2
            try:
                where, waits = place(self._thread) if reason else ("", False)
                sign = [beat, self._done, self._parts + self._paused * beat, where, waits]
                self._store.set(str(self._rank), json.dumps(sign))
                if reason:
                    self._read()
                else:
                    self._known = []
            except Exception:  # no store, no answer: to this rank the others are silent, which is what it will say
                pass
            self._over.wait(self._every)

    def _read(self) -> None:
        assert self._store is not None
        now = time.monotonic()
        self._signs = [(sign, beat, at or now) for sign, beat, at in self._signs]  # silent from here on, if at all
        others = []
        for other, text in enumerate(self._store.multi_get([str(each) for each in range(self._world)])):
            beat, done, parts, where, waits = json.loads(text)
            others.append((done, parts))
            if beat != self._signs[other][1]:
                self._signs[other] = (Sign(done, where, waits), beat, now)
        if self._known and others != self._known:
            self._elsewhere += 1
        self._known = others

    def _leave(self) -> None:
        now = time.monotonic()
        signs = []
        for sign, _, at in self._signs:
            silent = now - at if at else self._limit
            signs.append(Sign(sign.done, sign.place, sign.waits, silent * (silent > _SILENT * self._every)))
        signs[self._rank] = Sign(self._done, *place(self._thread))
        if any(not sign.silent for sign in signs[: self._rank]):
            time.sleep(_SILENT * self._every)  # torchrun ends all once one has left: a lower rank must have spoken
        elif not self._over.is_set():
            log(f"moco: {report(signs, self._limit / 60)}")
        if not self._over.is_set():  # it has come back to life, or is on its way out
            os._exit(HUNG)
