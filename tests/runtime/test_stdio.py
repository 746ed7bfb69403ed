"""A closed stream, a broken pipe or a full disk under the output neither stops the work nor changes the status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moco.config import config_dir
from moco.runtime.console import Display, Terminal, progress_bar, status_line, summary_panel

REPOSITORY = Path(config_dir()).parent

LATE = """
import os
from moco.runtime.console import Terminal
from moco.runtime.stdio import print_error, protected_streams
with protected_streams():
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    print_error("moco: a sentence")
    Terminal().print("a line")
    with open("result", "w") as file:
        file.write(str(min(opened)))
"""


def run(code: str, folder: Path, redirection: str) -> int:
    command = f"{sys.executable} -c '{code}' {redirection}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, timeout=60).returncode


@pytest.mark.parametrize("redirection", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams_do_not_change_the_status(redirection: str, tmp_path: Path) -> None:
    assert run(LATE, tmp_path, redirection) == 0
    assert int((tmp_path / "result").read_text()) > 2


def broken(name: str) -> int:
    """A descriptor of a pipe, or of a terminal, whose other end is closed."""
    other, end = os.pipe() if name == "pipe" else os.openpty()
    os.close(other)
    return end


@pytest.mark.parametrize("name", ["pipe", "terminal"])
def test_output_is_dropped_after_the_reader_has_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = broken(name)
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        if name == "terminal":
            monkeypatch.setattr(Console, "is_terminal", True)
        display = Display(10, 10, 0, quiet=False)
        for step in range(1, 11):
            display.step(step)
        display.log("a line")
        display.close()
        summary_panel("done", [("a", "b")])
        assert display.console.quiet
        with progress_bar("work", quiet=False) as progress:
            progress(1, 2)
        print("dropped too", flush=True)
        assert os.readlink(f"/proc/self/fd/{end}") == os.devnull


def test_other_errors_are_still_raised() -> None:
    with pytest.raises(ValueError, match="a defect"), Terminal(quiet=True):
        raise ValueError("a defect")


def test_the_status_line_omits_measures_that_a_method_does_not_return() -> None:
    values = {"train/loss": 1.5, "train/lr": 0.1, "speed/images_per_second": 100.0, "speed/data_wait": 0.0}
    assert status_line(values) == "loss 1.500 · lr 0.1 · 100 img/s · data wait 0 %"
    assert "contrast acc 25 %" in status_line(values | {"train/contrast_accuracy": 0.25})
