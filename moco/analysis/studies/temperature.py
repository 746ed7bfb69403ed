"""The temperature study: train a run at each temperature, measure and draw; or explain one query with a few candidates.

Hydra's multirun is not used: it runs all jobs in one process, once per rank under torchrun, and reruns finished jobs.
Here each run is a process with its own directory, so the same command resumes the study.
"""

import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moco.analysis import bin_edges, explain_temperature
from moco.analysis.studies import open_study
from moco.analysis.studies.figures import FIGURES, RIGHT, WRONG, draw_explanation
from moco.analysis.studies.measures import Run, by_temperature, measure
from moco.analysis.studies.outputs import VOTE_TEMPERATURE, note_several_labels
from moco.config import ComputeConfig, ConfigError, DataConfig, config_dir, require
from moco.config.quoting import value_text
from moco.config.temperature import TemperatureConfig
from moco.data.opening import open_sources
from moco.data.recorded import recorded_data
from moco.files import write_json
from moco.runs.sweep import is_finished, run_to_end
from moco.runtime.console import duration, log, log_next, percent, progress_bar, table
from moco.runtime.next_command import command, computing_as
from moco.runtime.preemption import PREEMPTED, keeping
from moco.runtime.provenance import provenance
from moco.untrusted import read_json, read_yaml

# Not results.json: the output may be a run directory, where results.json holds evaluations.
RESULTS = "temperature.json"


class PlannedRun(NamedTuple):
    """A run of the study, which may not be trained yet."""

    temperature: float
    seed: int
    folder: Path


def study(config: TemperatureConfig) -> None:
    """Do the work of `moco.temperature`: `explain` or `sweep`."""
    if config.mode == "explain":
        explain(config)
    else:
        sweep(config)


def explain(config: TemperatureConfig) -> None:
    """Draw softmax, loss and gradient of one query against the temperature, and print them as a table."""
    output, _ = open_study(config.output, ComputeConfig("cpu"))
    similarities, temperatures = config.similarities, sorted(config.temperatures)
    grid = torch.tensor(temperatures, dtype=torch.float64)
    explained = {answer: explain_temperature(torch.tensor(similarities), answer, grid) for answer in (RIGHT, WRONG)}
    rows = []
    for i, temperature in enumerate(temperatures):
        row = [f"{temperature:g}"]
        for answer, each in explained.items():
            softmax = percent(100 * each.softmax[i, answer].item())
            row += [softmax, f"{each.loss[i]:.3g}", f"{-each.gradient[i, answer]:.3g}"]
        rows.append(row)
    table(
        f"one query, candidates with similarities {', '.join(f'{each:g}' for each in similarities)}",
        ["T", "right: P %", "loss", "pull", "wrong: P %", "loss", "pull"],
        rows,
        f"right: the positive has similarity {similarities[RIGHT]:g}; wrong: it has {similarities[WRONG]:g}. P is the "
        "softmax of the positive; pull is minus the derivative of the loss with respect to the similarity of the "
        "positive. The derivatives with respect to the other similarities add up to the pull",
    )
    figure = output / "explain.svg"
    draw_explanation(figure, similarities, min(0.02, *temperatures), max(2.0, *temperatures))
    log(f"figure: {figure}")
    log_next("python -m moco.temperature", "the effect of T in real runs; see docs/temperature.md")


def sweep(config: TemperatureConfig) -> list[Run]:
    """Train the unfinished runs, measure all finished ones, write results and figures, and return the finished runs.

    Raises:
        ConfigError: if the output holds another study.
        ValueError: if runs failed, after the results of the others are written.
    """
    output, device = open_study(config.output, config)
    _check_and_record(output, config)
    planned = plan(config, output)
    with keeping("saved runs", lambda: any(any(run.folder.glob("checkpoints/*.pt")) for run in planned)):
        failed = _train_all(config, planned)
        runs = _measure_all(config, planned, device)
    if runs:
        _show(runs)  # before writing: the results stay visible if writing fails
        _write(config, output, runs)
        _log_files(config, output, runs)
    if failed:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in failed.items())
        raise ValueError(
            f"{len(failed)} of {len(planned)} runs failed: {reasons}; see {output}/t*/seed*.log, and run the same "
            "command again to retry them"
        )
    return runs


