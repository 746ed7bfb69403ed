"""Train runs one after the other, each in its own process. Torch is not imported, so scripts/sweep.py starts fast."""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from moco.runtime.preemption import handle_stop_signals


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # exit status; -N if signal N ended it
    stopped_by: int  # the first of `STOP_SIGNALS` that the parent process received meanwhile; 0: none


def is_finished(run: Path) -> bool:
    """Return whether moco.train has finished in a run directory: it writes the encoder last."""
    return (run / "encoder.safetensors").is_file()


def run_to_end(command: Sequence[str], log: Path | None = None) -> Ended:
    """Run a command and wait until it ends, also if a signal of `STOP_SIGNALS` arrives meanwhile.

    The first of these signals is passed on as SIGTERM, which lets moco.train save. Later ones are ignored.

    Args:
        command: the program and its arguments.
        log: the file for its output; None: the output of this process.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        # Do not wait for the process here: the interrupted wait() holds the lock that a second wait() needs.
        received.append(number)
        if process is not None and len(received) == 1:
            process.send_signal(signal.SIGTERM)

    with handle_stop_signals(stop), nullcontext() if log is None else log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=None if output is None else subprocess.STDOUT)
        if received:
            process.send_signal(signal.SIGTERM)
        status = process.wait()
    return Ended(status, received[0] if received else 0)
