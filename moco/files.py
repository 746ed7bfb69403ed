"""Files that are whole or not there, and one sentence where the system does not let them be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotWritten(ValueError):
    """A file that cannot be written; its message is one sentence."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Makes one sentence of the system's error where a file is written.

    Args:
        path: the file, as the sentence names it.

    Raises:
        NotWritten: naming what could not be written, and why.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _of_the_system(error) is None:
            raise
        raise NotWritten(
            f"{path} cannot be written ({cause(error)}): make room there or make it writable, then give the same "
            "command again"
        ) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write under, which becomes `path` at the end; what fails half-way leaves nothing.

    Raises:
        NotWritten: see `told`. A file that was there before is as it was.
    """
    temporary = path.with_suffix(".tmp")
    with told(path):
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits for the disk: some file systems notice only then that they are full."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def cause(error: BaseException) -> str:
    """What the system said; torch may raise an error of its own while it handles the system's."""
    system = _of_the_system(error)
    if system is not None:
        return system.strerror or str(system)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _of_the_system(error: BaseException) -> OSError | None:
    each: BaseException | None = error
    while each is not None and not isinstance(each, OSError):
        each = each.__cause__ or each.__context__
    return each
