"""Output that nobody reads: training continues, and help exits silently."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import runs
from tests.faults.runs import LONG


def broken(*numbers: int) -> None:
    """Redirect these descriptors to a pipe that nobody reads."""
    other, end = os.pipe()
    os.close(other)
    for number in numbers:
        os.dup2(end, number)
    os.close(end)


def stdout() -> None:
    """`| head`."""
    broken(1)


def both() -> None:
    """`2>&1 | head`."""
    broken(1, 2)


def terminal() -> None:
    """A closed terminal: every write fails."""
    other, end = os.openpty()
    for number in (0, 1, 2):
        os.dup2(end, number)
    os.close(end)
    os.close(other)


def closed() -> None:
    os.closerange(0, 3)


@pytest.mark.parametrize("reader", [both, *[stdout, terminal, closed] * LONG])
def test_training_continues_with_a_broken_pipe(reader: Callable[[], None], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.wait(runs.start(run, "epochs=1", prepare=reader)) == [0], runs.output(run)
    assert runs.output(run) == ""
    assert (run / "encoder.safetensors").is_file()
    assert runs.saved(run) == 20
    assert len(runs.records(run)) == 20


def test_a_stopped_run_with_a_broken_pipe_keeps_its_status(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = runs.start(run, "epochs=50", prepare=both)
    assert runs.until_saved(run, 3, processes)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGTERM)
    assert runs.wait(processes) == [75]
    assert runs.saved(run) >= 3


@pytest.mark.parametrize("option", [["--help"], ["--cfg", "job"]])
def test_help_with_a_broken_pipe_exits_silently(option: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.wait(runs.start(run, *option, prepare=stdout)) == [141]
    assert runs.output(run) == ""
