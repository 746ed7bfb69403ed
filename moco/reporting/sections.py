"""Sections of a report that need only the files of a run, no data and no encoder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml
from markupsafe import Markup

from moco.analysis.doctor import Alarm
from moco.config import EvaluateConfig, TrainConfig
from moco.evaluation.knn_classifier import Accuracy, knn_title
from moco.reporting.curves import charts
from moco.reporting.markup import part
from moco.reporting.page import Figures, Section, facts, paragraph
from moco.reporting.run_record import Run, by_epoch, names
from moco.runs.directory import flatten
from moco.runtime.console import duration, percent
from moco.runtime.provenance import provenance

Fact = tuple[str, list[str]]  # a name, and the value of each run

_IGNORED = {"run", "device", "threads"}  # settings without effect on the results
_GROUPS = {
    "accuracy": "Accuracy and training",
    "train": "Accuracy and training",
    "speed": "Speed",
    "analysis": "Analysis",
}


def headline(runs: Sequence[Run], images: Sequence[int | None], alarms: Sequence[Sequence[Alarm]]) -> Markup:
    """Return a table of the main settings and results.

    Args:
        runs: the runs.
        images: number of training images per run; None if the data was not opened.
        alarms: the doctor's findings per run.
    """
    rows: list[Fact] = [
        ("state", [progress(run) for run in runs]),
        ("method", [_method(run) for run in runs]),
        ("encoder", [_encoder(run) for run in runs]),
        ("data", [_data(run, count) for run, count in zip(runs, images, strict=True)]),
        ("batch", [f"{run.get('batch_size', '?')}" for run in runs]),
        ("optimizer", [_optimizer(run) for run in runs]),
        ("training time", [duration(run.state["seconds"]) if "seconds" in run.state else "–" for run in runs]),
        *_accuracies(runs),
        ("doctor", [f"{len(each)} finding{'s' * (len(each) != 1)}" if each else "no findings" for each in alarms]),
    ]
    return facts("Settings and results", rows, names(runs))


def progress(run: Run) -> str:
    """Describe the training progress."""
    if math.isnan(run.total_steps):
        return f"not finished: step {run.step:,}"
    total = round(run.total_steps)
    if run.finished:
        return f"finished: {run.get('epochs')} epochs, {total:,} steps"
    epoch = run.step / run.steps_per_epoch
    return f"not finished: step {run.step:,} of {total:,} (epoch {epoch:.1f} of {run.get('epochs')})"


def _method(run: Run) -> str:
    method = run.method
    parts = [method.name]
    if method.queue_size:
        parts.append(f"queue {method.queue_size:,}")
    parts.append(f"temperature {method.temperature}")
    if method.has_momentum_encoder:
        parts.append(f"momentum {method.momentum}")
    return ", ".join(parts + ["with labels"] * method.labels)


def _encoder(run: Run) -> str:
    options = ", ".join(f"{name} {value}" for name, value in run.get("model.options", {}).items())
    return f"{run.get('model.backbone', '?')}{f' ({options})' if options else ''}, {run.get('augment.size', '?')} px"


def _data(run: Run, count: int | None) -> str:
    name = str(run.get("data.name", "?"))
    where = f" {run.get('data.root')}" if name == "folder" else ""
    return f"{name}{where}" + (f", {count:,} training images" if count else "")


def _optimizer(run: Run) -> str:
    optim = run.get("optim", {})
    per = f" at batch {optim['base_batch']}" if optim.get("base_batch") else ""
    return f"{optim.get('name', '?')}, lr {optim.get('lr', '?')}{per}, {optim.get('schedule', '?')}"


def _accuracies(runs: Sequence[Run]) -> list[Fact]:
    """Return the live accuracy and its baselines; nothing if no run has labels."""
    by_run = [_accuracy(run) for run in runs]
    kinds = ("raw pixels", "untrained", "initialized", "best", "last")
    rows = [
        (f"accuracy, {kind}", [one.get(kind, "–") for one in by_run])
        for kind in kinds
        if any(kind in one for one in by_run)
    ]
    titles = [_title(run) if one else "no labels" for run, one in zip(runs, by_run, strict=True)]
    return [("kind of accuracy", titles), *rows] if rows else []


def _accuracy(run: Run) -> dict[str, str]:
    """Return accuracies as text, by kind; from metrics.jsonl if there is no checkpoint."""
    first = "initialized" if run.get("init_from") else "untrained"
    history: list[dict[str, Any]] = run.state.get("history") or []
    if history and all("knn" in entry for entry in history):
        start, last = history[0], history[-1]
        shown = {"raw pixels": str(Accuracy(*start["raw_pixels"]))} if start.get("raw_pixels") else {}
        shown[first] = str(Accuracy(*start["knn"]))
        trained = [entry for entry in history if entry["step"] > 0]
        if trained:
            best = max(trained, key=lambda entry: entry["knn"][0])
            shown["best"] = f"{Accuracy(*best['knn'])} (epoch {best['epoch']:g})"
            shown["last"] = f"{Accuracy(*last['knn'])} ({last['knn'][0] - start['knn'][0]:+.1f} over {first})"
        return shown
    series = {"raw pixels": "accuracy/raw_pixels", first: f"accuracy/{first}", "last": "accuracy/knn"}
    return {kind: f"{run.values[name][1][-1]:.1f} %" for kind, name in series.items() if name in run.values}


def _title(run: Run) -> str:
    known = {each.name for each in fields(EvaluateConfig)}
    return knn_title(
        EvaluateConfig(**{name: value for name, value in run.get("evaluate", {}).items() if name in known})
    )


def differences(runs: Sequence[Run]) -> Markup:
    """Return a table of the settings in which the runs differ."""
    defaults = asdict(TrainConfig())  # of fields that are newer than a run
    del defaults["method"]  # Run.method has its own
    flat = [flatten(defaults) | flatten(run.config | {"method": asdict(run.method)}) for run in runs]
    values = {
        name: ["empty" if each.get(name) == "" else str(each.get(name, "–")) for each in flat]
        for name in sorted(set().union(*flat) - _IGNORED)
    }
    rows = [(name, own) for name, own in values.items() if len(set(own)) > 1]
    if not rows:
        return paragraph("None: the runs have the same settings.")
    return facts("Settings that differ", rows, names(runs))


def curves(runs: Sequence[Run], figures: Figures) -> Section:
    """Return all recorded metrics as charts, by kind."""
    series, x_title = by_epoch(runs)
    if not any(series.values()):
        return Section("Curves", paragraph("No metrics are recorded yet."))
    drawn, constant = charts(series)
    by_title: dict[str, Markup] = {}
    for chart in drawn:
        title = _GROUPS.get(chart.group, chart.group)
        by_title[title] = by_title.get(title, Markup()) + figures.add_chart(chart, x_title)
    parts = [Section(title, part("charts", body)) for title, body in by_title.items()]
    dashed = any(curve.reference for chart in drawn for curve in chart.curves)
    note = "Dashed lines are reference values. " * dashed + f"Constant: {'; '.join(constant)}." * bool(constant)
    return Section("Curves", paragraph(note, "soft") if note else Markup(), parts)


def evaluations(run: Run) -> Markup:
    """Return results.json as a table; of repeated evaluations only the newest."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in run.results:
        setting = entry.get("settings", {}).get("features", "")
        key = tuple(str(each) for each in (entry.get("command"), entry.get("protocol"), setting, entry.get("encoder")))
        newest.pop(key, None)
        newest[key] = entry
    if not newest:
        return paragraph(f"None yet. To evaluate: python -m moco.linear run={run.path} 'compare=[untrained,pixels]'")
    columns = ["evaluation", "encoder", "top-1 %", "spread", "top-5 %", "images", "step", "other metrics", "made"]
    rows = [_evaluation(each) for each in newest.values()]
    return part("table", "Accuracy on held-out images", columns, rows)


