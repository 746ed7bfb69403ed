"""Files that are whole or not there, and one sentence where the system does not let them be written."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WriteError(ValueError):
    """A file that cannot be written; its message is one sentence."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes one sentence of the system's error where a file is written.

    Args:
        path: the file, as the sentence names it.

    Raises:
        WriteError: naming what could not be written, and why.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _of_the_system(error) is None:
            raise
        raise WriteError(
            f"{path} cannot be written ({cause(error)}): make room there or make it writable, then give the same "
            "command again"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write under, which becomes `path` at the end; what fails half-way leaves nothing.

    Raises:
        WriteError: see `write_errors`. A file that was there before is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with write_errors(path):
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A table, whole or not at all; see `atomic_write`. A name that is no UTF-8 is written with its own bytes."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)  # with its own line ends: with others it leaves carriage returns in names unquoted
        table.writerow(columns)
        table.writerows(lines)


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
