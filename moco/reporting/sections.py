"""Sections of a report that need only the files of a run, not its data or its encoder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from moco.analysis.doctor import Alarm
from moco.config import EvaluateConfig, TrainConfig, flatten
from moco.config.data import FOLDERS
from moco.data.sources import folders
from moco.evaluation.knn_classifier import Accuracy, knn_title
from moco.evaluation.resumable import CURVES
from moco.reporting.curves import Chart, Series, charts
from moco.reporting.markup import part
from moco.reporting.page import Figures, Section, facts
from moco.reporting.run_record import Run, by_epoch, names
from moco.runs.comparison import chosen_neighbors, evaluated_on, placed
from moco.runs.metrics import read_metrics
from moco.runtime.console import duration, percent
from moco.runtime.provenance import provenance

_IGNORED = {"run", "device", "threads"}  # settings without effect on the results
_OPEN = ("accuracy/", "retrieval/", "train/loss", "train/contrast_accuracy")  # metrics whose charts are not folded
_FOLDED = {"train": "Training", "analysis": "Measures of the representation", "speed": "Speed and memory"}  # titles
_BASELINES = {"raw pixels": "raw_pixels", "untrained": "untrained"}  # names of results before the first step
_PNG, _MOST_BYTES = b"\x89PNG\r\n\x1a\n", 5_000_000  # of an image of predictions
_CROPS = "two crops of an image find each other"  # how the title of instance retrieval begins
_ACCURACIES = ("raw pixels", "untrained", "initialized", "best", "last", "online probe")  # rows of the overview


def headline(runs: Sequence[Run], alarms: Sequence[Sequence[Alarm]]) -> Markup:
    """Return a table of the main settings and results of the runs."""
    by_run = [_main_facts(run, found) for run, found in zip(runs, alarms, strict=True)]
    rows = [(name, [each[name] for each in by_run]) for name in by_run[0]]
    known = [(name, values) for name, values in rows if set(values) != {"–"}]
    return facts("Settings and results", known, names(runs))


def progress(run: Run) -> str:
    """Describe the training progress."""
    if math.isnan(run.total_steps):
        return f"not finished: step {run.step:,}"
    total = round(run.total_steps)
    if run.finished:
        return f"finished: {run.get('epochs')} epoch{'s' * (run.get('epochs') != 1)}, {total:,} steps"
    epoch = run.step / run.steps_per_epoch
    return f"not finished: step {run.step:,} of {total:,} (epoch {epoch:.1f} of {run.get('epochs')})"


def _main_facts(run: Run, alarms: Sequence[Alarm]) -> dict[str, str]:
    method, data, optim = run.method, str(run.get("data.name", "?")), run.get("optim", {})
    settings = [method.name]
    settings += [f"queue {method.queue_size:,}"] * bool(method.queue_size)
    settings += [f"temperature {method.temperature}"]
    settings += [f"momentum {method.momentum}"] * method.has_momentum_encoder + ["with labels"] * method.labels
    options = ", ".join(f"{name} {value}" for name, value in run.get("model.options", {}).items())
    folder = f" {folders(run.get('data.root'), run.get('data.more_roots'))}" if data in FOLDERS else ""
    per = f" at batch {optim['base_batch']}" if optim.get("base_batch") else ""
    measured = {}
    for name in ("accuracy", "retrieval"):
        found = _accuracy(run) if _retrieval(run) == (name == "retrieval") else {}
        measured[f"kind of {name}"] = _kind_of_accuracy(run) if found else "–"
        measured |= {f"{name}, {kind}": found.get(kind, "–") for kind in _ACCURACIES}
    return {
        "state": progress(run),
        "method": ", ".join(settings),
        "encoder": f"{run.get('model.backbone', '?')}{options and f' ({options})'}, {run.get('augment.size', '?')} px",
        "data": f"{data}{folder}" + (f", {run.images:,} training images" if run.images else ""),
        "batch": str(run.get("batch_size", "?")),
        "optimizer": f"{optim.get('name', '?')}, lr {optim.get('lr', '?')}{per}, {optim.get('schedule', '?')}",
        "training time": duration(run.state["seconds"]) if "seconds" in run.state else "–",
        **measured,
        "doctor": f"{len(alarms)} finding{'s' * (len(alarms) != 1)}" if alarms else "no findings",
    }


def _accuracy(run: Run) -> dict[str, str]:
    """Return the accuracies or retrievals during training as text, by the names in `_ACCURACIES`.

    They come from the checkpoint, or else from metrics.jsonl.
    """
    first = "initialized" if run.starts_trained else "untrained"
    history: list[dict[str, Any]] = run.state.get("history") or []
    measure = "retrieval" if _retrieval(run) else "knn"
    if history and all(measure in entry for entry in history):
        start, last = history[0], history[-1]
        shown = {name: str(Accuracy(*start[key])) for name, key in _BASELINES.items() if start.get(key)}
        shown[first] = str(Accuracy(*start[measure]))
        trained = [entry for entry in history if entry["step"] > 0]
        if trained:
            best = max(trained, key=lambda entry: entry[measure][0])
            shown["best"] = f"{Accuracy(*best[measure])} (epoch {best['epoch']:g})"
            shown["last"] = f"{Accuracy(*last[measure])} ({last[measure][0] - start[measure][0]:+.1f} over {first})"
            shown |= {"online probe": str(Accuracy(*last["probe"]))} if "probe" in last else {}
        return shown
    group = "accuracy" if measure == "knn" else "retrieval"
    series = {**_BASELINES, first: first, "last": measure, "online probe": "probe"}
    metrics = {name: f"{group}/{each}" for name, each in series.items()}
    return {name: f"{run.values[each][1][-1]:.1f} %" for name, each in metrics.items() if each in run.values}


def _kind_of_accuracy(run: Run) -> str:
    if measured := run.state.get("measured"):
        return str(measured)
    if _retrieval(run):
        return f"{_CROPS} (± standard error)"
    known = {each.name for each in fields(EvaluateConfig)}
    evaluate = {name: value for name, value in run.get("evaluate", {}).items() if name in known}
    return knn_title(EvaluateConfig(**evaluate))


def _kinds(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return the kind of each run's accuracies by metric: the classifier, and the data if they differ between runs."""
    data = [evaluated_on(run.get("data", {})) for run in runs]
    where = [f", on {each}" * (len(set(data)) > 1) for each in data]
    kinds = [_kind_of_accuracy(run).removeprefix("held-out kNN").removeprefix(_CROPS) for run in runs]
    both = dict(zip(names(runs), map(str.__add__, kinds, where), strict=True))
    return dict.fromkeys(("accuracy/knn", "retrieval/retrieval"), both) | {
        "accuracy/probe": dict(zip(names(runs), where, strict=True))
    }


