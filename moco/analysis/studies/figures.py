"""The figures of the temperature study and of `mode=explain`, as SVG with a white background.

Legend: B bins.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from moco.analysis import bin_edges, explain_temperature
from moco.analysis.studies.measures import Run, by_temperature
from moco.files import atomic_write

# Index of the correct candidate in the two cases of `mode=explain`: by default, candidate 0 has the highest similarity.
RIGHT, WRONG = 0, 1
_STYLE: Any = {
    "figure.facecolor": "#ffffff",
    "axes.grid": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "moco",  # makes the bytes of a figure reproducible
}


@contextmanager
def drawing(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure of `size` inches and its axes (rows, columns), in one style; save it as SVG at the end."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


_MARKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # ticks of the temperature


def draw_explanation(path: Path, similarities: Sequence[float], lowest: float, highest: float) -> None:
    """Draw softmax, loss and gradient of one query against the temperature, for a right and a wrong answer.

    `similarities` are those of the candidates. In the first row of axes the first candidate is the correct answer, in
    the second row the second candidate is. The temperature goes from `lowest` to `highest`.
    """
    grid = torch.logspace(np.log10(lowest), np.log10(highest), 200, dtype=torch.float64)
    colors = _colors(len(similarities))
    with drawing(path, 2, 3, (9.6, 5.4)) as (_, axes):
        for row, (answer, kind) in enumerate(((RIGHT, "right"), (WRONG, "wrong"))):
            explained = explain_temperature(torch.tensor(similarities), answer, grid)
            softmax, loss, slope = axes[row]
            for candidate, similarity in enumerate(similarities):
                role, line = ("the positive", "-") if candidate == answer else ("a negative", "--")
                style = {"color": colors[candidate], "linestyle": line}
                softmax.plot(grid, explained.softmax[:, candidate], label=f"s = {similarity:g}, {role}", **style)
                slope.plot(grid, explained.gradient[:, candidate].abs(), label=f"s = {similarity:g}", **style)
            loss.plot(grid, explained.loss, color="#333333")
            softmax.legend(fontsize=7)
            slope.legend(fontsize=7)
            for axis, name in zip(axes[row], ("softmax", "loss", "pull and push"), strict=True):
                axis.set(xscale="log", title=f"{name}, the model is {kind}")
                marks = [each for each in _MARKS if lowest <= each <= highest]
                axis.set_xticks(marks, [f"{each:g}" for each in marks])
                axis.set_xticks([], minor=True)
        for axis in axes[1]:
            axis.set_xlabel("temperature T")
        axes[1][1].set_yscale("log")  # a wrong answer's values span orders of magnitude
        axes[1][2].set(yscale="log", ylim=(1e-2, None))


def draw_curves(path: Path, runs: Sequence[Run]) -> None:
    """Draw four measures against the temperature: the mean over seeds, and each run as a point."""
    panels: dict[str, list[float | None]] = {
        "uniformity (lower: more even)": [each.projection.uniformity for each in runs],
        "tolerance (similarity within a class)": [each.projection.tolerance for each in runs],
        "few-label kNN accuracy, %": [None if each.knn is None else each.knn.mean for each in runs],
        "effective negatives": [each.contrast.effective_negatives for each in runs],
    }
    with drawing(path, 2, 2, (8.0, 5.6)) as (_, axes):
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


def draw_similarities(path: Path, runs: Sequence[Run]) -> None:
    """Draw histograms of positive and negative similarities, each scaled to its peak; one panel per temperature."""
    groups = by_temperature(runs)
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    with drawing(path, rows, columns, (2.4 * columns + 0.4, 1.9 * rows + 0.5)) as (figure, axes):
        for axis in axes.flat[len(groups) :]:
            axis.set_visible(False)
        for axis, (temperature, group) in zip(axes.flat, groups.items(), strict=False):
            for name, color in (("positives", "#c2571a"), ("negatives", "#1f5fa8")):
                counts = np.sum([getattr(each.contrast, f"{name}_at") for each in group], axis=0)
                edges = bin_edges(len(counts))
                axis.stairs(counts / counts.max(), edges, fill=True, alpha=0.55, color=color, label=name)
            axis.set(title=f"T = {temperature:g}", xlim=(-1, 1), xticks=[-1, 0, 1], yticks=[])
        axes[0][0].legend(fontsize=7, loc="upper left")
        figure.supxlabel("cosine similarity to the query", fontsize=9)


def draw_penalties(path: Path, runs: Sequence[Run]) -> None:
    """Draw how the push depends on a negative's similarity: the total per similarity, and the push on one negative."""
    groups = by_temperature(runs)
    with drawing(path, 1, 2, (9.0, 3.6)) as (_, axes):
        total, single = axes[0]
        for color, (temperature, group) in zip(_colors(len(groups)), groups.items(), strict=True):
            share, one = penalties(group)
            edges = bin_edges(len(share))
            centers = (edges[1:] + edges[:-1]) / 2
            total.plot(centers, share * len(share) / 2, color=color, label=f"T = {temperature:g}")
            single.plot(centers, one, color=color)
        total.set_title("distribution of the push (density)")
        single.set_title("push on one negative ÷ mean push")
        for axis in axes[0]:
            axis.set(xlabel="similarity of the negative", xlim=(-1, 1))
        single.set(yscale="log", ylim=(1e-6, None))  # anything lower has no effect
        single.axhline(1, color="#333333", linewidth=0.6)
        total.legend(fontsize=7)


def penalties(runs: Sequence[Run]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the two curves of one temperature in the penalty figure, each (B,), from its runs.

    The first is the share of the push on the negatives of each bin, a mean over the runs, and sums to 1. The second is
    this share divided by the bin's share of all negatives: the push on a single negative divided by the mean push. It
    is nan in bins without push, or with fewer than 10 similarities per run on average.
    """
    share = np.mean([each.contrast.push_at for each in runs], axis=0)
    counts = np.mean([each.contrast.negatives_at for each in runs], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(counts >= 10, share / (counts / counts.sum()), np.nan)
    return share, np.where(one > 0, one, np.nan)


def _colors(count: int) -> list[Any]:
    """Return colors of viridis from dark to light, without the pale yellow; brightness alone shows the order."""
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(2, count))))[:count]


FIGURES = {"curves.svg": draw_curves, "similarities.svg": draw_similarities, "penalties.svg": draw_penalties}
