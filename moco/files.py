"""Write files atomically, report write errors in one sentence, lock a file."""

import csv
import difflib
import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class WriteError(ValueError):
    """A file could not be written; the message is one sentence."""


class FileLocked(Exception):
    """Another process holds the lock; the message names the process and its host."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Convert the system's errors while writing `path` into a `WriteError`.

    An error of a library, such as torch, is converted too if an error of the system caused it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _system_error(error) is None:
            raise
        fix = "free some space or make it writable, then run the same command again"
        raise WriteError(f"{path} cannot be written ({cause(error)}): {fix}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write to, then flush that file and rename it to `path`.

    If anything fails, the temporary file is removed, and an earlier file `path` is left unchanged. Two processes may
    write the same `path` at once: each has its own temporary file, and the file of the last one to finish remains.

    Raises:
        WriteError: if the system does not let the file be written.
    """
    temporary = temporary_name(path)
    with write_errors(path):
        _refuse_device(path)
        try:
            yield temporary
            flush(temporary)  # some file systems report a full disk only now
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path, is_folder: bool = False) -> None:
    """Check, before long work, that a file, or files in a folder, can be written.

    Create the folder, and write and remove a temporary file there.

    Raises:
        WriteError: if the system does not let a file be written.
    """
    folder = path if is_folder else path.parent
    temporary = temporary_name(folder / "check")
    with write_errors(path):
        _refuse_device(path)
        if folder.is_file():
            raise OSError(errno.ENOTDIR, f"{folder} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(bytes(4096))  # a block: a full disk still takes an empty file
            flush(temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _refuse_device(path: Path) -> None:
    """Raise OSError for a device or pipe: renaming would replace /dev/null by a file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EEXIST, "a device or pipe, not a file")


def resolved(path: str | Path) -> Path:
    """Return the absolute path without links; `Path.resolve` raises a RuntimeError for a link that leads to itself."""
    return Path(os.path.realpath(path))


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process uses; it ends in `.tmp`."""
    return path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.tmp")


def reserve(path: Path) -> None:
    """Reserve the space of a sparse file on disk, so that writing through a memory map cannot find the disk full.

    Without reserved space, such a write ends the process with SIGBUS. Holes become zeros; the length stays the same.

    Raises:
        WriteError: if the disk is full; the file is removed then.
    """
    with write_errors(path):
        try:
            with path.open("r+b") as file:
                _allocate(file, os.fstat(file.fileno()).st_size)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _allocate(file: IO[bytes], size: int) -> None:
    """Allocate the blocks of a file; if the system has no call for this, write zeros over the holes."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    step = 1 << 20
    for start in range(0, size, step):
        file.seek(start)
        block = file.read(min(step, size - start))
        file.seek(start)
        file.write(block)
    file.flush()
    os.fsync(file.fileno())  # some file systems allocate only now


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; errors: see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table; errors: see `atomic_write`. File names that are not valid UTF-8 keep their bytes."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)  # with its default line ends: with other line ends it does not quote carriage returns
        table.writerow(columns)
        table.writerows(lines)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, wait: bool = False) -> IO[str]:
    """Create the file `path` if needed, lock it, and write this process's ID and host into it.

    The lock holds until the returned file is closed or the process ends, even by SIGKILL.

    Raises:
        FileLocked: if another process holds the lock and `wait` is false.
        OSError: if the file cannot be created or locked.
        WriteError: if the ID cannot be written, for example on a full disk.
    """
    file = path.open("a+")
    try:
        # A record lock belongs to this process only. With flock, which the package filelock uses, loader workers would
        # inherit the lock and still hold it after the process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        with write_errors(path):
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
    except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, depending on the system
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise FileLocked(f"process {holder}") from error
    except Exception:
        file.close()
        raise
    return file


def absent(path: Path) -> str:
    """Return "does not exist", with at most three names of files in its folder that are similar, the best first."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.is_file()]
    except OSError:
        names = []
    similar = difflib.get_close_matches(path.name, names)
    return "does not exist" + f"; {path.parent} contains {', '.join(similar)}" * bool(similar)


def cause(error: BaseException) -> str:
    """Return the system's message if the error comes from the system, otherwise the first line of the error."""
    if system := _system_error(error):
        return system.strerror or str(system)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _system_error(error: BaseException) -> OSError | None:
    """Return the first OSError among the error and its causes."""
    each: BaseException | None = error
    while each is not None and not isinstance(each, OSError):
        each = each.__cause__ or each.__context__
    return each
