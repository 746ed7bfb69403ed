"""Charts of the recorded metrics of one run or several, as plotly figures with a summary and a table of values.

Reference values, such as the loss at chance level or the accuracy of the untrained encoder, are dashed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moco.reporting.markup import plain
from moco.reporting.plotly_figures import AXIS, PALETTE, REFERENCE_COLOR, plain_figure

MOST_POINTS = 600  # per curve
_TABLE_ROWS = 12  # largest number of rows in the table of a chart
_MARKERS = 40  # a curve with at most this many points has markers
_DASHES = ("dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # nan for a value that is not finite
    run: int = 0  # index of the run in the report
    reference: bool = False  # whether the values are reference values, which are dashed


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    unit: str
    curves: Sequence[Curve]
    metric: str = ""  # such as "train/loss"


@dataclass(frozen=True)
class _Known:
    """How the chart of a known metric is drawn."""

    title: str
    unit: str = ""
    scale: float = 1.0  # the factor from the recorded values to the unit
    references: tuple[str, ...] = ()  # the metrics that are reference values of this one


_BASELINES = ("accuracy/untrained", "accuracy/initialized", "accuracy/raw_pixels")
_RETRIEVAL_BASELINES = ("retrieval/raw_pixels", "retrieval/untrained", "retrieval/initialized")
_KNOWN = {
    "accuracy/knn": _Known("Held-out kNN accuracy", "%", references=_BASELINES),
    "accuracy/probe": _Known("Held-out accuracy of the online linear probe", "%"),
    "retrieval/retrieval": _Known("Two crops of an image find each other", "%", references=_RETRIEVAL_BASELINES),
    "train/loss": _Known("Loss", "nats", references=("train/chance",)),
    "train/contrast_accuracy": _Known("Contrast accuracy: the positive has the highest similarity", "%", 100.0),
    "train/probe_accuracy": _Known("Training accuracy of the online linear probe", "%", 100.0),
    "train/probe_loss": _Known("Loss of the online linear probe", "nats"),
    "train/global_loss": _Known("Loss of the images", "nats"),
    "train/dense_loss": _Known("Loss of the cells of the feature maps", "nats"),
    "train/dense_accuracy": _Known("Contrast accuracy of the cells", "%", 100.0),
    "train/dense_similarity": _Known("Cosine similarity of a cell and its positive"),
    "train/matched_cells": _Known("Cells with a match in the other view", "%", 100.0),
    "train/neighbor_similarity": _Known("Cosine similarity of an image and its nearest neighbor in the queue"),
    "train/teacher_entropy": _Known("Entropy of the teacher's similarities (the lowest possible loss)", "nats"),
    "train/positive_similarity": _Known("Cosine similarity of query and positive key"),
    "train/lr": _Known("Learning rate"),
    "train/momentum": _Known("Momentum of the key encoder"),
    "train/temperature": _Known("Temperature"),
    "train/gradient_norm": _Known("Gradient norm"),
    "train/queue_fill": _Known("Queue filled", "%", 100.0),
    "train/negatives": _Known("Negatives per query"),
    "speed/images_per_second": _Known("Images per second"),
    "speed/data_wait": _Known("Time spent waiting for data", "%", 100.0),
    "speed/mfu": _Known("FLOP utilization (MFU)", "%", 100.0),
    "speed/peak_memory_gib": _Known("Peak memory", "GiB"),
    "train/effective_negatives": _Known("Effective number of negatives"),
    "train/push": _Known("Probability that the loss gives to the negatives", "%", 100.0),
    "analysis/alignment": _Known("Alignment (lower: views closer)"),
    "analysis/uniformity": _Known("Uniformity (lower: more uniform)"),
    "analysis/tolerance": _Known("Mean cosine similarity within a class (tolerance)"),
    "analysis/effective_rank": _Known("Effective rank of the features (higher: more directions in use)"),
    "analysis/alpha_req": _Known("Decay of the features' spectrum (α-ReQ; 1 is good)"),
    "analysis/spread": _Known("Spread (1 uniform, 0 one point)"),
    "analysis/std_lowest": _Known("Lowest standard deviation of a dimension (0: collapsed)"),
    "analysis/loss_unshuffled": _Known(
        "Loss without shuffled BN (much lower: BN leaks)", "nats", references=("analysis/loss_shuffled",)
    ),
    "analysis/top_share": _Known("Gradient share of the 10 hardest negatives", "%", 100.0),
    "analysis/same_label_share": _Known("Negatives of the query's class", "%", 100.0),
    "analysis/likely_false_share": _Known("Negatives that are likely false (cosine above 0.9)", "%", 100.0),
    "analysis/own_key_share": _Known("Queue keys of the query's own image (0 at the end of an epoch)", "%", 100.0),
    "analysis/duplicate_share": _Known("Queries whose positive key is also a negative", "%", 100.0),
    "analysis/key_age": _Known("Mean age of queue keys", "steps"),
    "analysis/key_drift": _Known("Change of queue keys since they were computed (0: none)"),
}
_HIDDEN = {"train/epoch"}  # the x axis

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # by metric: x (epochs or steps) and values


def charts(
    runs: Mapping[str, Series], kinds: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[list[Chart], dict[str, list[str]]]:
    """Return charts of metrics, the most important first, and phrases for metrics whose values are all equal.

    The chart of a metric also shows its reference values; a metric that can have reference values is always drawn. The
    phrases are grouped by the reason: "Constant", "Measured once" (in each run) or "Not measured".

    Args:
        runs: the metrics of each run.
        kinds: for each metric, the kind of each run's values, which is appended to the chart's title. A metric has one
            chart for each kind of values.
    """
    recorded = sorted({name for series in runs.values() for name in series} - _HIDDEN)
    references = {each for name in recorded if name in _KNOWN for each in _KNOWN[name].references}
    shown = [name for name in recorded if name not in references]
    order = [name for name in _KNOWN if name in shown] + [name for name in shown if name not in _KNOWN]
    drawn, single = list[Chart](), dict[str, list[str]]()
    by_kind = [(name, each) for name in order for each in _by_kind(name, runs, (kinds or {}).get(name, {})).items()]
    for name, (kind, same_kind) in by_kind:
        recorded_values = [runs[run][name][1] for run in same_kind]
        values = {value for each in recorded_values for value in each}
        known = _KNOWN.get(name, _Known(name.rpartition("/")[2].replace("_", " ").capitalize()))
        if len(values) == 1 and not known.references:
            value = values.pop()
            once = all(len(each) == 1 for each in recorded_values)
            reason = "Not measured" if math.isnan(value) else "Measured once" if once else "Constant"
            text = "" if math.isnan(value) else f": {number(value * known.scale)} {known.unit}".rstrip()
            single.setdefault(reason, []).append(f"{known.title}{kind}{text}")
        else:
            drawn.append(_chart(name, kind, known, runs, same_kind))
    return drawn, single


def _by_kind(name: str, runs: Mapping[str, Series], kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the runs that recorded a metric, grouped by the kind of its values; see `charts`."""
    found: dict[str, list[str]] = {}
    for run in [run for run, series in runs.items() if name in series]:
        found.setdefault(kinds.get(run, ""), []).append(run)
    return found


