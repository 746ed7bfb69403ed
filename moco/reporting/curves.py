"""Curves of one run or several as figures of plotly, each with its numbers in words and in a table.

A chart is a series; what it is to be read against (chance, the untrained encoder) is dashed.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moco.config import ConfigError
from moco.reporting import html
from moco.reporting.html import text

MOST_POINTS = 600  # of a curve in the page
_TABLE_ROWS = 12
_DASHES = ("dash", "dot", "dashdot", "longdash")
# Each at least 3:1 against the page in light and in dark; neighbors differ in lightness or hue.
PALETTE = (
    "#2f7ed8",
    "#d9541e",
    "#1e9650",
    "#a45cc8",
    "#a8791a",
    "#d6457f",
    "#148f9c",
    "#7d7d83",
    "#8a6a52",
    "#6a75d8",
)


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # nan where nothing finite was recorded
    run: int = 0
    reference: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    unit: str
    curves: Sequence[Curve]
    group: str = ""  # the first part of its series' name


@dataclass(frozen=True)
class _Known:
    title: str
    unit: str = ""
    times: float = 1.0
    against: tuple[str, ...] = ()


_KNOWN = {
    "accuracy/knn": _Known(
        "Held-out kNN accuracy", "%", 1.0, ("accuracy/untrained", "accuracy/initialized", "accuracy/raw_pixels")
    ),
    "train/loss": _Known("Loss", "nats", 1.0, ("train/chance",)),
    "train/contrast_accuracy": _Known("Contrast accuracy: the positive beats every negative", "%", 100.0),
    "train/positive_similarity": _Known("Cosine of query and positive key"),
    "train/lr": _Known("Learning rate"),
    "train/momentum": _Known("Momentum of the key encoder"),
    "train/temperature": _Known("Temperature"),
    "train/gradient_norm": _Known("Gradient norm"),
    "train/queue_fill": _Known("Queue filled", "%", 100.0),
    "train/negatives": _Known("Negatives of a query"),
    "speed/images_per_second": _Known("Images a second"),
    "speed/data_wait": _Known("Time spent waiting for data", "%", 100.0),
    "speed/mfu": _Known("FLOP utilization (MFU)", "%", 100.0),
    "speed/peak_memory_gib": _Known("Peak memory so far", "GiB"),
    "train/effective_negatives": _Known("Effective number of negatives"),
    "train/push": _Known("Share of the softmax that negatives have", "%", 100.0),
    "analysis/alignment": _Known("Alignment (lower: views agree)"),
    "analysis/uniformity": _Known("Uniformity (lower: more uniform)"),
    "analysis/tolerance": _Known("Tolerance: mean cosine within a class"),
    "analysis/effective_rank": _Known("Effective rank (RankMe)"),
    "analysis/alpha_req": _Known("Decay of the spectrum (α-ReQ)"),
    "analysis/spread": _Known("Spread (1 uniform, 0 one point)"),
    "analysis/std_lowest": _Known("Lowest standard deviation of a dimension"),
    "analysis/loss_unshuffled": _Known("Loss without the shuffle", "nats", 1.0, ("analysis/loss_shuffled",)),
    "analysis/top_share": _Known("Gradient share of the 10 hardest negatives", "%", 100.0),
    "analysis/same_label_share": _Known("Negatives of the query's own class", "%", 100.0),
    "analysis/likely_false_share": _Known("Negatives that are likely false (cosine above 0.9)", "%", 100.0),
    "analysis/own_key_share": _Known("Queue's keys of the query's own image", "%", 100.0),
    "analysis/duplicate_share": _Known("Queries that meet their very own key", "%", 100.0),
    "analysis/key_age": _Known("Mean age of the queue's keys", "steps"),
    "analysis/key_drift": _Known("Drift of old keys (1 - cosine)"),
}
_HIDDEN = {"train/epoch"}  # it is the axis

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # by name: positions and values


def charts(runs: Mapping[str, Series]) -> tuple[list[Chart], list[str]]:
    """What was recorded as charts, the most telling first, and what never changed as sentences.

    Args:
        runs: the recorded series by the run's name.
    """
    recorded = sorted({name for series in runs.values() for name in series} - _HIDDEN)
    references = {each for known in _KNOWN.values() for each in known.against}
    shown = [name for name in recorded if name not in references or not _has_main(name, recorded)]
    order = [*(name for name in _KNOWN if name in shown), *(name for name in shown if name not in _KNOWN)]
    drawn, constant = [], []
    for name in order:
        values = {value for series in runs.values() for value in series.get(name, ((), ()))[1]}
        known = _KNOWN.get(name, _Known(name.rpartition("/")[2].replace("_", " ").capitalize()))
        if len(values) == 1 and not known.against:
            value = values.pop()
            said = "never finite" if math.isnan(value) else f"{number(value * known.times)} {known.unit}".strip()
            constant.append(f"{known.title}: {said}")
        else:
            drawn.append(_chart(name, known, runs))
    return drawn, constant


def _has_main(reference: str, recorded: Sequence[str]) -> bool:
    return any(reference in known.against and name in recorded for name, known in _KNOWN.items())


def _chart(name: str, known: _Known, runs: Mapping[str, Series]) -> Chart:
    curves = []
    several = len(runs) > 1
    for number_, (run, series) in enumerate(runs.items()):
        for each in (name, *known.against):
            if each not in series:
                continue
            x, y = thinned(*series[each])
            what = each.rpartition("/")[2].replace("_", " ")
            said = run if several and each == name else f"{run}, {what}" if several else what
            curves.append(Curve(said, x, [value * known.times for value in y], number_, each != name))
    return Chart(known.title, known.unit, curves, name.partition("/")[0])


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[Sequence[float], Sequence[float]]:
    """At most `most` points of a curve: of each part its lowest and its highest, so that every spike stays."""
    if len(x) <= most:
        return x, y
    parts = most // 2
    kept: list[int] = []
    for part in range(parts):
        rows = range(part * len(x) // parts, (part + 1) * len(x) // parts)
        finite = [row for row in rows if not math.isnan(y[row])] or list(rows[:1])
        kept += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[row] for row in kept], [y[row] for row in kept]


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def in_words(chart: Chart) -> str:
    """What a curve does, for those who do not see it."""
    said = []
    for curve in chart.curves:
        finite = [value for value in curve.y if not math.isnan(value)]
        if not finite:
            said.append(f"{curve.name}: nothing finite")
        elif min(finite) == max(finite):
            said.append(f"{curve.name} {number(finite[0])}")
        else:
            ends = f"{curve.name} from {number(finite[0])} to {number(finite[-1])}"
            said.append(f"{ends}, lowest {number(min(finite))}, highest {number(max(finite))}")
    return "; ".join(said) + (f" ({chart.unit})" if chart.unit else "")


def figure(chart: Chart, x_title: str) -> dict[str, Any]:
    """A chart as plotly's JSON.

    Raises:
        ConfigError: if plotly is not installed.
    """
    graph = plotly()
    several = len({curve.run for curve in chart.curves}) > 1
    references = [curve for curve in chart.curves if curve.reference]
    traces = []
    for curve in chart.curves:
        color = PALETTE[curve.run % len(PALETTE)] if several or not curve.reference else PALETTE[7]
        at = references.index(curve) if curve.reference and not several else curve.run * curve.reference
        style = _DASHES[at % len(_DASHES)] if curve.reference else "solid"
        traces.append(
            graph.Scatter(
                name=html.plain(curve.name),
                showlegend=not (several and curve.reference),
                x=[_short(value) for value in curve.x],
                y=[_short(value) for value in curve.y],
                mode="lines" if len(curve.x) > 40 or (curve.reference and len(curve.x) > 1) else "lines+markers",
                line={"color": color, "width": 1.5 if curve.reference else 2, "dash": style},
                marker={"size": 5},
                hovertemplate="%{y:.4g} at %{x:.4g}",
            )
        )
    layout = base_layout(graph) | {
        "height": 260,
        "margin": {"l": 52, "r": 10, "t": 8, "b": 40},
        "xaxis": _AXIS | {"title": {"text": x_title, "standoff": 6}},
        "yaxis": _AXIS | {"ticksuffix": " %" if chart.unit == "%" else "", "nticks": 6},
        "showlegend": len(chart.curves) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "hovermode": "x",
    }
    return plain_figure(graph, traces, layout)


def plotly() -> Any:
    """`plotly.graph_objects`.

    Raises:
        ConfigError: if plotly is not installed.
    """
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError as error:
        raise ConfigError("a report needs plotly: pip install 'momentum-contrast[report]'") from error


def library() -> str:
    """plotly's script, which the page holds as a whole (4.8 MB): the package brings no smaller part of it."""
    script: str = importlib.import_module("plotly.offline").get_plotlyjs()
    return script


