#!/usr/bin/env python3
"""Trains once at each point of a grid, one torchrun after the other, each in its own run directory.

    python scripts/sweep.py runs/lr optim.lr=0.03,0.06 seed=0,1 -- experiment=cifar10_notebook epochs=100
    GPUS=4 python scripts/sweep.py ...      # processes per training; default: all GPUs, or one process without a GPU

The fields before `--` vary, the overrides after it apply to every trial. A list in brackets is one value:
optim.milestones=[120,160],[60,80] has two values. The first command above trains four runs:
runs/lr/optim.lr-0.03__seed-0 and so on. Run the same command again to resume: finished trials are skipped, unfinished
ones continue. Before the first trial, all configurations are checked, and compared with those of the runs that are
there. If a trial fails, the others still run, and the exit status is 1. Ctrl-C and SIGTERM stop the sweep after the
current trial has saved.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moco.composition import compose_overrides
from moco.config import TrainConfig, check
from moco.config.quoting import override
from moco.files import check_writable
from moco.overrides import split
from moco.runs.metrics import read_metrics
from moco.runs.sweep import is_finished, run_to_end
from moco.runtime.stdio import protected_streams


def trials(folder: Path, varied: list[str]) -> dict[Path, list[str]]:
    """Return the run directory and the overrides of each point of the grid.

    Raises:
        ValueError: for a field without values, or two points with the same directory.
    """
    grid = []
    for each in varied:
        field, equals, text = each.partition("=")
        values = split(text)
        if not equals or not all(values):
            raise ValueError(f"{each} has no values, or an empty one: write field=value,value")
        grid.append([f"{field}={value}" for value in values])
    found: dict[Path, list[str]] = {}
    for point in itertools.product(*grid):
        # Letters, digits, dot, plus and minus only: a value cannot leave the folder, and has no meaning to Hydra.
        name = "__".join(re.sub(r"[^\w.+-]+", "_", each.replace("=", "-", 1)) for each in point)
        if folder / name in found:
            both = f"{' '.join(point)} and {' '.join(found[folder / name])}"
            raise ValueError(f"{both} have the same run directory, {folder / name}: remove one of them")
        found[folder / name] = list(point)
    return found


def processes() -> str:
    """Return the number of processes: the environment variable GPUS if it is set, else the number of GPUs, else 1."""
    if "GPUS" in os.environ or shutil.which("nvidia-smi") is None:
        return os.environ.get("GPUS", "1")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return str(max(1, len(listed.splitlines())))


def train(run: Path, overrides: list[str]) -> int:
    """Run one trial under torchrun and return its exit status.

    Raises:
        SystemExit: after the trial has ended, if this process was asked to stop meanwhile.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes()]
    ended = run_to_end([*torchrun, "-m", "moco.train", *overrides, f"run={run}"])
    if ended.stopped_by:
        print("sweep: stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + ended.stopped_by)
    return ended.status


def check_all(planned: dict[Path, list[str]], shared: list[str]) -> None:
    """Check the configurations of all trials, and compare them with the runs that are already there.

    Raises:
        ValueError: for the first invalid one, two trials with the same settings, or a directory with another run.
    """
    launched = processes()
    count = int(launched) if launched.isdigit() else 1  # torchrun takes auto and gpu, too
    settings: list[tuple[dict[str, Any], list[str]]] = []
    for run, overrides in planned.items():
        try:
            with warnings.catch_warnings(action="ignore"):  # the trial itself shows them
                for config in compose_overrides([*shared, *overrides, f"run={run}"]):
                    if not is_finished(run):
                        check(config, count)
                    settings.append((asdict(config), overrides))
                    refuse_other_run(run, settings[-1][0])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{' '.join(overrides)}: {error}") from error
    for (one, first), (other, second) in itertools.combinations(settings, 2):
        if one | {"run": ""} == other | {"run": ""}:
            raise ValueError(f"{' '.join(first)} and {' '.join(second)} are the same settings: remove one of them")


def refuse_other_run(run: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if a trial's directory holds a run with another configuration."""
    if not run.is_dir():
        return
    from moco.runs.directory import difference, recorded_config  # here, because it imports torch

    there = recorded_config(run)
    if there and (named := difference(run, there, config, asdict(TrainConfig()))):
        state = "finished" if is_finished(run) else "there"
        raise ValueError(
            f"{run} is {state} with another configuration: {named}; restore those values, or name another folder "
            f"than {run.parent}"
        )


def show_means(planned: dict[Path, list[str]], values: dict[Path, tuple[str, float]]) -> None:
    """Print the mean over seeds of each setting of the other fields with its 95 % interval, the best first."""
    from moco.evaluation.metrics import mean_interval  # here, because it imports torch

    settings: dict[tuple[str, str], list[float]] = {}
    for run, (name, value) in values.items():
        others = " ".join(each for each in planned[run] if not each.startswith("seed="))
        settings.setdefault((name, others), []).append(value)
    means = {setting: mean_interval(each) for setting, each in settings.items()}
    print("sweep: mean over seeds ± half of Student's 95 % interval")
    for (name, others), (mean, half) in sorted(means.items(), key=lambda item: -item[1][0]):
        spread = f" ± {half:.1f}" if half is not None else ""
        count = len(settings[name, others])
        print(f"sweep: {name} {mean:5.1f}{spread} %, {count} seed{'s' * (count > 1)}  {others}".rstrip())


def show(planned: dict[Path, list[str]]) -> None:
    """Print the last accuracy or retrieval of each finished trial, the best first, and a command that compares them.

    If seeds vary, print the mean over them, too.
    """
    found = []
    for run in filter(is_finished, planned):
        values = read_metrics(run / "metrics.jsonl")
        name = next((each for each in ("accuracy/knn", "retrieval/retrieval") if each in values), "")
        found.append((values[name][1][-1] if name else float("-inf"), name.partition("/")[0], run))
    found.sort(key=lambda each: -each[0])
    for value, name, run in found:
        print(f"sweep: {f'{name} {value:5.1f} %' if name else 'not evaluated'}  {run}")
    evaluated = {run: (name, value) for value, name, run in found if name}
    if evaluated and any(each.startswith("seed=") for point in planned.values() for each in point):
        show_means(planned, evaluated)
    if found:
        best, *others = [str(run) for _, _, run in found]
        compare = [override("compare", others)] if others else []
        print(f"next: {' '.join(['python', '-m', 'moco.report', override('run', best), *compare])}")


@protected_streams()
def main(arguments: list[str]) -> int:
    """Train all unfinished trials and return the exit status."""
    if arguments[:1] == ["--help"]:
        print(__doc__)
        return 0
    at = arguments.index("--") if "--" in arguments else len(arguments)
    if at < 2 or at == len(arguments):
        missing = "the folder and the fields that vary are" if at < 2 else "-- is"
        usage = "python scripts/sweep.py FOLDER field=value,value -- [field=value ...]"
        print(f"{__doc__}\nsweep: {missing} missing: {usage}", file=sys.stderr)
        return 2
    try:
        planned = trials(Path(arguments[0]), arguments[1:at])
        check_all(planned, arguments[at + 1 :])
        check_writable(Path(arguments[0]), is_folder=True)
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    failed: dict[Path, int] = {}
    for number, (run, overrides) in enumerate(planned.items(), 1):
        finished = is_finished(run)
        print(f"sweep: {number} of {len(planned)}: {run}{' is finished' * finished}", flush=True)
        if not finished and (status := train(run, [*arguments[at + 1 :], *overrides])):
            failed[run] = status
    print(f"sweep: {len(planned) - len(failed)} of {len(planned)} trials are finished in {arguments[0]}")
    show(planned)
    for run, status in failed.items():
        fix = "if its error above says that its settings were refused or its training diverged, change its settings, "
        fix += "and name another folder if the trial has begun; for another error, run the same command again"
        print(f"sweep: {run} failed with exit status {status}: {fix}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
