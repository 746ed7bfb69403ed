"""A disk that is full: a real limit on the size of files, and a disk that is full when one file is written."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moco import files


@contextmanager
def full_disk(size: int = 20_000) -> Iterator[None]:
    """Let a write beyond this number of bytes in any file fail with "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the atomic write of a file of this name fail with "No space left on device", and no other."""
    flush = files.flush

    def on_a_full_disk(path: Path) -> None:
        if path.name.startswith(f"{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(files, "flush", on_a_full_disk)
