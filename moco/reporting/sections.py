"""The parts of a report that come from a run's files alone, as markup."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml

from moco.analysis.doctor import Alarm
from moco.config import EvaluateConfig, TrainConfig
from moco.evaluation.knn_classifier import Accuracy, knn_title
from moco.reporting import html, page
from moco.reporting.curves import charts
from moco.reporting.page import Figures, Section
from moco.reporting.run_record import Run, by_epoch, names
from moco.runs.directory import flatten
from moco.runtime.console import duration, percent
from moco.runtime.provenance import provenance

Fact = tuple[str, list[str]]  # what, and of each run what it is

_ELSEWHERE = {"run", "device", "threads"}  # differ without a meaning
_GROUPS = {
    "accuracy": "Accuracy and training",
    "train": "Accuracy and training",
    "speed": "Speed",
    "analysis": "Analysis",
}


def headline(runs: Sequence[Run], images: Sequence[int | None], found: Sequence[Sequence[Alarm]]) -> str:
    """What was run and what came of it.

    Args:
        runs: the runs.
        images: of each run's data set; None where it was not opened.
        found: the doctor's findings.
    """
    rows: list[Fact] = [
        ("state", [state(run) for run in runs]),
        ("method", [_method(run) for run in runs]),
        ("encoder", [_encoder(run) for run in runs]),
        ("data", [_data(run, count) for run, count in zip(runs, images, strict=True)]),
        ("batch", [f"{run.get('batch_size', '?')}" for run in runs]),
        ("optimizer", [_optimizer(run) for run in runs]),
        ("training time", [duration(run.state["seconds"]) if "seconds" in run.state else "–" for run in runs]),
        *_accuracies(runs),
        ("doctor", [f"{len(each)} finding{'s' * (len(each) != 1)}" if each else "nothing to report" for each in found]),
    ]
    return page.facts("What was run", rows, names(runs))


def state(run: Run) -> str:
    """How far it is."""
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
    return f"{name}{where}" + (f", {count:,} training pictures" if count else "")


def _optimizer(run: Run) -> str:
    optim = run.get("optim", {})
    per = f" at batch {optim['base_batch']}" if optim.get("base_batch") else ""
    return f"{optim.get('name', '?')}, lr {optim.get('lr', '?')}{per}, {optim.get('schedule', '?')}"


def _accuracies(runs: Sequence[Run]) -> list[Fact]:
    """The live accuracy against its baselines, where any run has one."""
    each = [_accuracy(run) for run in runs]
    kinds = [
        kind for kind in ("raw pixels", "untrained", "initialized", "best", "last") if any(kind in one for one in each)
    ]
    titles = [_title(run) if one else "no labels" for run, one in zip(runs, each, strict=True)]
    lines = [(f"accuracy, {kind}", [one.get(kind, "–") for one in each]) for kind in kinds]
    return [("accuracy is", titles), *lines] if kinds else []


def _accuracy(run: Run) -> dict[str, str]:
    first = "initialized" if run.get("init_from") else "untrained"
    history: list[dict[str, Any]] = run.state.get("history") or []
    if history and all("knn" in entry for entry in history):
        start, last = history[0], history[-1]
        said = {"raw pixels": str(Accuracy(*start["raw_pixels"]))} if start.get("raw_pixels") else {}
        said[first] = str(Accuracy(*start["knn"]))
        trained = [entry for entry in history if entry["step"] > 0]
        if trained:
            best = max(trained, key=lambda entry: entry["knn"][0])
            said["best"] = f"{Accuracy(*best['knn'])} (epoch {best['epoch']:g})"
            said["last"] = f"{Accuracy(*last['knn'])} ({last['knn'][0] - start['knn'][0]:+.1f} over {first})"
        return said
    series = {"raw pixels": "accuracy/raw_pixels", first: f"accuracy/{first}", "last": "accuracy/knn"}
    return {kind: f"{run.values[name][1][-1]:.1f} %" for kind, name in series.items() if name in run.values}


def _title(run: Run) -> str:
    known = {each.name for each in fields(EvaluateConfig)}
    return knn_title(
        EvaluateConfig(**{name: value for name, value in run.get("evaluate", {}).items() if name in known})
    )


def differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    usual = asdict(TrainConfig())  # the value of a field that is newer than the run
    flat = [flatten(usual | run.config | {"method": asdict(run.method)}) for run in runs]
    told = {
        name: ["empty" if each.get(name) == "" else str(each.get(name, "–")) for each in flat]
        for name in sorted(set().union(*flat))
    }
    rows = [(name, said) for name, said in told.items() if name not in _ELSEWHERE and len(set(said)) > 1]
    if not rows:
        return page.paragraph("None: the runs were told the same.")
    return page.facts("Settings that differ", rows, names(runs))


def curves(runs: Sequence[Run], figures: Figures) -> Section:
    """All that was recorded, by kind."""
    series, x_title = by_epoch(runs)
    if not any(series.values()):
        return Section("Curves", page.paragraph("Nothing was recorded yet."))
    drawn, constant = charts(series)
    parts = []
    titles = [_GROUPS.get(chart.group, chart.group) for chart in drawn]
    for title in dict.fromkeys(titles):
        body = "".join(figures.chart(chart, x_title) for chart, own in zip(drawn, titles, strict=True) if own == title)
        parts.append(Section(title, f'<div class="charts">{body}</div>\n'))
    dashed = "Dashed is what a curve is to be held against. "
    said = dashed * any(curve.reference for chart in drawn for curve in chart.curves)
    said += f"Never changed: {'; '.join(constant)}." if constant else ""
    return Section("Curves", page.paragraph(said, "soft") if said else "", parts)


def evaluations(run: Run) -> str:
    """results.json as a table: of a figure that was made twice the newest."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in run.results:
        setting = entry.get("settings", {}).get("features", "")
        key = tuple(str(part) for part in (entry.get("command"), entry.get("protocol"), setting, entry.get("encoder")))
        newest.pop(key, None)
        newest[key] = entry
    if not newest:
        return page.paragraph(f"None yet. Next: python -m moco.linear run={run.path} 'compare=[untrained,pixels]'")
    columns = ["evaluation", "encoder", "top-1 %", "spread", "top-5 %", "pictures", "step", "other figures", "made"]
    return html.table(
        "Evaluations, in percent of held-out pictures", columns, [_line(each) for each in newest.values()]
    )


