"""The temperature study: a run of moco.train at each temperature, measured and drawn; or three logits, explained.

An own sweep in place of Hydra's multirun: that runs all jobs in one process, under torchrun once a rank, and knows
nothing of runs that are finished already. Here each run is a process with a directory of its own, so the study goes on
where it was stopped.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from moco.analysis import bin_edges, explain_temperature
from moco.analysis.studies.figures import (
    RIGHT,
    WRONG,
    draw_curves,
    draw_explanation,
    draw_penalties,
    draw_similarities,
    matplotlib,
)
from moco.analysis.studies.measures import Run, measure
from moco.config import ConfigError, DataConfig
from moco.config.temperature import TemperatureConfig
from moco.data.opening import open_sources
from moco.files import write_json
from moco.runtime.console import duration, log, percent, progress_bar, table
from moco.runtime.device import pick_device
from moco.runtime.provenance import provenance

PREEMPTED = 75  # a run's status when it was stopped with everything saved
FIGURES = {"curves.svg": draw_curves, "similarities.svg": draw_similarities, "penalties.svg": draw_penalties}


def explain(config: TemperatureConfig) -> None:
    """Draws softmax, loss and gradient of a few logits against the temperature, and prints them as a table."""
    matplotlib()
    output = _folder(config.output)
    similarities, temperatures = config.similarities, sorted(config.temperatures)
    told = [
        explain_temperature(torch.tensor(similarities), answer, torch.tensor(temperatures, dtype=torch.float64))
        for answer in (RIGHT, WRONG)
    ]
    rows = []
    for i, temperature in enumerate(temperatures):
        line = [f"{temperature:g}"]
        for answer, each in zip((RIGHT, WRONG), told, strict=True):
            line += [percent(100 * each.softmax[i, answer].item()), f"{each.loss[i]:.3g}"]
            line += [f"{-each.gradient[i, answer]:.3g}"]
        rows.append(line)
    named = ", ".join(f"{each:g}" for each in similarities)
    table(
        f"one query, candidates with similarities {named}",
        ["T", "right: P %", "loss", "pull", "wrong: P %", "loss", "pull"],
        rows,
        f"right: the answer is the {similarities[RIGHT]:g}; wrong: it is the {similarities[WRONG]:g}. P is its softmax "
        "in percent; pull is the slope of the loss by its similarity, equal to the push on all others together",
    )
    figure = output / "explain.svg"
    draw_explanation(figure, similarities, min(0.02, *temperatures), max(2.0, *temperatures))
    log(f"figure: {figure}")
    log("next: python -m moco.temperature  (the same in real runs; docs/temperature.md says what to look for)")


def sweep(config: TemperatureConfig) -> list[Run]:
    """Trains what is not trained yet, measures every finished run, writes results.json and the figures.

    Returns:
        The finished runs, by temperature and seed.

    Raises:
        ConfigError: if the output holds another study, or matplotlib is missing.
        ValueError: naming the runs that failed, behind the results of the others.
    """
    matplotlib()  # before the runs, not behind them
    device = pick_device(config.device)
    output = _folder(config.output)
    _refuse_other_study(output, config)
    failed = _train_all(config, output)
    # Each run's last checkpoint is measured: also after more seeds or temperatures were added.
    runs = _measure_all(config, output, device)
    if runs:
        _write(config, output, runs)
        _report(output, runs)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(config.temperatures) * config.seeds} runs failed: "
            + "; ".join(f"{name}: {why}" for name, why in failed.items())
            + f"; each one's whole output is in {output}/t*/seed*.log, and the same command tries them again"
        )
    return runs


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be made: {error.strerror}") from error
    return folder


def _refuse_other_study(output: Path, config: TemperatureConfig) -> None:
    """Temperatures and seeds may be added to a study; what its runs have in common stays."""
    common = {name: getattr(config, name) for name in ("recipe", "overrides", "epochs")}
    file = output / "study.json"
    if file.is_file():
        there = json.loads(file.read_text())
        differing = [
            f"{name}={there.get(name)} (now {value})" for name, value in common.items() if there.get(name) != value
        ]
        if differing:
            raise ConfigError(
                f"output={output} holds a study with {', '.join(differing)}: choose another output, or take that back"
            )
    write_json(file, common)


def run_folder(output: Path, temperature: float, seed: int) -> Path:
    """Where a run of the study lies."""
    return output / f"t{temperature:g}" / f"seed{seed}"


def is_finished(folder: Path) -> bool:
    """Whether moco.train has ended there: it writes the encoder last."""
    return (folder / "encoder.safetensors").is_file()


def _planned(config: TemperatureConfig, output: Path) -> Iterator[tuple[float, int, Path]]:
    """All runs of the study, seed after seed: a study that is stopped has whole curves first."""
    for seed in range(config.seeds):
        for temperature in config.temperatures:
            yield temperature, seed, run_folder(output, temperature, seed)


def command_of(config: TemperatureConfig, temperature: float, seed: int, folder: Path) -> list[str]:
    """The run as a command line."""
    return [
        sys.executable,
        "-m",
        "moco.train",
        f"experiment={config.recipe}",
        *config.overrides,
        *([] if config.epochs is None else [f"epochs={config.epochs}"]),
        *([f"checkpoint.keep_epochs={config.keep_epochs}"] if config.keep_epochs else []),
        f"method.temperature={temperature!r}",
        f"seed={seed}",
        f"run={folder}",
    ]


def _train_all(config: TemperatureConfig, output: Path) -> dict[str, str]:
    """Runs what is not finished; a run that fails does not keep the next one from running.

    Returns:
        What each run that failed said last, by its directory.
    """
    planned = list(_planned(config, output))
    open_ones = [each for each in planned if not is_finished(each[2])]
    if len(open_ones) < len(planned):
        log(f"{len(planned) - len(open_ones)} of {len(planned)} runs are finished already in {output}")
    failed = {}
    with progress_bar("training runs", quiet=False) as progress:
        progress(len(planned) - len(open_ones), len(planned))
        for number, (temperature, seed, folder) in enumerate(open_ones, len(planned) - len(open_ones) + 1):
            why = _train(command_of(config, temperature, seed, folder), folder)
            log(f"run {number} of {len(planned)}, T {temperature:g}, seed {seed}: {why or 'finished'}")
            progress(number, len(planned))
            if why:
                failed[str(folder)] = why
    return failed


def _train(command: Sequence[str], folder: Path) -> str:
    """One run, its output in FOLDER.log.

    Returns:
        What it said last if it failed, else "".

    Raises:
        SystemExit: if it was told to stop, with its status: the study stops as well, and goes on like it.
        ValueError: if no process can be started.
    """
    log_file = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        with _forwarded(process):
            status = process.wait()
    if status == 0:
        return ""
    said = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1] if said else f"{shlex.join(command)} ended with status {status}"
    if status == PREEMPTED:
        log(last)
        sys.exit(PREEMPTED)
    return last if status > 0 else f"ended by signal {-status}; last line: {last}"


@contextmanager
def _forwarded(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """SIGTERM and SIGUSR1 go on to the run, which saves and leaves; Ctrl-C reaches it from the terminal by itself."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda signal_received, _: process.send_signal(signal_received))
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield
    except KeyboardInterrupt:
        process.wait()  # it has heard it too, and saves
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure_all(config: TemperatureConfig, output: Path, device: torch.device) -> list[Run]:
    finished = sorted(
        (each for each in _planned(config, output) if is_finished(each[2])), key=lambda each: (each[0], each[1])
    )
    if not finished:
        return []
    if config.threads:
        torch.set_num_threads(config.threads)
    told = yaml.safe_load((finished[0][2] / "config.yaml").read_text())
    sources = open_sources(DataConfig(**told["data"]), bank_size=told["evaluate"]["bank_size"])
    few = (config.images, config.k, config.labels_per_class, config.draws, config.bins)
    runs = []
    with progress_bar("measuring", quiet=False) as progress:
        for number, (temperature, seed, folder) in enumerate(finished, 1):
            runs.append(measure(folder, temperature, seed, sources, *few, device))
            progress(number, len(finished))
    return runs


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a temperature: each measure's mean over the seeds, and standard deviation (n - 1), null for one seed."""
    rows = []
    for temperature in sorted({run.temperature for run in runs}):
        group = [run for run in runs if run.temperature == temperature]
        measured: dict[str, list[float | None]] = {
            "knn": [None if run.knn is None else run.knn.mean for run in group],
            "uniformity": [run.projection.uniformity for run in group],
            "tolerance": [run.projection.tolerance for run in group],
            "alignment": [run.projection.alignment for run in group],
            "effective_negatives": [run.contrast.effective_negatives for run in group],
            "push": [run.contrast.push for run in group],
            "seconds": [run.seconds for run in group],
        }
        rows.append(
            {"temperature": temperature, "seeds": len(group)} | {name: _spread(each) for name, each in measured.items()}
        )
    return rows


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)) if known else None, "std": deviation}


