"""The ranks that the watchdog names when a run hangs. tests/faults/test_ranks.py has real hangs."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moco.data.workers import loaded, make_loader
from moco.distributed import in_lockstep, mean_over_ranks, rank
from moco.runtime.watchdog import HUNG, RankState, Watchdog, code_location, hang_message
from tests.distributed.launch import run_ranks

STEP = "moco/training/step.py:90 (train_step)"
LOADER = "moco/training/trainer.py:48 (_loop)"


def waiting(done: int = 7) -> RankState:
    return RankState(done, STEP, waiting=True)


def named(states: list[RankState]) -> str:
    """Return the ranks at the beginning of the message."""
    message = hang_message(states, 2)
    found = re.match(r"ranks? ([\d, ]+(?: and \d+ more)?) hangs?: no progress for 2 minutes; ", message)
    assert found is not None
    return found[1]


def test_a_silent_rank_is_named_before_a_rank_with_fewer_steps() -> None:
    assert named([waiting(), RankState(7, "", False, silent_for=90.0), RankState(6, STEP, waiting=True)]) == "1"


def test_a_rank_with_fewer_steps_is_named_before_a_rank_outside_the_step() -> None:
    assert named([waiting(), RankState(7, LOADER, waiting=False), waiting(6)]) == "2"


def test_the_rank_outside_the_step_is_named() -> None:
    assert named([waiting(), waiting(), RankState(7, LOADER, waiting=False)]) == "2"
    assert named([RankState(7, LOADER, waiting=False), waiting(), RankState(7, LOADER, waiting=False)]) == "0, 2"


def test_all_ranks_in_the_same_state_are_named() -> None:
    assert named([waiting(), waiting()]) == "0, 1"
    assert "the others" not in hang_message([waiting(), waiting()], 2)


def test_the_message_lists_ranks_in_the_same_state_together() -> None:
    silent = RankState(7, "", False, silent_for=34.2)
    assert hang_message([waiting(), silent, waiting(), waiting(8)], 0.5) == (
        "rank 1 hangs: no progress for 0.5 minutes; rank 1 after step 7, silent for 34 s; the others wait, "
        f"ranks 0, 2 after step 7, at {STEP}; rank 3 after step 8, at {STEP} (status 69; run the same command again to "
        "resume from the last checkpoint; if a step or a batch can take that long, raise hang_after)"
    )


def test_a_rank_without_any_heartbeat_has_no_step() -> None:
    message = hang_message([RankState(-1, "", False, silent_for=60.0), waiting()], 1)
    assert "minutes; rank 0 silent for 60 s; the others wait, rank 1 after step 7" in message


def test_at_most_eight_ranks_are_listed() -> None:
    assert named([RankState(7, "", False, silent_for=9.0)] * 20) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_a_thread_outside_of_the_package_has_no_location() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(20,))
    thread.start()
    try:
        assert code_location(thread.ident or 0) == ("", False)
    finally:
        over.set()
        thread.join()
    assert code_location(thread.ident or 0) == ("", False)  # the thread has ended


class Slow:
    """Data that arrive late."""

    def __init__(self, over: threading.Event) -> None:
        self.over = over

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> int:
        self.over.wait(20)
        return row


def test_a_rank_whose_batch_does_not_arrive_is_not_waiting_for_the_others() -> None:
    over = threading.Event()
    batches = in_lockstep(loaded(make_loader(Slow(over), 0, range(1)), "data.workers"), torch.device("cpu"))
    thread = threading.Thread(target=next, args=(batches,))
    thread.start()
    try:
        time.sleep(0.5)
        location, is_waiting = code_location(thread.ident or 0)
    finally:
        over.set()
        thread.join()
    assert re.fullmatch(r"moco/data/workers\.py:\d+ \(loaded\)", location)
    assert not is_waiting


def location_of_a_waiting_rank() -> tuple[str, bool]:
    """Return the location of this process after half a second in `mean_over_ranks`, for which rank 1 is late."""
    time.sleep(2 * rank())
    found: list[tuple[str, bool]] = []
    observer = threading.Timer(0.5, lambda thread: found.append(code_location(thread)), [threading.get_ident()])
    observer.start()
    mean_over_ranks(torch.ones(3))
    observer.join()
    return found[0]


def test_a_line_inside_a_collective_counts_as_waiting() -> None:
    location, is_waiting = run_ranks(2, location_of_a_waiting_rank)[0]
    assert re.fullmatch(r"moco/distributed\.py:\d+ \(mean_over_ranks\)", location)
    assert is_waiting


SINGLE = """
import time
from moco.runtime.watchdog import Watchdog
with Watchdog(0.02) as watchdog:
    for done in range(1, 9):
        time.sleep(0.2)
        watchdog.finished(done)
    for batch in range(8):
        time.sleep(0.2)
        watchdog.heartbeat()
    with watchdog.paused():
        time.sleep(1.8)
    print("evaluated", flush=True)
    time.sleep(0.2)
    print("resumed", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_one_process_is_ended_only_without_steps_heartbeats_and_pauses() -> None:
    """The time for which it is stopped, as after Ctrl-Z and fg, does not count either."""
    command = [sys.executable, "-c", SINGLE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "evaluated\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert out == "resumed\n"
    assert process.returncode == HUNG == 69
    assert err.startswith("moco: rank 0 hangs: no progress for 0.02 minutes; rank 0 after step 8, at ")
    assert len(err.splitlines()) == 1


def test_zero_disables_the_watchdog() -> None:
    before = threading.active_count()
    with Watchdog(0.0) as watchdog:
        watchdog.finished(1)
        assert threading.active_count() == before


def test_ranks_read_each_other_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two watchdogs in one process share a store: rank 1 stops publishing, rank 0 names it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    left: list[int] = []
    printed: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append(status))
    monkeypatch.setattr("builtins.print", lambda text, **_: printed.append(text))
    watchdogs = [Watchdog(0.02, store, each, 2) for each in (0, 1)]
    with watchdogs[0], watchdogs[1]:
        for watchdog in watchdogs:
            watchdog.finished(3)
        time.sleep(0.4)
        watchdogs[1].__exit__()
        until = time.monotonic() + 20
        while not left and time.monotonic() < until:
            time.sleep(0.05)
    assert left[0] == HUNG
    assert printed[0].startswith("moco: rank 1 hangs: no progress for 0.02 minutes; rank 1 after step 3, silent for")


@pytest.mark.parametrize("busy", [True, False])
def test_progress_of_another_rank_is_not_a_hang(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 evaluates in batches for twice the limit while rank 0 waits."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append(status))
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    watchdogs = [Watchdog(0.02, store, each, 2) for each in (0, 1)]
    with watchdogs[0], watchdogs[1]:
        until = time.monotonic() + (2.4 if busy else 20)
        while time.monotonic() < until and not left:
            time.sleep(0.1)
            if busy:
                watchdogs[1].heartbeat()
    assert bool(left) != busy
