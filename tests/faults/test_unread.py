"""Output that nobody reads: a run trains to its end all the same, and help ends without a word."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import runs
from tests.faults.runs import LONG


def broken(*numbers: int) -> None:
    """What is written to these goes into a pipe that nobody reads."""
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
    """A terminal that was closed: every write is an error."""
    other, end = os.openpty()
    for number in (0, 1, 2):
        os.dup2(end, number)
    os.close(end)
    os.close(other)


def closed() -> None:
    os.closerange(0, 3)


@pytest.mark.parametrize("reader", [both, *[stdout, terminal, closed] * LONG])
def test_training_goes_on_where_nobody_reads(reader: Callable[[], None], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.wait(runs.start(run, "epochs=1", prepare=reader)) == [0], runs.said(run)
    assert runs.said(run) == ""
    assert (run / "encoder.safetensors").is_file()
    assert runs.saved(run) == 20
    assert len(runs.records(run)) == 20


def test_a_run_that_nobody_reads_keeps_its_status_when_it_is_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = runs.start(run, "epochs=50", prepare=both)
    assert runs.until_saved(run, 3, processes)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGTERM)
    assert runs.wait(processes) == [75]
    assert runs.saved(run) >= 3


@pytest.mark.parametrize("asked", [["--help"], ["--cfg", "job"]])
def test_help_that_nobody_reads_ends_without_a_word(asked: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.wait(runs.start(run, *asked, prepare=stdout)) == [141]
    assert runs.said(run) == ""
