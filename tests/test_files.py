"""Atomic writes, locks, and one sentence per write error."""

import errno
import os
import socket
from pathlib import Path

import pytest

from moco.files import FileLocked, WriteError, atomic_write, cause, lock, reserve, write_errors


def test_a_file_is_renamed_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    with atomic_write(file) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "before"
        temporary.write_text("complete")
    assert file.read_text() == "complete"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.usefixtures("fixed_temporary_names")
def test_a_temporary_file_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.txt.tmp").write_text("torn by a kill")
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "new"}


@pytest.mark.usefixtures("fixed_temporary_names")
def test_a_full_disk_is_reported_in_one_sentence_and_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    (tmp_path / "a.txt.tmp").symlink_to("/dev/full")
    with (
        pytest.raises(WriteError, match=r"a\.txt cannot be written \(No space left on device\)"),
        atomic_write(file) as temporary,
    ):
        temporary.write_text("more")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "before"}


def test_two_writers_of_one_file_do_not_share_their_temporary_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with atomic_write(file) as first, atomic_write(file) as second:
        first.write_text("first")
        second.write_text("second")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "first"}  # the last to finish


@pytest.mark.parametrize("system_call", ["there", "missing", "unsupported"])
def test_reserving_space_fills_the_holes_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system_call: str
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "unsupported")

    if system_call == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    elif system_call == "unsupported":
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    file, size = tmp_path / "a.npy", (3 << 20) + 5
    with file.open("wb") as opened:
        opened.write(b"header")
        opened.truncate(size)
    assert file.stat().st_blocks * 512 < size
    reserve(file)
    assert file.stat().st_blocks * 512 >= size
    assert file.read_bytes() == b"header".ljust(size, b"\0")


def test_a_disk_without_space_to_reserve_is_reported_in_one_sentence_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "a.npy").write_bytes(bytes(9))
    with pytest.raises(WriteError, match=r"a\.npy cannot be written \(No space left on device\)"):
        reserve(tmp_path / "a.npy")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_only_at_the_flush_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(WriteError, match=rf"{path.name} cannot be written"), atomic_write(path) as temporary:
            temporary.write_text("x")
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]