def _retrieval(run: Run) -> bool:
    """Return whether the run was evaluated by instance retrieval instead of kNN."""
    return "retrieval/retrieval" in run.values


def differences(runs: Sequence[Run]) -> Markup:
    """Return a table of the settings in which the runs differ."""
    defaults = asdict(TrainConfig())  # of fields that are newer than a run
    del defaults["method"]  # Run.method has its own defaults
    flat = [flatten(defaults) | flatten(run.config | {"method": asdict(run.method)}) for run in runs]
    values = {
        name: ["empty" if each.get(name) == "" else str(each.get(name, "–")) for each in flat]
        for name in sorted(set().union(*flat) - _IGNORED)
    }
    values |= {"precision, as computed": [str(run.state.get("precision") or "–") for run in runs]}
    rows = [(name, own) for name, own in values.items() if len(set(own)) > 1]
    if not rows:
        return part("paragraph", "None: the runs have the same settings.")
    return facts("Settings that differ", rows, names(runs))


def curves(runs: Sequence[Run], figures: Figures) -> Section:
    """Return all recorded metrics as charts; the charts that are rarely read are folded, by kind."""
    series, x_title = by_epoch(runs)
    if not any(series.values()):
        return Section("Curves", part("paragraph", "No metrics are recorded yet."))
    drawn, single = charts(series, _kinds(runs))
    by_group: dict[str, list[Markup]] = {"": []}  # "": charts that are not folded
    for chart in drawn:
        group = "" if chart.metric.startswith(_OPEN) else chart.metric.partition("/")[0]
        by_group.setdefault(group, []).append(figures.add_chart(chart, x_title))
    body = part("charts", Markup().join(by_group.pop("")))
    for group, made in by_group.items():
        title = f"{_FOLDED.get(group, group.capitalize())}: {len(made)} chart{'s' * (len(made) != 1)}"
        body += part("folded", title, part("charts", Markup().join(made)))
    dashed = any(curve.reference for chart in drawn for curve in chart.curves)
    notes = ["Dashed lines are reference values."] * dashed
    if any(run.method.queue_size and getattr(run.method, "queue_start", "random") == "random" for run in runs):
        notes.append(
            "The queue starts with random keys, which are easy to tell from real ones. Until real keys have replaced "
            "them, the loss is lower and the contrast accuracy higher than later: judge the training by the charts of "
            "kNN or retrieval."
        )
    notes += [f"{reason}: {'; '.join(phrases)}." for reason, phrases in single.items()]
    return Section("Curves", (part("paragraph", " ".join(notes), "soft") if notes else Markup()) + body)


