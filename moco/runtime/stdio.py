"""The process's own output where nobody reads it any more (`| head`, a closed terminal) or where it was never open.

Nothing here needs torch or rich: `--help` comes through here.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

UNREAD = 128 + signal.SIGPIPE  # 141: what a shell calls ended by a closed pipe


def mute(stream: IO[str] | None) -> None:
    """Sends nowhere what is still written to a stream, and what waits in it to be written."""
    with suppress(OSError, ValueError):  # closed, or a test's stream that has no number
        if stream is not None:
            number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def log(sentence: str) -> None:
    """A line on stderr, or nowhere: that it could not be said must not change how the process ends."""
    try:
        print(sentence, file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


@contextmanager
def protected_streams() -> Iterator[None]:
    """Around all that a process does: no file of its own takes the place of a stream, no stream spoils its end."""
    # The system gives the lowest free number to what is opened. Of a closed stream it would go to a checkpoint, and
    # what a library then writes to stderr would go into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                mute(stream)


@contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """Ends the process without a word, with status 141, where nobody reads on what is printed inside.

    Raises:
        SystemExit: there.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        mute(sys.stdout)
        sys.exit(UNREAD)