def plan(config: TemperatureConfig, output: Path) -> list[PlannedRun]:
    """Return all runs, seed by seed, so that an interrupted study has complete curves of its first seeds."""
    return [
        PlannedRun(temperature, seed, output / f"t{temperature:g}" / f"seed{seed}")
        for seed in range(config.seeds)
        for temperature in config.temperatures
    ]


def command_of(config: TemperatureConfig, run: PlannedRun) -> list[str]:
    """Return the command that trains a run."""
    words = [sys.executable, "-m", "moco.train", f"experiment={config.recipe}", *config.overrides]
    if config.plugins:
        words.append(f"plugins={value_text(config.plugins)}")
    if config.epochs is not None:
        words.append(f"epochs={config.epochs}")
    if config.keep_epochs:
        words.append(f"checkpoint.keep_epochs={config.keep_epochs}")
    folder = value_text(str(run.folder))
    return [*words, f"method.temperature={run.temperature!r}", f"seed={run.seed}", f"run={folder}"]


def _check_and_record(output: Path, config: TemperatureConfig) -> None:
    """Record recipe, overrides and epochs in study.json, or refuse other values than the recorded ones.

    A study can be continued with more temperatures and seeds.
    """
    common = {name: getattr(config, name) for name in ("recipe", "overrides", "epochs")}
    file = output / "study.json"
    try:
        before = read_json(file) if file.exists() else common
        require(isinstance(before, dict), "it is no JSON object")
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it") from error
    different = [f"{name}={before.get(name)} (now {now})" for name, now in common.items() if before.get(name) != now]
    if different:
        raise ConfigError(
            f"output={output} holds a study with {', '.join(different)}: set another output, or restore these values"
        )
    write_json(file, common)


def _train_all(config: TemperatureConfig, planned: Sequence[PlannedRun]) -> dict[str, str]:
    """Train the unfinished runs, continue after a failure, and return the reasons of the failures by directory."""
    unfinished = [run for run in planned if not is_finished(run.folder)]
    done = len(planned) - len(unfinished)
    if done:
        log(f"{done} of {len(planned)} runs are already finished")
    failed = {}
    with progress_bar("training runs") as progress:
        for number, run in enumerate(unfinished, done + 1):
            progress(number - 1, len(planned))
            reason = train(command_of(config, run), run.folder)
            log(f"run {number} of {len(planned)}, T {run.temperature:g}, seed {run.seed}: {reason or 'finished'}")
            if reason:
                failed[str(run.folder)] = reason
    return failed


def train(words: Sequence[str], folder: Path) -> str:
    """Train one run, with its output in FOLDER.log. Return "" after success, else the reason of the failure.

    The reason is the last line of the output and, if a signal ended the run, its number.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the run has ended.
        SystemExit: if the run was preempted or this process was asked to stop; with the status of a preempted run.
    """
    log_file = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    status, stopped_by = run_to_end(words, log_file)
    lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else f"{shlex.join(words)} ended with status {status}"
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by or status == PREEMPTED:
        log(last)
        sys.exit(PREEMPTED)
    if status < 0:
        return f"ended by signal {-status}; last line: {last}"
    return last if status else ""


def _measure_all(config: TemperatureConfig, planned: Sequence[PlannedRun], device: torch.device) -> list[Run]:
    """Measure the last checkpoint of each finished run."""
    finished = sorted(run for run in planned if is_finished(run.folder))
    if not finished:
        return []
    trained = read_yaml(finished[0].folder / "config.yaml")
    source, fix = str(finished[0].folder), "set another output, to train the runs again"
    # All runs have the same data. Images are fetched from an address in a run's file only if the recipe or the
    # overrides name the address too, because the file may come from others: see `recorded_data`.
    root = trained["data"]["root"]
    given = {"root": root} if root in _given_roots(config) else {}
    data = recorded_data(trained["data"], given, source, trusted=True, fix=fix)
    sources = open_sources(DataConfig(**data), bank_size=trained["evaluate"]["bank_size"])
    note_several_labels(sources.train)
    runs = []
    with progress_bar("measuring") as progress:
        for number, (temperature, seed, folder) in enumerate(finished, 1):
            runs.append(measure(folder, temperature, seed, sources, config, device))
            progress(number, len(finished))
    return runs