def _line(entry: Mapping[str, Any]) -> list[str]:
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
    """What a figure's uncertainty is, in words."""
    if figures.get("top1_half_width95") is not None:
        return f"± {figures['top1_half_width95']:.1f} (95 % over seeds)"
    if figures.get("std") is not None:
        return f"± {figures['std']:.1f} over {figures.get('draws', '?')} draws"
    interval = figures.get("interval95")
    return f"{interval[0]:.1f} – {interval[1]:.1f} (95 %)" if interval else "–"


def environment(run: Run) -> str:
    """With what it was trained, judged and reported; the configuration in full."""
    versions, now = run.state.get("versions", {}), provenance()
    subject = sorted(
        {f"commit {entry.get('commit')} on {entry.get('machine')}" for entry in run.results if entry.get("commit")}
    )
    rows: list[Fact] = [
        ("run", [str(run.path)]),
        (
            "trained with",
            [
                f"moco {versions.get('moco', '?')}, torch {versions.get('torch', '?')}, "
                f"commit {versions.get('commit') or 'unknown'}"
            ],
        ),
        ("processes", [str(run.state.get("world_size", "?"))]),
        ("device, precision", [f"{run.get('device', '?')}, {run.get('precision', '?')}"]),
        ("checkpoint", [run.checkpoint.name if run.checkpoint else "none yet"]),
        ("evaluations made with", ["; ".join(subject) or "–"]),
        ("this page made with", [f"moco {now['moco']}, torch {now['torch']}, commit {now['commit'] or 'unknown'}"]),
        ("this page made on", [f"{now['machine']}, {now['time'][:16].replace('T', ' ')} UTC"]),
    ]
    return page.facts("Environment", rows, [run.name]) + page.settings(yaml.safe_dump(run.config, sort_keys=False))
