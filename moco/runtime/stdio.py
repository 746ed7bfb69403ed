"""Standard streams: text that is safe to print, and streams that are closed or whose reader has gone (`| head`).

Imports neither torch nor rich, so that `--help` is fast.
"""

import io
import os
import re
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

BROKEN_PIPE = 128 + signal.SIGPIPE  # 141, the exit status that shells report for a closed pipe

# Control characters, invisible and bidirectional marks, lone surrogates (bytes of a name that are not UTF-8) and the
# separators of lines and paragraphs.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # invisible, but part of words in some scripts, and of emoji


def printable(text: str) -> str:
    """Return a text as one line that is safe to print: control and invisible characters become escapes.

    Names of files, classes and runs can hold escape sequences, line ends and marks that reorder the text.
    """
    if text.isascii() and text.isprintable():
        return text

    def shown(character: str) -> str:
        hidden = unicodedata.category(character) in _UNPRINTABLE and character not in _JOINERS
        return character.encode("unicode_escape").decode() if hidden else character

    return "".join(map(shown, text))


def wrapped(text: str, width: int, first: str = "", others: str = "") -> str:
    """Break a text into lines between words. The first line begins with `first`, the others begin with `others`.

    A word that is wider than a line stays whole. A line is not broken before %, and neither before nor after ±.
    """
    # textwrap does not break at a no-break space.
    filled = textwrap.fill(
        re.sub(r" (?=[%±])|(?<=±) ", "\N{NO-BREAK SPACE}", text),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def holds_command(line: str) -> bool:
    """Return whether a line holds a command for the user to copy; such a line is never broken.

    Suggested commands begin with "next: ".
    """
    return "python -m moco" in line or line.startswith("next: ")


def for_terminal(line: str, stream: IO[str] | None) -> str:
    """Return a line made `printable`; for a terminal, broken between words unless it holds a command."""
    line = printable(line)
    if stream is None or stream.closed or not stream.isatty() or holds_command(line):
        return line
    return wrapped(line, shutil.get_terminal_size().columns)


def discard_output(stream: IO[str] | None) -> None:
    """Redirect a stream to the null device. Text that the stream has buffered goes there too."""
    with suppress(OSError, ValueError):  # closed, or a test's stream without a descriptor
        if stream is not None:
            descriptor, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def print_error(line: str) -> None:
    """Print a line on stderr, see `for_terminal`; nothing if stderr is closed.

    Errors of the stream are ignored, because they must not change the exit status.
    """
    if sys.stderr is None:  # print would use stdout
        return
    try:
        print(for_terminal(line, sys.stderr), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard_output(sys.stderr)


@contextmanager
def protected_streams() -> Iterator[None]:
    """Reserve descriptors 0-2, and ignore errors when stdout and stderr are flushed at the end.

    A character that the encoding of the terminal lacks is printed as an escape.
    """
    # The system assigns the lowest free descriptor. If stderr is closed, a checkpoint could get descriptor 2, and a
    # library that writes to stderr would write into the checkpoint.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # reconfigure flushes the stream, whose reader may have gone
                stream.reconfigure(errors="backslashreplace")
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
