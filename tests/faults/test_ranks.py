"""Several processes of one run: another number of them from turn to turn, one that is told to stop, one that hangs."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moco.data.loader import Plan
from moco.engine.stop import PREEMPTED
from moco.engine.watch import HUNG
from tests.faults import runs
from tests.faults.runs import LONG, STEPS

CHANGES = 20 if LONG else 3
WORLDS = (1, 4, 2)


def queued_as_planned(run: Path) -> None:
    """The queue holds the samples of the last steps in the order that one process enqueues them."""
    state = runs.newest(run)
    method, step = state["method"], state["step"]
    plan = Plan(1297, 64, STEPS // 20, seed=0)
    seen = np.concatenate([index for _, (_, index) in zip(range(step), plan.samples(0), strict=False)])
    size = len(method["queue.index"])
    expected = np.full(size, -1)
    for position in range(max(0, len(seen) - size), len(seen)):
        expected[position % size] = seen[position]
    assert method["queue.index"].tolist() == expected.tolist()


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes_and_ends_as_on_one(tmp_path: Path) -> None:
    """Each turn is ended by SIGTERM on a random rank. Samples and queue order are equal, weights up to rounding.

    A small learning rate: what rounding grows to is a property of training, not of the change.
    """
    slow = "optim.lr=0.003"
    runs.to_the_end(tmp_path / "whole", slow)
    changes, finished, furthest = 0, 0, 0.0
    while changes < CHANGES:
        run, turn = tmp_path / f"run{finished}", 0
        while changes < CHANGES and runs.saved(run) < STEPS - 12:
            chance, world = runs.chance(changes), WORLDS[turn % len(WORLDS)]
            processes = runs.start(run, slow, world=world)
            assert runs.until_saved(run, runs.saved(run) + chance.randint(2, 6), processes), runs.said(run)
            os.kill(processes[chance.randrange(world)].pid or 0, signal.SIGTERM)
            assert runs.wait(processes) == [PREEMPTED] * world, runs.said(run)
            assert runs.newest(run)["world_size"] == world
            queued_as_planned(run)
            turn += 1
            changes += 1  # the next turn has another number
        runs.to_the_end(run, slow, world=WORLDS[turn % len(WORLDS)])
        queued_as_planned(run)
        furthest = max(furthest, runs.close_end(run, tmp_path / "whole", tolerance=1e-2))
        losses = [np.array(runs.records(each)) for each in (run, tmp_path / "whole")]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
        finished += 1
    print(f"faults: {changes} changes of the number of processes in {finished} runs, furthest weight {furthest:.1e}")


@pytest.mark.slow
def test_a_signal_to_one_of_four_processes_stops_all_with_their_status(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if LONG else (signal.SIGTERM,):
        run = tmp_path / number.name
        processes = runs.start(run, world=4)
        assert runs.until_saved(run, 3, processes), runs.said(run)
        os.kill(processes[2].pid or 0, number)
        status = 130 if number == signal.SIGINT else PREEMPTED
        assert runs.wait(processes) == [status] * 4, runs.said(run)
        assert f"stopped by {number.name} behind step {runs.saved(run)} of {STEPS}, which is saved" in runs.said(run)


def stuck_in_data() -> None:
    """Rank 1's disk does not answer: its ninth batch never comes."""
    from moco.stages import pretrain

    real = vars(pretrain)["batches"]

    def stuck(*arguments: Any) -> Any:
        for number, batch in enumerate(real(*arguments)):
            if number == 8 and os.environ["RANK"] == "1":
                time.sleep(1000)
            yield batch

    vars(pretrain)["batches"] = stuck


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "data"] if LONG else ["stopped"])
def test_a_rank_that_hangs_is_named_and_the_run_ends_within_the_configured_time(how: str, tmp_path: Path) -> None:
    """Rank 1 of two is really stopped, or waits for a picture for ever."""
    run = tmp_path / "run"
    given = ["checkpoint.every_steps=3"]
    processes = runs.start(run, *given, "hang_after=0.15", world=2, prepare=stuck_in_data if how == "data" else None)
    assert runs.until_saved(run, 6, processes), runs.said(run)
    began = time.monotonic()
    if how == "stopped":
        os.kill(processes[1].pid or 0, signal.SIGSTOP)
    processes[0].join(120)
    took = time.monotonic() - began
    assert processes[0].exitcode == HUNG, runs.said(run)
    (line,) = [each for each in runs.said(run).splitlines() if each.startswith("moco: rank")]
    assert line.startswith("moco: rank 1 hangs: no step was finished for 0.15 minutes; rank 1 behind step ")
    assert "the others wait, rank 0 behind step" in line
    if how == "stopped":
        assert "rank 1 behind step" in line
        assert "no sign of life for" in line
    else:
        assert "rank 1 behind step 8, at moco/engine/loop.py:" in line
        assert "(fit)" in line
    print(f"faults: a rank that hangs ({how}) is named {took:.1f} s after, hang_after=9 s")
    assert took < 60
    runs.kill(processes)
    runs.to_the_end(run, *given, world=2)  # the same command goes on
