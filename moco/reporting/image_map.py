"""A map of images: coordinates and clusters computed from features, and the figure that shows them.

Legend: M images, D dimension.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.config.base import optional_module
from moco.reporting.markup import plain, plain_utf8
from moco.reporting.plotly_figures import PALETTE, REFERENCE_COLOR, plain_figure

FEWEST = 5  # images that a map needs
_MOST_GROUPS = 30  # in the legend; the rest form one group
# Plotly's names of the shapes of points, and characters with these shapes for the legend.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon")
_SIGNS = ("●", "■", "◆", "▲", "✚", "▼", "⬟")
_OTHERS = "others"
_AXIS = {"visible": False, "fixedrange": False}
_LAYOUT: dict[str, Any] = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "xaxis": _AXIS,
    "yaxis": _AXIS | {"scaleanchor": "x"},
    "showlegend": False,
    "hovermode": "closest",
    "hoverdistance": 20,
    "dragmode": False,
}


def coordinates(features: NDArray[Any], method: str, perplexity: float, seed: int) -> NDArray[np.float64]:
    """Place images in a plane, (M, 2), so that neighbors by cosine similarity stay neighbors.

    Args:
        features: (M, D), M at least `FEWEST`.
        method: "tsne", or "umap" (ConfigError if umap-learn is not installed).
        perplexity: approximate number of neighbors to preserve. At most (M - 1) / 3 are used, by "umap" at least 2.
        seed: seed of the optimization.
    """
    count = min(perplexity, (len(features) - 1) / 3)
    if method == "umap":
        umap = optional_module("umap", "map=umap", "umap", ", or set map=tsne")
        mapper = umap.UMAP(n_neighbors=max(2, round(count)), metric="cosine", random_state=seed % 2**32, n_jobs=1)
    else:
        from sklearn.manifold import TSNE  # takes a second to import

        mapper = TSNE(perplexity=count, metric="cosine", init="pca", random_state=seed % 2**32)
    return np.asarray(mapper.fit_transform(_unit(features)), np.float64)


def clusters(features: NDArray[Any], count: int, seed: int) -> NDArray[np.int64]:
    """Return the k-means cluster of each image, (M,), by the direction of its features; cluster 0 is the largest."""
    from sklearn.cluster import KMeans

    unit = _unit(features)
    count = min(count, len(np.unique(unit, axis=0)))
    found = KMeans(count, n_init=4, random_state=seed % 2**32).fit_predict(unit)
    largest_first = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    return np.asarray(np.argsort(largest_first)[found])


def _unit(features: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12))


@dataclass(frozen=True, eq=False)
class Map:
    """Images in a plane."""

    title: str  # such as "1,000 held-out images, t-SNE"
    places: NDArray[np.float64]  # (M, 2)
    names: Sequence[str]
    groups: Mapping[str, Sequence[str]]  # by coloring, "label" or "cluster": the group of each image


def figure(drawn: Map, images: Sequence[int]) -> dict[str, Any]:
    """Return a map's points and traces for the page's script; `images` are the numbers from `Figures.add_image`."""
    x, y = drawn.places.round(3).T.tolist()
    colorings = {}
    for kind, groups in drawn.groups.items():
        traces, legend = [], []
        for number, (name, rows) in enumerate(_grouped(groups).items()):
            color = REFERENCE_COLOR if name == _OTHERS else PALETTE[number % len(PALETTE)]
            # Ten colors and seven shapes: no two groups share both, so color is not the only distinction.
            shape = (number + number // len(PALETTE)) % len(_SYMBOLS)
            trace = {
                "type": "scatter",
                "name": plain(name),
                "x": [x[row] for row in rows],
                "y": [y[row] for row in rows],
                "customdata": rows,
                "mode": "markers",
                "marker": {"size": 9, "color": color, "symbol": _SYMBOLS[shape]},
                "hoverinfo": "none",
            }
            traces.append(trace)
            legend.append({"name": plain_utf8(name), "count": len(rows), "color": color, "sign": _SIGNS[shape]})
        colorings[kind] = {"traces": plain_figure(traces)["data"], "legend": legend}
    return {
        "layout": plain_figure([], **_LAYOUT)["layout"],
        "colorings": colorings,
        "x": x,
        "y": y,
        "names": [plain_utf8(name) for name in drawn.names],
        "images": list(images),
        "groups": {kind: [plain_utf8(group) for group in groups] for kind, groups in drawn.groups.items()},
    }


def _grouped(groups: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each group, sorted by name; the largest groups are kept, the others are merged into one."""
    counts = Counter(groups)
    kept = {name for name, _ in counts.most_common(_MOST_GROUPS)}
    if len(counts) - len(kept) == 1:
        kept = set(counts)
    rows: dict[str, list[int]] = {name: [] for name in sorted(kept, key=_natural)}
    for row, name in enumerate(groups):
        rows.setdefault(name if name in kept else _OTHERS, []).append(row)
    return rows


def _natural(name: str) -> tuple[int, str]:
    """Return a sort key by which cluster 2 comes before cluster 10."""
    return len(name) if name.rpartition(" ")[2].isdigit() else 0, name