_AXIS: dict[str, Any] = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}


def base_layout(graph: Any) -> dict[str, Any]:
    """What all figures share: the page's own background; colors of text come from its style sheet."""
    return {
        "template": graph.layout.Template(),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7d7d83"},
        "hoverlabel": {"bgcolor": "#1c1c1e", "bordercolor": "#7d7d83", "font": {"color": "#ffffff"}},
        "autosize": True,
    }


def plain_figure(graph: Any, traces: Sequence[Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, checked by plotly."""
    checked = graph.Figure(data=list(traces), layout=graph.Layout(**layout)).to_json()
    plain: dict[str, Any] = json.loads(checked)
    plain["layout"].pop("template", None)
    return plain


def _short(value: float) -> float | None:
    """Six digits, and nothing for what is not finite: JSON has no word for it."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def markup(name: str, chart: Chart, x_title: str) -> str:
    """The place of a chart in the page, with its words and its numbers."""
    said = in_words(chart)
    rows = list(_rows(chart))
    columns = [x_title, *(curve.name for curve in chart.curves)]
    return (
        f'<figure class="chart"><figcaption><b>{text(chart.title)}</b>{f" ({text(chart.unit)})" if chart.unit else ""}'
        f'</figcaption><div class="plot" id="{name}" role="img" aria-label="{text(f"{chart.title}: {said}")}"></div>'
        + html.details("In numbers", f"<p>{text(said)}</p>" + html.table(chart.title, columns, rows))
        + "</figure>\n"
    )


def _rows(chart: Chart) -> Iterator[list[str]]:
    """Some positions of a chart, evenly spaced, with the value of each curve there."""
    by_x: dict[float, dict[int, float]] = {}
    for i, curve in enumerate(chart.curves):
        for x, y in zip(curve.x, curve.y, strict=True):
            by_x.setdefault(x, {})[i] = y
    places = sorted(by_x)
    count = min(_TABLE_ROWS, len(places))
    for i in range(count):
        x = places[i * (len(places) - 1) // max(1, count - 1)]
        values = [by_x[x].get(i, math.nan) for i in range(len(chart.curves))]
        yield [number(x), *("–" if math.isnan(value) else number(value) for value in values)]
