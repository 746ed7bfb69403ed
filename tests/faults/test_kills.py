"""SIGKILL at random steps and during saves, and a damaged newest checkpoint: the run ends bit for bit the same."""

import time
from pathlib import Path

import pytest

from moco.runs import checkpoint
from tests.faults import runs
from tests.faults.runs import LONG, STEPS

KILLS = 100 if LONG else 4
DAMAGED = 20 if LONG else 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "reference"
    runs.to_the_end(run)
    assert runs.newest(run)["step"] == STEPS
    return run


def half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.tmp"))


def kill_once(run: Path, seed: int) -> str:
    """Start the run and kill it: before its first step, some steps later, or while it writes a checkpoint.

    Returns:
        When it was killed: "save", "step", "start", or "late" if the run had already ended.
    """
    random = runs.generator(seed)
    before, further = runs.saved(run), random.randint(0, 9)
    processes = runs.start(run)
    if further == 0:
        time.sleep(random.random())
    elif not runs.until_saved(run, before + further, processes):
        return "late"
    elif random.random() < 0.5:
        time.sleep(0.03 * random.random())
    else:
        while not half_written(run) and processes[0].exitcode is None:
            time.sleep(0.001)
    runs.kill(processes)
    if processes[0].exitcode == 0:
        return "late"
    assert processes[0].exitcode == -9, runs.output(run)
    return "save" if half_written(run) else "step" if runs.saved(run) > before else "start"


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(reference: Path, tmp_path: Path) -> None:
    met: list[str] = []
    finished = 0
    while sum(each != "late" for each in met) < KILLS:
        run = tmp_path / f"run{finished}"
        while (
            sum(each != "late" for each in met) < KILLS
            and runs.saved(run) < STEPS - 10
            and (not met or met[-1] != "late")
        ):
            met.append(kill_once(run, seed=len(met)))
        if met[-1] == "late":
            met[-1] = "late, and over"
        runs.to_the_end(run)
        runs.same_end(run, reference)
        finished += 1
    counts = {each: met.count(each) for each in sorted(set(met))}
    print(f"faults: {KILLS} kills in {finished} runs of {STEPS} steps: {counts}")
    assert counts.get("save", 0) >= KILLS // 10
    assert counts.get("step", 0) >= KILLS // 10


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(reference: Path, tmp_path: Path) -> None:
    """Flip a random bit or truncate the file at random. Damage to padding is harmless."""
    noticed = 0
    for seed in range(DAMAGED):
        random, run = runs.generator(seed), tmp_path / f"run{seed}"
        processes = runs.start(run)
        assert runs.until_saved(run, 5 + seed % 20, processes)
        runs.kill(processes)
        path = checkpoint.list_checkpoints(run / "checkpoints")[0]
        data = bytearray(path.read_bytes())
        if seed % 2:
            del data[random.randrange(len(data)) :]
        else:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        runs.to_the_end(run)
        runs.same_end(run, reference)
        noticed += path.name in runs.output(run) and "using the previous checkpoint" in runs.output(run)
    print(f"faults: {DAMAGED} damaged checkpoints, {noticed} noticed and skipped, the others harmless")
    assert noticed >= DAMAGED * 3 // 4