def _write(config: TemperatureConfig, output: Path, runs: Sequence[Run]) -> None:
    """results.json and the figures."""
    results = {
        "command": "temperature",
        "settings": asdict(config),
        "summary": summary(runs),
        "bin_edges": bin_edges(config.bins).tolist(),
        "runs": [run.plain() for run in runs],
        "provenance": provenance(),
    }
    write_json(output / "results.json", results)
    for name, draw in FIGURES.items():
        draw(output / name, runs)


def _report(output: Path, runs: Sequence[Run]) -> None:
    """The closing table, and where things are."""

    def cell(told: Mapping[str, float | None], digits: int) -> str:
        if told["mean"] is None:
            return "–"
        return f"{told['mean']:.{digits}f}" + (f" ± {told['std']:.{digits}f}" if told["std"] is not None else "")

    rows = [
        [
            f"{row['temperature']:g}",
            cell(row["knn"], 1),
            cell(row["uniformity"], 2),
            cell(row["tolerance"], 3),
            cell(row["alignment"], 3),
            cell(row["effective_negatives"], 1),
            duration(row["seconds"]["mean"]),
        ]
        for row in summary(runs)
    ]
    table(
        "temperature study",
        ["T", "few-label kNN %", "uniformity", "tolerance", "alignment", "effective negatives", "time"],
        rows,
        f"{runs[0].pictures:,} pictures, {runs[0].contrast.negatives:,} negatives; kNN on the backbone's features, the "
        "rest on the projection, which the loss sees; ± is the standard deviation over seeds",
    )
    log(f"figures: {', '.join(str(output / name) for name in FIGURES)}")
    log(f"numbers: {output / 'results.json'}")
    best = max(
        (run for run in runs if run.knn is not None), key=lambda run: run.knn.mean if run.knn else 0, default=None
    )
    if best is not None:
        log(f"next: python -m moco.knn run={best.path}  (the highest kNN, at T {best.temperature:g})")