def _chart(name: str, kind: str, known: _Known, runs: Mapping[str, Series], same_kind: Sequence[str]) -> Chart:
    curves = []
    several = len(runs) > 1
    for i, run in [(i, run) for i, run in enumerate(runs) if run in same_kind]:
        for each in [each for each in (name, *known.references) if each in runs[run]]:
            x, y = thinned(*runs[run][each])
            metric = each.rpartition("/")[2].replace("_", " ")
            label = run if several and each == name else f"{run}, {metric}" if several else metric
            curves.append(Curve(label, x, [value * known.scale for value in y], i, each != name))
    return Chart(known.title + kind, known.unit, curves, name)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return x and y of at most `MOST_POINTS` points: the lowest and highest point of each part of a curve."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = MOST_POINTS // 2
    kept: list[int] = []
    for each in range(parts):
        rows = range(each * len(x) // parts, (each + 1) * len(x) // parts)
        finite = [row for row in rows if not math.isnan(y[row])] or list(rows[:1])
        kept += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[row] for row in kept], [y[row] for row in kept]


def number(value: float) -> str:
    """Format a number with four significant digits, or without decimals from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def summary(chart: Chart) -> str:
    """Describe each curve by its ends and extremes, as the text alternative of the chart."""
    parts = []
    for curve in chart.curves:
        finite = [value for value in curve.y if not math.isnan(value)]
        if not finite:
            parts.append(f"{curve.name}: no finite value")
        elif min(finite) == max(finite):
            parts.append(f"{curve.name} {number(finite[0])}")
        else:
            ends = f"{curve.name} from {number(finite[0])} to {number(finite[-1])}"
            parts.append(f"{ends}, lowest {number(min(finite))}, highest {number(max(finite))}")
    return "; ".join(parts) + (f" ({chart.unit})" if chart.unit else "")


def figure(chart: Chart, x_title: str) -> dict[str, Any]:
    """Return a chart as plotly's JSON."""
    several = len({curve.run for curve in chart.curves}) > 1
    references = [curve for curve in chart.curves if curve.reference]
    traces = []
    for curve in chart.curves:
        color = PALETTE[curve.run % len(PALETTE)] if several or not curve.reference else REFERENCE_COLOR
        dash = "solid"
        if curve.reference:
            dash = _DASHES[(curve.run if several else references.index(curve)) % len(_DASHES)]
        lines_only = len(curve.x) > _MARKERS or (curve.reference and len(curve.x) > 1)
        trace = {
            "type": "scatter",
            "name": plain(curve.name),
            "showlegend": not (several and curve.reference),
            "x": [_short(value) for value in curve.x],
            "y": [_short(value) for value in curve.y],
            "mode": "lines" if lines_only else "lines+markers",
            "line": {"color": color, "width": 1.5 if curve.reference else 2, "dash": dash},
            "marker": {"size": 5},
            "hovertemplate": "%{y:.4g} at %{x:.4g}",
        }
        traces.append(trace)
    return plain_figure(
        traces,
        height=260,
        margin={"l": 52, "r": 10, "t": 8, "b": 40},
        xaxis=AXIS | {"title": {"text": x_title, "standoff": 6}},
        yaxis=AXIS | {"ticksuffix": " %" if chart.unit == "%" else "", "nticks": 6},
        showlegend=len(chart.curves) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        hovermode="x",
    )


def _short(value: float) -> float | None:
    """Round to six significant digits; None if not finite, because JSON cannot represent it."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def table_rows(chart: Chart) -> Iterator[list[str]]:
    """Yield at most `_TABLE_ROWS` rows, evenly spaced in the sorted values of x: x, and the values of all curves."""
    by_x: dict[float, dict[int, float]] = {}
    for i, curve in enumerate(chart.curves):
        for x, y in zip(curve.x, curve.y, strict=True):
            by_x.setdefault(x, {})[i] = y
    positions = sorted(by_x)
    count = min(_TABLE_ROWS, len(positions))
    for i in range(count):
        x = positions[i * (len(positions) - 1) // max(1, count - 1)]
        values = [by_x[x].get(i, math.nan) for i in range(len(chart.curves))]
        yield [number(x), *("–" if math.isnan(value) else number(value) for value in values)]