def _given_roots(config: TemperatureConfig) -> list[str | None]:
    """Return the values of data.root in the recipe and in the overrides."""
    recipe = read_yaml(Path(config_dir(), "experiment", f"{config.recipe}.yaml"))
    pairs = [override.lstrip("+").partition("=")[::2] for override in config.overrides]
    return [recipe.get("data", {}).get("root"), *(value.strip("'\"") for name, value in pairs if name == "data.root")]


class Column(NamedTuple):
    """A measure in the summary."""

    title: str  # of its column in the printed table; "" for no column (`_show` adds the one for the seconds)
    digits: int
    of: Callable[[Run], float | None]


SUMMARY = {
    "knn": Column("few-label kNN %", 1, lambda run: None if run.knn is None else run.knn.mean),
    "uniformity": Column("uniformity", 2, lambda run: run.projection.uniformity),
    "tolerance": Column("tolerance", 3, lambda run: run.projection.tolerance),
    "alignment": Column("alignment", 3, lambda run: run.projection.alignment),
    "effective_negatives": Column("effective negatives", 1, lambda run: run.contrast.effective_negatives),
    "push": Column("", 3, lambda run: run.contrast.push),
    "seconds": Column("", 0, lambda run: run.seconds),
}


FEW_SEEDS = 5  # the standard deviation of 5 normal values has itself a relative standard deviation of 1/3


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per temperature: mean and standard deviation (n - 1; null for one seed) of each measure."""
    rows = []
    for temperature, group in by_temperature(runs).items():
        statistics = {name: _mean_and_std([column.of(run) for run in group]) for name, column in SUMMARY.items()}
        rows.append({"temperature": temperature, "seeds": len(group)} | statistics)
    return rows


def _mean_and_std(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)) if known else None, "std": deviation}


def _write(config: TemperatureConfig, output: Path, runs: Sequence[Run]) -> None:
    results = {
        "command": "temperature",
        "settings": asdict(config),
        "summary": summary(runs),
        "bin_edges": bin_edges(config.bins).tolist(),
        "runs": [run.plain() for run in runs],
        "provenance": provenance(),
    }
    write_json(output / RESULTS, results)
    for name, draw in FIGURES.items():
        draw(output / name, runs)


def _show(runs: Sequence[Run]) -> None:
    """Print the closing table."""

    def cell(value: Mapping[str, float | None], digits: int) -> str:
        if value["mean"] is None:
            return "–"
        return f"{value['mean']:.{digits}f}" + (f" ± {value['std']:.{digits}f}" if value["std"] is not None else "")

    shown = {name: column for name, column in SUMMARY.items() if column.title}
    found, rows = summary(runs), []
    for row in found:
        measures = [cell(row[name], column.digits) for name, column in shown.items()]
        rows.append([f"{row['temperature']:g}", *measures, duration(row["seconds"]["mean"])])
    note = f"{runs[0].pictures:,} images, {runs[0].contrast.negatives:,} negatives; kNN uses the backbone's features, "
    note += "the other columns use the projection, as the loss does"
    if (seeds := max(row["seeds"] for row in found)) > 1:
        note += f"; ± is the standard deviation over {seeds} seeds"
        note += ", a rough estimate of so few" * (seeds < FEW_SEEDS)
    table(
        "temperature study",
        ["T", *(column.title for column in shown.values()), "time"],
        rows,
        note,
    )


def _log_files(config: TemperatureConfig, output: Path, runs: Sequence[Run]) -> None:
    """Print the paths of the files and the next command."""
    log(f"figures: {', '.join(str(output / name) for name in FIGURES)}")
    log(f"results: {output / RESULTS}")
    with_labels = [(run.knn.mean, run) for run in runs if run.knn is not None]
    if with_labels:
        _, best = max(with_labels, key=lambda pair: pair[0])
        fields = {"k": [config.k], "temperature": [VOTE_TEMPERATURE]}
        fields |= {name: getattr(config, name) for name in ("labels_per_class", "draws")}
        knn = command("moco.knn", computing_as(config), run=str(best.path), **fields)
        log_next(knn, f"the highest few-label kNN of the held-out images, at T {best.temperature:g}")
