"""A map of pictures: coordinates and groups from features, and the figure that shows them.

Legend: M pictures, D dimension.
"""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.config import ConfigError
from moco.reporting import html
from moco.reporting.curves import PALETTE, base_layout, plain_figure, plotly
from moco.reporting.html import text

LEAST = 5  # pictures of a map
_MOST_GROUPS = 30  # in the legend: the rest are one group
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon")
_SIGNS = ("●", "■", "◆", "▲", "✚", "▼", "⬟")
_OTHERS = "others"


def coordinates(features: NDArray[Any], kind: str, perplexity: float, seed: int) -> NDArray[np.float64]:
    """Where each picture lies in a plane in which neighbors by cosine stay neighbours: (M, 2).

    Args:
        features: (M, D), M at least `LEAST`.
        kind: "tsne", or "umap", which needs umap-learn.
        perplexity: about how many neighbors count; at most (M - 1) / 3 are used.
        seed: of the optimization.

    Raises:
        ConfigError: if umap-learn is asked for and not installed.
    """
    count = min(perplexity, (len(features) - 1) / 3)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if kind == "umap":
        try:
            umap: Any = importlib.import_module("umap")
        except ImportError as error:
            raise ConfigError(
                "map=umap needs umap-learn: pip install 'momentum-contrast[umap]', or map=tsne"
            ) from error
        mapper = umap.UMAP(n_neighbors=max(2, round(count)), metric="cosine", random_state=seed % 2**32, n_jobs=1)
    else:
        from sklearn.manifold import TSNE  # costs a second at start-up

        mapper = TSNE(perplexity=count, metric="cosine", init="pca", random_state=seed % 2**32)
    placed: NDArray[np.float64] = np.asarray(mapper.fit_transform(unit), np.float64)
    return placed


def clusters(features: NDArray[Any], count: int, seed: int) -> NDArray[np.int64]:
    """k-means' group of each picture (M,), by the direction of its features; group 0 is the largest."""
    from sklearn.cluster import KMeans

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count = min(count, len(np.unique(unit, axis=0)))
    found = KMeans(count, n_init=4, random_state=seed % 2**32).fit_predict(unit)
    order = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    groups: NDArray[np.int64] = rank[found]
    return groups


@dataclass(frozen=True, eq=False)
class Map:
    """Pictures in a plane."""

    what: str  # such as "1,000 held-out pictures, t-SNE"
    places: NDArray[np.float64]  # (M, 2)
    names: Sequence[str]
    pictures: Sequence[int]  # of each its number among the page's pictures
    groups: Mapping[str, Sequence[str]]  # by what may be colored, "label" or "cluster": each picture's group


def figure(each: Map) -> dict[str, Any]:
    """A map as the page's script wants it: its points, and traces of plotly for each way to color them.

    Raises:
        ConfigError: if plotly is not installed.
    """
    graph = plotly()
    axis: dict[str, Any] = {"visible": False, "fixedrange": False}
    layout = base_layout(graph) | {
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "xaxis": axis,
        "yaxis": axis | {"scaleanchor": "x"},
        "showlegend": False,
        "hovermode": "closest",
        "hoverdistance": 20,
        "dragmode": False,
    }
    x, y = each.places.round(3).T.tolist()
    colorings = {}
    for kind, groups in each.groups.items():
        traces, legend = [], []
        for number, (name, rows) in enumerate(_grouped(groups).items()):
            color = PALETTE[7] if name == _OTHERS else PALETTE[number % len(PALETTE)]
            # Ten colors times seven shapes, of which no two are alike: color is not the only sign.
            shape = (number + number // len(PALETTE)) % len(_SYMBOLS)
            traces.append(
                graph.Scatter(
                    name=html.plain(name),
                    x=[x[row] for row in rows],
                    y=[y[row] for row in rows],
                    customdata=rows,
                    mode="markers",
                    marker={"size": 9, "color": color, "symbol": _SYMBOLS[shape]},
                    hoverinfo="none",
                )
            )
            legend.append({"name": _shown(name), "count": len(rows), "color": color, "sign": _SIGNS[shape]})
        colorings[kind] = {"traces": plain_figure(graph, traces, layout)["data"], "legend": legend}
    return {
        "layout": plain_figure(graph, [], layout)["layout"],
        "colorings": colorings,
        "x": x,
        "y": y,
        "names": [_shown(name) for name in each.names],
        "pictures": list(each.pictures),
        "groups": {kind: [_shown(group) for group in groups] for kind, groups in each.groups.items()},
    }


def _shown(name: str) -> str:
    """As a text of the page; a name that is no UTF-8 shows its odd bytes."""
    return html.plain(name).encode("utf-8", "backslashreplace").decode()


def _grouped(groups: Sequence[str]) -> dict[str, list[int]]:
    """Rows by group in the order of their names; of very many groups the largest, and the rest together."""
    counts = Counter(groups)
    kept = {name for name, _ in counts.most_common(_MOST_GROUPS)}
    if len(counts) - len(kept) == 1:
        kept = set(counts)
    rows: dict[str, list[int]] = {name: [] for name in sorted(kept, key=_natural)}
    for row, name in enumerate(groups):
        rows.setdefault(name if name in kept else _OTHERS, []).append(row)
    return rows


def _natural(name: str) -> tuple[int, str]:
    """Cluster 2 before cluster 10."""
    return len(name) if name.rpartition(" ")[2].isdigit() else 0, name


def markup(name: str, each: Map) -> str:
    """The place of a map in the page. The script fills the legend and moves between pictures."""
    choices = "".join(
        f'<label><input type="radio" name="{name}-by" value="{kind}"{" checked" * (not i)}> {text(kind)}</label>'
        for i, kind in enumerate(each.groups)
    )
    return f"""<div class="map" id="{name}">
<div class="controls"><fieldset><legend>Color by</legend>{choices}</fieldset>
<div class="legend" role="group" aria-label="Groups: press to hide or show"></div>
<p class="buttons"><button type="button" data-do="all">Show all</button>
<button type="button" data-do="none">Hide all</button> <button type="button" data-do="in">Zoom in</button>
<button type="button" data-do="out">Whole map</button></p></div>
<div class="plane"><div class="plot" tabindex="0" role="application" aria-describedby="{name}-how"
 aria-label="Map of {text(each.what)}: the arrow keys go from picture to picture"></div></div>
<div class="card"><div class="shown"></div><div aria-live="polite"><p class="name">No picture chosen yet.</p>
<p class="group"></p></div><p><button type="button" data-do="previous">Previous</button>
<button type="button" data-do="next">Next</button></p>
<p class="how" id="{name}-how">Point at the map or tap it to see a picture; with the keyboard: the arrow keys on the map
go to the nearest picture that way.</p></div></div>
"""
