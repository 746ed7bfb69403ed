"""The figures of the temperature study and of the three logits, as SVG on a light ground of their own."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.analysis import bin_edges, explain_temperature
from moco.analysis.studies.measures import Run
from moco.config import ConfigError

RIGHT, WRONG = 0, 1  # which candidate is the answer
_STYLE = {
    "figure.facecolor": "#ffffff",
    "axes.grid": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "moco",  # the same figure is the same file
}


def matplotlib() -> Any:
    """The module, with `figure` imported.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'momentum-contrast[figures]'") from error


def draw_explanation(path: Path, similarities: Sequence[float], lowest: float, highest: float) -> None:
    """Softmax, loss and the size of its slopes for one query against the temperature, the answer right and wrong.

    Args:
        path: the SVG file.
        similarities: of the candidates, the first two of which are the right and the wrong answer.
        lowest, highest: temperatures.
    """
    grid = torch.logspace(np.log10(lowest), np.log10(highest), 200, dtype=torch.float64)
    with matplotlib().rc_context(_STYLE):
        figure, axes = _panels(2, 3, 9.6, 5.4)
        for row, answer in enumerate((RIGHT, WRONG)):
            told = explain_temperature(torch.tensor(similarities), answer, grid)
            what = ("right", "wrong")[row]
            softmax, loss, slope = axes[row]
            for place, similarity in enumerate(similarities):
                role = "the answer" if place == answer else "a negative"
                style = {"color": _colors(len(similarities))[place], "linestyle": "-" if place == answer else "--"}
                softmax.plot(grid, told.softmax[:, place], label=f"s = {similarity:g}, {role}", **style)
                slope.plot(grid, told.gradient[:, place].abs(), **style)
            loss.plot(grid, told.loss, color="#333333")
            softmax.legend(fontsize=7)
            for axis, name in zip(axes[row], ("softmax", "loss", "pull and push"), strict=True):
                axis.set(xscale="log", title=f"{name}, the answer is {what}")
                if row == WRONG:
                    axis.set_xlabel("temperature T")
            if answer == WRONG:  # from here over orders of magnitude
                loss.set_yscale("log")
                slope.set(yscale="log", ylim=(1e-2, None))
        _save(figure, path)


def draw_curves(path: Path, runs: Sequence[Run]) -> None:
    """Four measures against the temperature: the mean over seeds, and each run as a point."""
    panels: dict[str, list[float | None]] = {
        "uniformity (lower: more even)": [each.projection.uniformity for each in runs],
        "tolerance (similarity within a class)": [each.projection.tolerance for each in runs],
        "few-label kNN accuracy, %": [None if each.knn is None else each.knn.mean for each in runs],
        "negatives that count, in effect": [each.contrast.effective_negatives for each in runs],
    }
    with matplotlib().rc_context(_STYLE):
        figure, axes = _panels(2, 2, 8.0, 5.6)
        for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
            axis.set(xscale="log", title=title)
            known = [(run.temperature, value) for run, value in zip(runs, values, strict=True) if value is not None]
            if not known:
                axis.text(0.5, 0.5, "needs labels", transform=axis.transAxes, ha="center")
                continue
            at = sorted({temperature for temperature, _ in known})
            means = [np.mean([value for each, value in known if each == temperature]) for temperature in at]
            axis.plot(at, means, color="#1f5fa8")
            axis.plot(*zip(*known, strict=True), "o", color="#1f5fa8", markersize=3.5, alpha=0.6)
            axis.set_xticks(at, [f"{each:g}" for each in at], fontsize=7)
            axis.minorticks_off()
        for axis in axes[1]:
            axis.set_xlabel("temperature T")
        axes[1][1].set_yscale("log")
        _save(figure, path)


def draw_similarities(path: Path, runs: Sequence[Run]) -> None:
    """Positive and negative similarities, each to its own peak; one panel a temperature, the seeds together."""
    by_temperature = _by_temperature(runs)
    with matplotlib().rc_context(_STYLE):
        columns = min(4, len(by_temperature))
        rows = -(-len(by_temperature) // columns)
        figure, axes = _panels(rows, columns, 2.4 * columns + 0.4, 1.9 * rows + 0.5)
        for axis in axes.flat[len(by_temperature) :]:
            axis.set_visible(False)
        for axis, (temperature, group) in zip(axes.flat, by_temperature.items(), strict=False):
            for name, color in (("positives_at", "#c2571a"), ("negatives_at", "#1f5fa8")):
                counts = np.sum([getattr(each.contrast, name) for each in group], axis=0)
                edges = bin_edges(len(counts))
                axis.stairs(counts / counts.max(), edges, fill=True, alpha=0.55, color=color, label=name[:9])
            axis.set(title=f"T = {temperature:g}", xlim=(-1, 1), xticks=[-1, 0, 1], yticks=[])
        axes.flat[0].legend(fontsize=7, loc="upper left")
        figure.supxlabel("cosine similarity to the query", fontsize=9)
        _save(figure, path)


def draw_penalties(path: Path, runs: Sequence[Run]) -> None:
    """Which negatives get the push: by similarity all together, and a single one, for each temperature."""
    by_temperature = _by_temperature(runs)
    with matplotlib().rc_context(_STYLE):
        figure, (whole, single) = _panels(1, 2, 9.0, 3.6)
        colors = _colors(len(by_temperature))
        for color, (temperature, group) in zip(colors, by_temperature.items(), strict=True):
            share, one = penalties(group)
            centers = (bin_edges(len(share))[1:] + bin_edges(len(share))[:-1]) / 2
            whole.plot(centers, share * len(share) / 2, color=color, label=f"T = {temperature:g}")
            single.plot(centers, one, color=color)
        whole.set(title="where the push goes (density)", xlabel="similarity of the negative", xlim=(-1, 1))
        single.set(title="push on one negative ÷ the mean's", xlabel="similarity of the negative", xlim=(-1, 1))
        single.set(yscale="log", ylim=(1e-6, None))  # what is below moves nothing
        single.axhline(1, color="#333333", linewidth=0.6)
        whole.legend(fontsize=7)
        _save(figure, path)


def penalties(runs: Sequence[Run]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The two curves of a temperature's penalty figure, each (B,), means over the runs.

    Returns:
        The share of the push that falls on negatives in a bin (sums to 1); and how many times the average negative's a
        single one's is there, nan where a bin holds less than 10 of a run's similarities on average.
    """
    share = np.mean([each.contrast.push_at for each in runs], axis=0)
    counts = np.mean([each.contrast.negatives_at for each in runs], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(counts >= 10, share / (counts / counts.sum()), np.nan)
    return share, np.where(one > 0, one, np.nan)


def _by_temperature(runs: Sequence[Run]) -> dict[float, list[Run]]:
    return {at: [run for run in runs if run.temperature == at] for at in sorted({run.temperature for run in runs})}


def _colors(count: int) -> list[Any]:
    """From dark to light in viridis, whose order shows without color vision too; the lightest, yellow, is left out."""
    shades = matplotlib().colormaps["viridis"](np.linspace(0, 0.85, max(2, count)))
    return list(shades)[:count]


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes: (rows, columns), or of one row (columns,)."""
    figure = matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes if rows > 1 else axes[0]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
