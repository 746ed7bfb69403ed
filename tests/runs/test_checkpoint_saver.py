"""Checkpoints that are written in the background: the state is copied, and errors and kills leave the previous one."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.config import config_dir
from moco.digest import digest
from moco.runs import checkpoint
from moco.runs.checkpoint import CheckpointError, Saver, load, load_newest
from tests.full_disk import full_disk
from tests.runs.states import same, state, steps


class Slow:
    """A torch.save that begins to write, sets `began`, and waits for `go`."""

    def __init__(self) -> None:
        self.real, self.began, self.go = torch.save, threading.Event(), threading.Event()

    def __call__(self, what: Any, file: Any) -> None:
        file.write(b"PK")
        file.flush()
        self.began.set()
        assert self.go.wait(20)
        file.seek(0)
        self.real(what, file)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow()
    monkeypatch.setattr(torch, "save", made)
    return made


def test_copy_to_host_shares_nothing_and_keeps_types() -> None:
    given = state()
    copied = checkpoint.copy_to_host(given)
    assert same(copied, given)
    assert digest(copied) == digest(given)
    assert type(copied["method"]) is collections.OrderedDict
    assert vars(copied["method"]) == vars(given["method"])  # torch stores module versions there
    assert "_metadata" in vars(copied["method"])
    for name, value in given["method"].items():
        assert copied["method"][name].data_ptr() != value.data_ptr(), name
    given["method"]["0.weight"].zero_()
    given["history"].append("later")
    given["config"]["data"]["sizes"].append(9)
    assert same(copied, state())


def test_later_changes_of_the_state_are_not_saved(tmp_path: Path, slow: Slow) -> None:
    given, saver = state(), Saver(tmp_path, keep_last=2)
    saver.save(1, given)
    assert slow.began.wait(20)
    given["method"]["0.weight"].zero_()  # the next step
    given["history"].append("later")
    assert steps(tmp_path) == []
    slow.go.set()
    saver.join()
    assert same(load(tmp_path / "step_00000001.pt"), state())


@pytest.mark.usefixtures("fixed_temporary_names")
def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, slow: Slow) -> None:
    saver, saved = Saver(tmp_path, keep_last=2), threading.Event()

    def save_two() -> None:
        saver.save(1, state(1))
        saver.save(2, state(2))
        saved.set()

    loop = threading.Thread(target=save_two)
    loop.start()
    assert slow.began.wait(20)
    assert not saved.wait(0.2)  # the second save waits for the first
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt.tmp"]
    slow.go.set()
    loop.join()
    saver.join()
    assert steps(tmp_path) == ["step_00000002.pt", "step_00000001.pt"]


def test_a_full_disk_is_reported_in_one_sentence_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    saver.save(1, state(1))
    saver.join()
    with full_disk():
        saver.save(2, state(2) | {"large": torch.zeros(100_000)})
        deadline = time.monotonic() + 20
        while not saver.failed() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saver.failed()
        untouched = r"\(File too large\).* to resume from step_00000001\.pt, which is untouched$"
        with pytest.raises(CheckpointError, match=untouched):
            saver.save(3, state(3))
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt"]
    assert same(load(tmp_path / "step_00000001.pt"), state(1))
    saver.save(4, state(4))  # the error is raised once; later checkpoints are written
    saver.join()
    assert steps(tmp_path) == ["step_00000004.pt"]


def test_a_full_disk_before_the_first_checkpoint_names_none(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    with full_disk():
        saver.save(2, state(2) | {"large": torch.zeros(100_000)})
        with pytest.raises(CheckpointError, match=r"run the same command again to start from the beginning$"):
            saver.join()


def save_and_raise(folder: Path, error: BaseException | None) -> None:
    with Saver(folder, keep_last=1) as saver:
        saver.save(1, state())
        if error is not None:
            raise error


def test_exit_waits_for_the_writer_except_after_a_keyboard_interrupt(tmp_path: Path, slow: Slow) -> None:
    left = threading.Event()

    def leave(error: BaseException, folder: Path) -> None:
        with pytest.raises(type(error)):
            save_and_raise(folder, error)
        left.set()

    leave(KeyboardInterrupt(), tmp_path / "at_once")
    assert left.is_set()
    assert slow.began.wait(20)
    assert steps(tmp_path / "at_once") == []
    left.clear()
    waiting = threading.Thread(target=leave, args=(ValueError("an invalid step"), tmp_path / "waits"))
    waiting.start()
    assert not left.wait(0.2)
    slow.go.set()
    waiting.join()
    assert steps(tmp_path / "waits") == ["step_00000001.pt"]


def test_the_error_of_the_run_hides_the_error_of_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(FloatingPointError, match="loss"):
        save_and_raise(tmp_path, FloatingPointError("loss"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_and_raise(tmp_path, None)


KILLED = """
import sys, time, torch
from pathlib import Path
from moco.runs.checkpoint import Saver

saver = Saver(Path(sys.argv[1]), keep_last=1)
saver.save(1, {"weight": torch.ones(1000)})
saver.join()
real = torch.save

def half(what, file):
    real(what, sys.argv[1] + "/../complete")
    file.write(Path(sys.argv[1] + "/../complete").read_bytes()[:2000])
    file.flush()
    print("half written", flush=True)
    time.sleep(60)

torch.save = half
saver.save(2, {"weight": torch.zeros(1000)})
saver.join()
"""


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    environment = os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)}
    command = [sys.executable, "-c", KILLED, str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half written\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (half,) = folder.glob("step_00000002.pt.*.tmp")
    assert half.stat().st_size == 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the unfinished file is not a checkpoint
        newest = load_newest(folder)
    assert newest is not None
    assert torch.equal(newest["weight"], torch.ones(1000))