def evaluations(run: Run, figures: Figures) -> Markup:
    """Return a table of results.json, then the losses and predictions of the networks that the evaluations trained.

    If an evaluation was repeated, only its newest result is shown.
    """
    found = placed(run.results)
    if not found:
        if not run.labeled:
            none = "None, and no labeled held-out images are known."
            return part("paragraph", " To look at the encoder: ".join([none, *run.next_commands()[:1]]))
        return part("paragraph", f"None yet. To evaluate: {run.next_commands()[0]} 'compare=[untrained,pixels]'")
    rows, more = [], []
    for entry, name, data, encoder in found:
        results = entry["figures"]
        main = _main_metric(results)
        score = f"{f'{main} ' * (main != 'top1')}{percent(results.get(main))} {_spread(results)}".strip()
        rows.append([name, data, encoder, score, percent(results.get("top5"))])
        more.append([f"{name}, {encoder}", _details(entry)])
    shown = part("table", "Accuracy on held-out images", ["evaluation", "data", "encoder", "top-1 %", "top-5 %"], rows)
    shown += part(
        "folded", "Images, dates and other metrics", part("table", "Details", ["evaluation", "details"], more)
    )
    saved = {str(entry.get("saved")): entry for entry in run.results}  # a later evaluation replaces the files
    drawn = [figures.add_chart(chart, "step") for chart in _losses(run, list(saved.values()))]
    shown += part("folded", "Losses of the trainings", part("charts", Markup().join(drawn))) if drawn else Markup()
    images = [image for entry in saved.values() if (image := _predictions(run, entry))]
    return shown + (part("folded", "Predictions and ground truth", Markup().join(images)) if images else Markup())


def _beside(run: Run, entry: Mapping[str, Any], name: str) -> Path | None:
    """Return a file beside the network that an entry of results.json describes; None if there is none.

    Only a file below the run is read: results.json may come from others.
    """
    folder, command = Path(str(entry.get("saved", ""))).name, entry.get("command")
    file = run.path / str(command) / folder / name
    return file if command in ("finetune", "segment", "detect") and folder and file.is_file() else None


