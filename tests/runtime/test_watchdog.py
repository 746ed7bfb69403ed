"""Who is named when a run hangs. That ranks really are found is in tests/faults/test_ranks.py."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moco.config import config_dir
from moco.runtime.watchdog import HUNG, Sign, Watchdog, place, report

STEP = "moco/training/step.py:90 (train_step)"
LOADER = "moco/training/loop.py:48 (fit)"


def waiting(done: int = 7) -> Sign:
    return Sign(done, STEP, waits=True)


def named(signs: list[Sign]) -> str:
    """The ranks that the sentence opens with."""
    found = re.match(
        r"ranks? ([\d, ]+(?: and \d+ more)?) hangs?: nothing was finished for 2 minutes; ", report(signs, 2)
    )
    assert found is not None
    return found[1]


def test_a_silent_rank_is_named_before_one_that_is_behind() -> None:
    assert named([waiting(), Sign(7, "", False, silent=90.0), Sign(6, STEP, waits=True)]) == "1"


def test_a_rank_that_is_behind_is_named_before_one_that_stands_elsewhere() -> None:
    assert named([waiting(), Sign(7, LOADER, waits=False), waiting(6)]) == "2"


def test_the_rank_that_waits_for_no_other_is_named() -> None:
    assert named([waiting(), waiting(), Sign(7, LOADER, waits=False)]) == "2"
    assert named([Sign(7, LOADER, waits=False), waiting(), Sign(7, LOADER, waits=False)]) == "0, 2"


def test_where_all_stand_alike_all_are_named() -> None:
    assert named([waiting(), waiting()]) == "0, 1"
    assert "the others" not in report([waiting(), waiting()], 2)


def test_the_sentence_says_where_everybody_is_those_alike_together() -> None:
    silent = Sign(7, "", False, silent=34.2)
    assert report([waiting(), silent, waiting(), waiting(8)], 0.5) == (
        "rank 1 hangs: nothing was finished for 0.5 minutes; rank 1 behind step 7, no sign of life for 34 s; the "
        f"others wait, ranks 0, 2 behind step 7, at {STEP}; rank 3 behind step 8, at {STEP} (status 69; the same "
        "command goes on from the last checkpoint; if a step or a batch does take that long, raise hang_after)"
    )


def test_of_a_rank_that_was_never_heard_no_step_is_said() -> None:
    sentence = report([Sign(-1, "", False, silent=60.0), waiting()], 1)
    assert "minutes; rank 0 no sign of life for 60 s; the others wait, rank 1 behind step 7" in sentence


def test_of_many_ranks_some_are_listed() -> None:
    assert named([Sign(7, "", False, silent=9.0)] * 20) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_the_place_is_the_innermost_line_of_ours() -> None:
    """A thread that waits in a store of torch's, called by this package, and one that never was in it."""
    watch, over = Watchdog(0.0), threading.Event()

    def stand() -> None:
        with watch.paused():
            over.wait(20)

    thread = threading.Thread(target=stand)
    thread.start()
    try:
        assert place(thread.ident or 0) == ("", False)  # inside of `with` nothing of ours is on the stack
    finally:
        over.set()
        thread.join()
    assert place(thread.ident or 0) == ("", False)  # a thread that is gone


def test_places_inside_of_a_collective_count_as_waiting() -> None:
    """Rank 0 of two waits in `mean_over_ranks`."""
    code = """
import sys, threading, time, torch, torch.distributed as dist
from moco.distributed import mean_over_ranks
from moco.runtime.watchdog import place
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
if sys.argv[2] == "1":
    time.sleep(60)
main = threading.get_ident()
def look():
    time.sleep(1)
    print(*place(main), flush=True)
threading.Thread(target=look, daemon=True).start()
mean_over_ranks(torch.ones(3))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)}
    store = f"/tmp/moco_watch_{os.getpid()}"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, store, rank], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        assert processes[0].stdout is not None
        line = processes[0].stdout.readline()
    finally:
        for each in processes:
            each.kill()
            each.communicate()
        Path(store).unlink(missing_ok=True)
    assert re.fullmatch(r"moco/distributed\.py:\d+ \(mean_over_ranks\) True\n", line)


ALONE = """
import sys, time
from moco.runtime.watchdog import Watch
with Watch(float(sys.argv[1]) / 60) as watch:
    for done in range(1, 9):
        time.sleep(0.4)
        watch.finished(done)
    for batch in range(8):
        time.sleep(0.4)
        watch.alive()
    with watch.paused():
        time.sleep(3)
    print("evaluated", flush=True)
    time.sleep(float(sys.argv[2]))
print("over", flush=True)
"""


def alone(limit: float, sleep: float) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)}
    command = [sys.executable, "-c", ALONE, str(limit), str(sleep)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_process_alone_is_watched_too_and_is_let_be_while_steps_or_batches_go_on_or_it_downloads() -> None:
    process = alone(2.4, 60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == HUNG == 69
    assert out == "evaluated\n"
    assert err.startswith("moco: rank 0 hangs: nothing was finished for 0.04 minutes; rank 0 behind step 8, at ")
    assert len(err.splitlines()) == 1


def test_a_process_that_was_stopped_and_goes_on_has_not_hung() -> None:
    """As after Ctrl-Z and fg: the time that it was stopped for does not count."""
    process = alone(2.4, 0.2)
    assert process.stdout is not None
    assert process.stdout.readline() == "evaluated\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "over\n"
    assert process.returncode == 0


def test_zero_watches_nothing() -> None:
    before = threading.active_count()
    with Watchdog(0.0) as watch:
        watch.finished(1)
        assert threading.active_count() == before


def test_ranks_read_each_other_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two watches of one store in one process: rank 1 is told to say nothing more, rank 0 names it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    left: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append(status))
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    watches = [Watchdog(0.02, store, rank, 2) for rank in (0, 1)]
    with watches[0], watches[1]:
        for watch in watches:
            watch.finished(3)
        time.sleep(0.4)
        watches[1].__exit__()
        until = time.monotonic() + 20
        while not left and time.monotonic() < until:
            time.sleep(0.05)
    assert left[0] == HUNG
    assert said[0].startswith(
        "moco: rank 1 hangs: nothing was finished for 0.02 minutes; rank 1 behind step 3, no sign"
    )


@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_that_gets_on_alone_is_waited_for(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 evaluates for three times the limit, in batches, while rank 0 has nothing left to do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append(status))
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    watches = [Watchdog(0.02, store, rank, 2) for rank in (0, 1)]
    with watches[0], watches[1]:
        until = time.monotonic() + 3.6
        while time.monotonic() < until:
            time.sleep(0.1)
            if busy:
                watches[1].heartbeat()
    assert bool(left) != busy
