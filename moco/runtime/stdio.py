"""Standard streams that are closed, or whose reader has gone (`| head`, a closed terminal).

Imports neither torch nor rich, so that `--help` is fast.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

BROKEN_PIPE = 128 + signal.SIGPIPE  # 141, the exit status that shells report for a closed pipe


def discard_output(stream: IO[str] | None) -> None:
    """Redirect a stream to the null device, with what it has buffered."""
    with suppress(OSError, ValueError):  # closed, or a test's stream without a descriptor
        if stream is not None:
            descriptor, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def print_error(line: str) -> None:
    """Print a line on stderr. Ignore errors: they must not change the exit status."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr)


@contextmanager
def protected_streams() -> Iterator[None]:
    """Reserve descriptors 0-2, and ignore errors when stdout and stderr are flushed at the end."""
    # The system assigns the lowest free descriptor. If a stream is closed, a checkpoint could get its number, and a
    # library that writes to stderr would write into the checkpoint.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                discard_output(stream)


@contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """Exit silently with status 141 if the reader of stdout has gone while the block prints."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)
        sys.exit(BROKEN_PIPE)
