"""A file is whole or as it was before, and what the system says becomes one sentence."""

import errno
import os
from pathlib import Path

import pytest

from moco.files import WriteError, atomic_write, cause, write_errors


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    with atomic_write(file) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "before"
        temporary.write_text("whole")
    assert file.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_kill_left_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / "a.txt.tmp").write_text("torn by a kill")
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "new"}


def test_a_full_disk_is_one_sentence_and_leaves_the_file_of_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    (tmp_path / "a.txt.tmp").symlink_to("/dev/full")
    with (
        pytest.raises(WriteError, match=r"a\.txt cannot be written \(No space left on device\): make room there"),
        atomic_write(file) as temporary,
    ):
        temporary.write_text("more")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"a.txt": "before"}


def test_a_disk_that_notices_late_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", late)
    with pytest.raises(WriteError, match="Disk quota exceeded"), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("more")
    assert os.listdir(tmp_path) == []


def test_an_error_raised_over_the_systems_is_the_systems() -> None:
    def torch_does() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(WriteError, match="No space left on device"), write_errors(Path("a.pt")):
        torch_does()


def test_what_is_not_the_systems_stays_what_it_is(tmp_path: Path) -> None:
    def defect(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"), atomic_write(tmp_path / "a.pt") as temporary:
        defect(temporary)
    assert os.listdir(tmp_path) == []
    assert cause(RuntimeError("a defect\nand where")) == "a defect"
    assert cause(KeyError()) == "KeyError"
