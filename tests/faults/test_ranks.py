"""Several processes of one run: their number changes, one receives a signal, one is killed, one hangs."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moco.data.plan import Plan
from moco.runtime.preemption import PREEMPTED
from moco.runtime.watchdog import HUNG
from tests.faults import runs
from tests.faults.runs import LONG, STEPS

CHANGES = 20 if LONG else 2
WORLDS = (1, 4, 2)


def queued_as_planned(run: Path) -> None:
    """Assert that the queue holds the samples of the last steps in the order of a single process."""
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
def test_a_run_resumes_on_another_number_of_processes_and_ends_as_on_one(tmp_path: Path) -> None:
    """SIGTERM on a random rank ends each attempt. Samples and queue order are equal, weights up to rounding.

    The learning rate is small, because training amplifies rounding errors.
    """
    slow = "optim.lr=0.003"
    runs.to_the_end(tmp_path / "reference", slow)
    changes, finished, furthest = 0, 0, 0.0
    while changes < CHANGES:
        run, turn = tmp_path / f"run{finished}", 0
        while changes < CHANGES and runs.saved(run) < STEPS - 12:
            random, world = runs.generator(changes), WORLDS[turn % len(WORLDS)]
            processes = runs.start(run, slow, world=world)
            assert runs.until_saved(run, runs.saved(run) + random.randint(2, 6), processes), runs.output(run)
            os.kill(processes[random.randrange(world)].pid or 0, signal.SIGTERM)
            assert runs.wait(processes) == [PREEMPTED] * world, runs.output(run)
            assert runs.newest(run)["world_size"] == world
            queued_as_planned(run)
            turn += 1
            changes += 1
        runs.to_the_end(run, slow, world=WORLDS[turn % len(WORLDS)])
        queued_as_planned(run)
        furthest = max(furthest, runs.close_end(run, tmp_path / "reference", tolerance=1e-2))
        losses = [np.array(runs.records(each)) for each in (run, tmp_path / "reference")]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
        finished += 1
    print(f"faults: {changes} changes of the number of processes in {finished} runs, furthest weight {furthest:.1e}")


@pytest.mark.slow
def test_a_signal_to_one_of_four_processes_stops_all_with_their_status(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if LONG else (signal.SIGTERM,):
        run = tmp_path / number.name
        processes = runs.start(run, world=4)
        assert runs.until_saved(run, 3, processes), runs.output(run)
        os.kill(processes[2].pid or 0, number)
        status = 130 if number == signal.SIGINT else PREEMPTED
        assert runs.wait(processes) == [status] * 4, runs.output(run)
        assert f"stopped by {number.name} after step {runs.saved(run)} of {STEPS}, which is saved" in runs.output(run)


def send_sigterm_in(where: str) -> None:
    """Rank 1 (at the export rank 0) sends itself SIGTERM when it calls this function, outside of training steps."""
    from moco.runtime import device
    from moco.training import build, live_evaluation, trainer

    module = next(each for each in (device, build, live_evaluation, trainer) if where in vars(each))
    real = vars(module)[where]

    def send(*arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == ("0" if where == "save_encoder" else "1"):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    vars(module)[where] = send


MOMENTS = {  # the function that is called then, and the exit status of both processes
    "before the ranks meet": ("pick_device", PREEMPTED),
    "while data are opened": ("open_sources", PREEMPTED),
    "while the model is made": ("build_method", PREEMPTED),
    "in the first evaluation": ("live_knn", PREEMPTED),
    "in the closing export": ("save_encoder", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(MOMENTS) if LONG else [*MOMENTS][:1] + [*MOMENTS][3:])
def test_a_signal_to_one_of_two_processes_outside_of_steps_stops_both(moment: str, tmp_path: Path) -> None:
    run, (where, status) = tmp_path / "run", MOMENTS[moment]
    given = ["evaluate.every_epochs=1", "evaluate.draws=2", "epochs=1"]
    processes = runs.start(run, *given, world=2, prepare=partial(send_sigterm_in, where))
    assert runs.wait(processes) == [status] * 2, runs.output(run)
    assert "Traceback" not in runs.output(run)
    assert (run / "encoder.safetensors").exists() == (status == 0)
    if status:
        (line,) = [each for each in runs.output(run).splitlines() if each.startswith("moco: ")]
        assert line.startswith("moco: stopped by SIGTERM before the first step")
        runs.to_the_end(run, *given, world=2)


def stop_in_an_epochs_last_step() -> None:
    """Rank 1, or a single process, sends itself SIGTERM in the 20th step, and must not start an evaluation then."""
    from moco.training import live_evaluation as live
    from moco.training import trainer as pretrain

    real, count = vars(pretrain)["train_step"], 0

    def send(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 20:
            vars(live)["live_knn"] = None
            if os.environ.get("RANK", "1") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    vars(pretrain)["train_step"] = send


@pytest.mark.slow
def test_a_stopped_run_saves_first_and_evaluates_after_the_restart(tmp_path: Path) -> None:
    run, reference, world = tmp_path / "run", tmp_path / "reference", 2 if LONG else 1
    given = ["evaluate.every_epochs=1", "evaluate.draws=2"]
    processes = runs.start(run, *given, world=world, prepare=stop_in_an_epochs_last_step)
    assert runs.wait(processes) == [PREEMPTED] * world, runs.output(run)
    assert "stopped by SIGTERM after step 20 of 40" in runs.output(run)
    for each in (run, reference):
        runs.to_the_end(each, *given, world=world)
    assert [each["step"] for each in runs.newest(run)["history"]] == [0, 20, 40]
    assert runs.newest(run)["history"] == runs.newest(reference)["history"]
    runs.same_end(run, reference)


def other_setting() -> None:
    os.environ["LEARNING_RATE"] = "0.3" if os.environ["RANK"] == "1" else "0.1"


@pytest.mark.slow
def test_ranks_with_different_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = runs.start(run, "optim.lr=${oc.env:LEARNING_RATE}", world=2, prepare=other_setting)
    assert runs.wait(processes) == [2, 2], runs.output(run)
    sentence = "rank 1 has another configuration than rank 0: optim.lr (0.3, on rank 0 0.1). Start the same command"
    (line,) = runs.output(run).splitlines()
    (other,) = run.with_name("run.1.log").read_text().splitlines()
    assert line.startswith(f"moco: {sentence}")
    assert other.startswith(f"moco (rank 1): {sentence}")
    assert not run.exists()


@pytest.mark.slow
def test_the_other_ranks_of_a_killed_one_end_with_a_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = runs.start(run, world=2)
    assert runs.until_saved(run, 3, processes), runs.output(run)
    processes[1].kill()
    assert runs.wait(processes)[0] == 1, runs.output(run)
    assert "Traceback" not in runs.output(run)
    (line,) = [each for each in runs.output(run).splitlines() if each.startswith("moco: ")]
    assert line.startswith("moco: another process of this run exited or is not responding (")


def stuck_in_the_first_evaluation() -> None:
    """Rank 1, or a single process, hangs in its first evaluation."""
    from moco.training import live_evaluation as live

    real = vars(live)["knn_accuracy"]

    def stuck(*arguments: Any) -> Any:
        if os.environ.get("RANK", "1") == "1":
            time.sleep(1000)
        return real(*arguments)

    vars(live)["knn_accuracy"] = stuck


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2] if LONG else [2])
def test_a_rank_that_hangs_in_an_evaluation_is_named(world: int, tmp_path: Path) -> None:
    run, began = tmp_path / "run", time.monotonic()
    given = ["evaluate.every_epochs=1", "evaluate.draws=2", "hang_after=0.1"]
    processes = runs.start(run, *given, world=world, prepare=stuck_in_the_first_evaluation)
    processes[0].join(120)
    assert processes[0].exitcode == HUNG, runs.output(run)
    (line,) = [each for each in runs.output(run).splitlines() if each.startswith("moco: ")]
    assert line.startswith(f"moco: rank {world - 1} hangs: no progress for 0.1 minutes; rank {world - 1} after ")
    assert f"rank {world - 1} after step 0, at moco/training/live_evaluation.py:" in line
    print(
        f"faults: a first evaluation that hangs, {world} processes: named {time.monotonic() - began:.1f} s after start"
    )


def stuck_in_data() -> None:
    """Rank 1 waits for its ninth batch for ever, as if its disk did not respond."""
    from moco.training import trainer as pretrain

    real = vars(pretrain)["batches"]

    def stuck(*arguments: Any) -> Any:
        for number, batch in enumerate(real(*arguments)):
            if number == 8 and os.environ["RANK"] == "1":
                time.sleep(1000)
            yield batch

    vars(pretrain)["batches"] = stuck


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "data"] if LONG else ["stopped"])
def test_a_hanging_rank_is_named_and_the_run_ends_in_time(how: str, tmp_path: Path) -> None:
    """Rank 1 of two is stopped by SIGSTOP, or waits for data for ever."""
    run = tmp_path / "run"
    given = ["checkpoint.every_steps=3"]
    processes = runs.start(run, *given, "hang_after=0.15", world=2, prepare=stuck_in_data if how == "data" else None)
    assert runs.until_saved(run, 6, processes), runs.output(run)
    began = time.monotonic()
    if how == "stopped":
        os.kill(processes[1].pid or 0, signal.SIGSTOP)
    processes[0].join(120)
    took = time.monotonic() - began
    assert processes[0].exitcode == HUNG, runs.output(run)
    (line,) = [each for each in runs.output(run).splitlines() if each.startswith("moco: rank")]
    assert line.startswith("moco: rank 1 hangs: no progress for 0.15 minutes; rank 1 after step ")
    assert "the others wait, rank 0 after step" in line
    if how == "stopped":
        assert "rank 1 after step" in line
        assert "silent for" in line
    else:
        assert "rank 1 after step 8, at moco/training/trainer.py:" in line
        assert "(_loop)" in line
    print(f"faults: a rank that hangs ({how}) is named {took:.1f} s after, hang_after=9 s")
    assert took < 60
    runs.kill(processes)
    runs.to_the_end(run, *given, world=2)  # the same command resumes
