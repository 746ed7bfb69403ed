"""Start-up: time of `python -m moco.train --help` and of the imports, and the peak memory of a short run."""

import contextlib
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial

from scripts.bench.machine import status_field
from scripts.bench.timing import Table, alternate, compared

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "python -m moco.train --help": ["-m", "moco.train", "--help"],
    "import moco.builder": ["-c", "import moco.builder"],
}


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--epochs", type=int, default=2, help="length of the run for the memory measurement")


def run(options: Namespace) -> Iterator[Table]:
    """Yield two tables: seconds and MiB."""
    variants = {name: partial(_seconds, words) for name, words in COMMANDS.items()}
    yield compared("Start-up, s, wall time", alternate(variants, options.rounds), "s", less_is_faster=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "moco.train", f"run={folder}/run", f"epochs={options.epochs}", "evaluate.every_epochs=0"]
        rows = [[name, f"{_peak(each):,.0f}"] for name, each in (COMMANDS | {"the default run": words}).items()]
    yield Table("Peak memory of the process", ["", "MiB"], rows)


def _seconds(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - began


def _peak(words: list[str]) -> float:
    """Run a process to its end and return its peak resident memory, in MiB (Linux)."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    highest = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # the process may end in between
            highest = max(highest, status_field("VmHWM", process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return highest / 1024