def _losses(run: Run, entries: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Yield a chart for each command and protocol, with the losses of its encoders."""
    groups: dict[str, dict[str, Series]] = {}
    for entry in entries:
        file = _beside(run, entry, CURVES)
        if file and (loss := read_metrics(file).get("train/loss")):
            group = groups.setdefault(f"{entry.get('command')}, {entry.get('protocol', '?')}", {})
            group[str(entry.get("encoder", "?"))] = {"train/loss": loss}
    for title, series in groups.items():
        for chart in charts(series)[0]:
            yield replace(chart, title=f"Loss of {title}", unit="")


def _predictions(run: Run, entry: Mapping[str, Any]) -> Markup:
    """Return the image that moco.segment or moco.detect wrote for an entry of results.json.

    "" if there is no such file, or if it is not a PNG of at most `_MOST_BYTES`.
    """
    file = _beside(run, entry, "predictions.png")
    if file is None:
        return Markup()
    data = file.read_bytes()
    if len(data) > _MOST_BYTES or not data.startswith(_PNG):
        return Markup()
    return part("views", data, f"{entry.get('command')}, {entry.get('protocol', '?')}, {entry.get('encoder', '?')}")


def _details(entry: Mapping[str, Any]) -> str:
    """Describe an evaluation: what it used, when it was made, and its metrics that the table of accuracies lacks."""
    results = entry["figures"]
    images = results.get("count") or entry.get("data", {}).get("held_out", "?")
    made = str(entry.get("time", "?"))[:16].replace("T", " ")
    main = _main_metric(results)
    shown = {main, f"{main}_half_width95", "top5", "count", "std", "draws", "episodes"}
    others = [(name, value) for name, value in results.items() if name not in shown and isinstance(value, int | float)]
    metrics = ", ".join(filter(None, [chosen_neighbors(entry), *(f"{name} {value:.4g}" for name, value in others)]))
    return f"{images} images, step {entry.get('step', '?')}, {made}" + (f"; {metrics}" if metrics else "")


def _main_metric(results: Mapping[str, Any]) -> str:
    """Return the name of the main metric: top1 if it was recorded, otherwise mAP, AP or mIoU."""
    return next((name for name in ("top1", "mAP", "AP", "mIoU") if name in results), "top1")


def _spread(results: Mapping[str, Any]) -> str:
    """Describe the uncertainty of the main metric."""
    half = results.get(f"{_main_metric(results)}_half_width95")
    if half is not None:
        over = f"{results['episodes']:,} episodes" if "episodes" in results else "seeds"
        return f"± {half:.1f} (95 % over {over})"
    if results.get("std") is not None:
        return f"± {results['std']:.1f} over {results.get('draws', '?')} draws"
    interval = results.get("interval95")
    return f"({interval[0]:.1f} – {interval[1]:.1f}, 95 %)" if interval else ""


def environment(run: Run) -> Markup:
    """Return the versions and the hardware of the run and of this page, and all settings of the run."""
    now = provenance()
    evaluated = {f"commit {each.get('commit')} on {each.get('machine')}" for each in run.results if each.get("commit")}
    rows = [
        ("run", str(run.path)),
        ("trained with", _software(run.state.get("versions", {}))),
        ("processes", str(run.state.get("world_size", "?"))),
        ("device", str(run.state.get("computed_on") or run.get("device", "?"))),
        ("precision", str(run.state.get("precision") or run.get("precision", "?"))),
        ("checkpoint", run.checkpoint.name if run.checkpoint else "none yet"),
        ("evaluations made with", "; ".join(sorted(evaluated)) or "–"),
        ("this page made with", _software(now)),
        ("this page made on", f"{now['machine']}, {now['time'][:16].replace('T', ' ')} UTC"),
    ]
    settings = yaml.safe_dump(run.config, sort_keys=False).splitlines()
    table = facts("Environment", [(name, [value]) for name, value in rows], [run.name])
    return part("folded", "Versions, hardware and all settings", table + part("settings", settings))


def _software(versions: Mapping[str, Any]) -> str:
    moco, torch = versions.get("moco", "?"), versions.get("torch", "?")
    return f"moco {moco}, torch {torch}, commit {versions.get('commit') or 'unknown'}"
