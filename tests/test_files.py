"""Atomic writes, locks, and one sentence per write error."""

import errno
import os
import socket
from pathlib import Path

import pytest

from moco.files import FileLocked, WriteError, atomic_write, cause, lock, write_errors


def test_a_file_is_renamed_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    with atomic_write(file) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "before"
        temporary.write_text("complete")
    assert file.read_text() == "complete"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_file_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.txt.tmp").write_text("torn by a kill")
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "new"}


def test_a_full_disk_is_one_sentence_and_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    (tmp_path / "a.txt.tmp").symlink_to("/dev/full")
    with (
        pytest.raises(WriteError, match=r"a\.txt cannot be written \(No space left on device\)"),
        atomic_write(file) as temporary,
    ):
        temporary.write_text("more")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "before"}


def test_a_disk_that_is_full_only_at_the_flush_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", late)
    with pytest.raises(WriteError, match="Disk quota exceeded"), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("more")
    assert os.listdir(tmp_path) == []


def test_an_error_raised_while_handling_a_system_error_is_reported_as_that() -> None:
    def torch_does() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(WriteError, match="No space left on device"), write_errors(Path("a.pt")):
        torch_does()


def test_other_errors_are_not_converted(tmp_path: Path) -> None:
    def defect(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"), atomic_write(tmp_path / "a.pt") as temporary:
        defect(temporary)
    assert os.listdir(tmp_path) == []
    assert cause(RuntimeError("a defect\nand where")) == "a defect"
    assert cause(KeyError()) == "KeyError"


def test_a_lock_holds_against_other_processes_until_it_is_closed(tmp_path: Path) -> None:
    def locked_by_child(wait: bool) -> bool:
        child = os.fork()  # the owner of a record lock is a process: only another process can be refused
        if child == 0:
            try:
                lock(tmp_path / "a.lock", wait)
            except FileLocked as error:
                os._exit(0 if str(error) == f"process {os.getppid()} on {socket.gethostname()}" else 1)
            os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2

    with lock(tmp_path / "a.lock"):
        assert not locked_by_child(wait=False)
    assert locked_by_child(wait=True)
