"""Plotly figures of the HTML pages: colors, layout, and conversion to JSON."""

import importlib
import json
from collections.abc import Sequence
from typing import Any

# Contrast at least 3:1 on the light and the dark page; neighboring colors differ in lightness or hue.
PALETTE = ("#2f7ed8", "#d9541e", "#1e9650", "#a45cc8", "#a8791a", "#d6457f", "#148f9c", "#7d7d83", "#8a6a52", "#6a75d8")
REFERENCE_COLOR = "#7d7d83"  # gray, of dashed reference curves and of the group "others"
# The settings that all axes share.
AXIS: dict[str, Any] = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
_LAYOUT: dict[str, Any] = {  # the page's style sheet sets the colors of background and text
    "template": {},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7d7d83"},
    "hoverlabel": {"bgcolor": "#1c1c1e", "bordercolor": "#7d7d83", "font": {"color": "#ffffff"}},
    "autosize": True,
}


def plotly_script() -> str:
    """Return plotly's script (4.8 MB); the package plotly contains no smaller script."""
    script: str = importlib.import_module("plotly.offline").get_plotlyjs()
    return script


def plain_figure(traces: Sequence[dict[str, Any]], **layout: Any) -> dict[str, Any]:
    """Validate a figure with plotly and return it as JSON values."""
    graph = importlib.import_module("plotly.graph_objects")  # takes half a second
    plain: dict[str, Any] = json.loads(graph.Figure(traces, _LAYOUT | layout).to_json())
    plain["layout"].pop("template", None)
    return plain
