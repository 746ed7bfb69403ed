"""Memory and open files of a long run do not grow."""

import os
import statistics
import time
from pathlib import Path

import pytest

from tests.faults import runs
from tests.faults.runs import LONG

EPOCHS = 200 if LONG else 8  # of 20 steps


def resident(pid: int) -> int:
    """Return the resident memory in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read from /proc")
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    """Log each step, save every 5 and evaluate every 20."""
    run = tmp_path / "run"
    given = [f"epochs={EPOCHS}", "evaluate.every_epochs=1", "evaluate.draws=2", "checkpoint.every_steps=5"]
    (process,) = runs.start(run, *given)
    assert runs.until_saved(run, 40, [process]), runs.output(run)  # every kind of work has been done twice
    memory, files = [], []
    while process.exitcode is None and runs.saved(run) < 20 * EPOCHS:
        memory.append(resident(process.pid or 0))
        files.append(open_files(process.pid or 0))
        time.sleep(0.05)
    assert runs.wait([process], 600) == [0], runs.output(run)
    part = max(1, len(memory) // 5)
    grown = statistics.median(memory[-part:]) - statistics.median(memory[:part])
    print(
        f"faults: soak of {20 * EPOCHS} steps: {statistics.median(memory) / 2**20:.0f} MB, grown by "
        f"{grown / 2**20:.1f} MB from the first to the last fifth; {min(files)} to {max(files)} open files"
    )
    assert len(memory) > 20
    assert grown < 10 * 2**20
    assert max(files[-part:]) <= max(files[:part])