def _evaluation(entry: Mapping[str, Any]) -> list[str]:
    figures = entry["figures"]
    known = {"top1", "top5", "count", "std", "draws", "top1_half_width95"}
    other = [
        f"{name} {value:.4g}" for name, value in figures.items() if name not in known and isinstance(value, int | float)
    ]
    held_out = figures.get("count") or entry.get("data", {}).get("held_out", "–")
    return [
        f"{entry.get('command', '?')}, {entry.get('protocol', '?')}",
        str(entry.get("encoder", "?")),
        percent(figures.get("top1")),
        _spread(figures),
        percent(figures.get("top5")),
        str(held_out),
        str(entry.get("step", "–")),
        ", ".join(other) or "–",
        str(entry.get("time", "–"))[:16].replace("T", " "),
    ]


def _spread(figures: Mapping[str, Any]) -> str:
    """Describe the uncertainty of the top-1 accuracy."""
    if figures.get("top1_half_width95") is not None:
        return f"± {figures['top1_half_width95']:.1f} (95 % over seeds)"
    if figures.get("std") is not None:
        return f"± {figures['std']:.1f} over {figures.get('draws', '?')} draws"
    interval = figures.get("interval95")
    return f"{interval[0]:.1f} – {interval[1]:.1f} (95 %)" if interval else "–"


def environment(run: Run) -> Markup:
    """Return versions, hardware and all settings of the run and of this page."""
    versions, now = run.state.get("versions", {}), provenance()
    evaluated = {f"commit {each.get('commit')} on {each.get('machine')}" for each in run.results if each.get("commit")}
    rows = [
        ("run", str(run.path)),
        ("trained with", _software(versions)),
        ("processes", str(run.state.get("world_size", "?"))),
        ("device, precision", f"{run.get('device', '?')}, {run.get('precision', '?')}"),
        ("checkpoint", run.checkpoint.name if run.checkpoint else "none yet"),
        ("evaluations made with", "; ".join(sorted(evaluated)) or "–"),
        ("this page made with", _software(now)),
        ("this page made on", f"{now['machine']}, {now['time'][:16].replace('T', ' ')} UTC"),
    ]
    settings = yaml.safe_dump(run.config, sort_keys=False).splitlines()
    return facts("Environment", [(name, [value]) for name, value in rows], [run.name]) + part("settings", settings)


def _software(versions: Mapping[str, Any]) -> str:
    moco, torch = versions.get("moco", "?"), versions.get("torch", "?")
    return f"moco {moco}, torch {torch}, commit {versions.get('commit') or 'unknown'}"
