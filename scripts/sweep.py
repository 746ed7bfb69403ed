#!/usr/bin/env python3
"""Trains once at each point of a grid, one torchrun after the other, each into a directory of its own.

    python scripts/sweep.py runs/lr optim.lr=0.03,0.06 seed=0,1 -- experiment=moco_v2_cifar10 epochs=100
    GPUS=4 python scripts/sweep.py ...      # processes of each training; all GPUs unless set, one process without any

Before `--` stand the fields that vary, after it what all trials share. A list in brackets is one value:
optim.milestones=[120,160],[60,80]. The four runs of the first line are runs/lr/optim.lr-0.03__seed-0 and so on. The
same command again goes on: a trial that has ended is left alone, one that was cut off resumes. A trial that fails does
not keep the others from their turn; the status is then 1. Ctrl-C and SIGTERM stop the sweep and the trial, which saves.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

ENDED = "encoder.safetensors"  # the last thing that a run writes


def values_of(text: str) -> list[str]:
    """The values between the commas that stand in no bracket or brace."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def trials(folder: Path, varied: list[str]) -> dict[Path, list[str]]:
    """The run directory and the overrides of each point of the grid.

    Raises:
        ValueError: for a field without values, and for two points that would share a directory.
    """
    grid = []
    for each in varied:
        field, equals, text = each.partition("=")
        if not equals or not all(values_of(text)):
            raise ValueError(f"{each} names no values to try: write field=value,value")
        grid.append([f"{field}={value}" for value in values_of(text)])
    found: dict[Path, list[str]] = {}
    for point in itertools.product(*grid):
        # Letters, digits, dot, plus and minus only: a value can neither leave the folder nor mean something to Hydra.
        name = "__".join(re.sub(r"[^\w.+-]+", "_", each.replace("=", "-", 1)) for each in point)
        if folder / name in found:
            raise ValueError(f"{' '.join(point)} and {' '.join(found[folder / name])} would both go to {folder / name}")
        found[folder / name] = list(point)
    return found


def processes() -> str:
    """GPUS, or how many there are, or one process."""
    if "GPUS" in os.environ or shutil.which("nvidia-smi") is None:
        return os.environ.get("GPUS", "1")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return str(max(1, len(listed.splitlines())))


def train(run: Path, overrides: list[str]) -> int:
    """One trial under torchrun.

    Raises:
        SystemExit: behind the trial, if this process was to stop meanwhile.
    """
    signal_received: list[int] = []
    trial: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        # To wait for the trial is not for here: the wait that this interrupts holds the lock that it would take.
        signal_received.append(number)
        if trial is not None and len(signal_received) == 1:
            trial.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes()]
    trial = subprocess.Popen([*torchrun, "-m", "moco.train", *overrides, f"run={run}"])
    if signal_received:
        trial.send_signal(signal.SIGTERM)
    status = trial.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if signal_received:
        print("sweep: stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal_received[0])
    return status


def main(arguments: list[str]) -> int:
    """Trains all trials that have not ended; gives the status."""
    if "--" not in arguments or arguments.index("--") < 2:
        print(__doc__, file=sys.stderr)
        return 2
    at = arguments.index("--")
    try:
        planned = trials(Path(arguments[0]), arguments[1:at])
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    failed = []
    for number, (run, overrides) in enumerate(planned.items(), 1):
        state = "has ended before" if (run / ENDED).is_file() else "trains"
        print(f"sweep: {number} of {len(planned)}: {run} {state}", flush=True)
        if state == "trains" and train(run, [*arguments[at + 1 :], *overrides]):
            failed.append(run)
    print(f"sweep: {len(planned) - len(failed)} of {len(planned)} trials have ended in {arguments[0]}")
    for run in failed:
        print(f"sweep: {run} has not: the same command tries it again", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
