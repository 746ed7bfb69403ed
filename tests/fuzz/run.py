"""Run generated cases in this process, and judge how each ends."""

import contextlib
import io
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from unittest import mock

import torch

from moco.runtime.stdio import printable
from moco.runtime.watchdog import Watchdog
from tests.fuzz.cases import Case, cases
from tests.fuzz.world import baseline, call

SECONDS = 20  # a case that takes longer is ended
MEMORY = 8 * 2**30  # bytes beyond those in use: more ends in an error instead of swapping


class TooSlow(BaseException):
    """The time of a case is over."""


@dataclass
class Outcome:
    """The outcomes of many cases: "ok", "refused", "stopped", "slow" or "FAILED", and the failed cases."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, str]] = field(default_factory=list)


def run(command: str, fields: list[str], world: Path, scratch: Path, count: int, seed: int = 0) -> Outcome:
    """Run `count` cases of a command, each in an empty directory of its own."""
    outcome = Outcome()
    for case in islice(cases(fields, world, seed), count):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        kind, reason = run_one(command, case, world, scratch)
        outcome.counts[kind] += 1
        if kind == "FAILED":
            outcome.failures.append((case, reason))
    return outcome


def run_one(command: str, case: Case, world: Path, scratch: Path) -> tuple[str, str]:
    """Return the outcome of one case, and why it failed."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    # A tiny hang_after ends the process: that of the tests.
    environment, no_exit = mock.patch.dict(os.environ, case.environment), mock.patch.object(Watchdog, "_exit")
    with _restored(scratch), environment, no_exit, _limits(), streams[0], streams[1]:
        try:
            call(command, *baseline(command, world), *case.overrides)
        except SystemExit as error:
            status = 0 if error.code is None else error.code
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            computing = any("/torch/" in each.filename or "/sklearn/" in each.filename for each in where)
            if isinstance(error, TooSlow) and computing:
                return "slow", ""
            ours = next((each for each in reversed(where) if "/moco/" in each.filename), where[-1])
            return "FAILED", f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}: {str(error)[:150]}"
    return judge(status, err.getvalue(), case)


def judge(status: object, err: str, case: Case) -> tuple[str, str]:
    """Judge an exit status and what was printed on stderr."""
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("moco: warning: ")]
    if status == 0:
        return ("FAILED", f"traceback with status 0: {err[-200:]!r}") if "Traceback" in err else ("ok", "")
    said = [line for line in lines if line.startswith(("moco: ", "moco (rank "))]
    if status == 2 and lines and "error: " in lines[-1]:  # argparse, for an unknown flag
        return "refused", ""
    if status not in (1, 2, 75) or len(said) != 1 or len(lines) != 1:
        return "FAILED", f"status {status}, {len(said)} sentences in {len(lines)} lines: {err[-300:]!r}"
    if not said[0].isprintable():
        return "FAILED", f"raw control characters: {said[0]!r}"
    if status != 75 and not any(printable(name) in said[0] for name in case.names):
        return "FAILED", f"names none of {case.names}: {said[0][:300]}"
    return ("stopped" if status == 75 else "refused"), ""


@contextmanager
def _restored(directory: Path) -> Iterator[None]:
    """Work in a directory, and restore what a command changes in its process."""
    before, variables = Path.cwd(), dict(os.environ)
    threads, formatter = torch.get_num_threads(), warnings.formatwarning
    os.chdir(directory)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        warnings.formatwarning = formatter
        os.environ.clear()
        os.environ.update(variables)


@contextmanager
def _limits() -> Iterator[None]:
    """Limit time and memory of the block."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
