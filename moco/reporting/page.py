"""The report's page: its sections, and the figures and images that its script shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from moco.reporting import curves, image_map
from moco.reporting.markup import jpeg_url, part, resource, write_page
from moco.reporting.plotly_figures import plotly_script

_MAP_IMAGE = 96  # pixels, maximum of the longer side of an image in a map


@dataclass
class Figures:
    """Figures by the id of their element. Each image is stored once, even if several maps show it."""

    charts: dict[str, Any] = field(default_factory=dict)
    maps: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # data URL to number

    def add_image(self, image: Tensor) -> int:
        """Add an image (3, H, W) unless the page has it already, and return its number."""
        return self.images.setdefault(jpeg_url(image, _MAP_IMAGE), len(self.images))

    def add_chart(self, chart: curves.Chart, x_title: str) -> Markup:
        """Add a chart and return its element."""
        id = f"chart-{len(self.charts)}"
        self.charts[id] = curves.figure(chart, x_title)
        columns = [x_title, *(curve.name for curve in chart.curves)]
        rows = list(curves.table_rows(chart))
        return part("chart", id, chart.title, chart.unit, curves.summary(chart), columns, rows)

    def add_map(self, drawn: image_map.Map, images: Sequence[int]) -> Markup:
        """Add a map of the images with the given numbers and return its element."""
        id = f"map-{len(self.maps)}"
        self.maps[id] = image_map.figure(drawn, images)
        return part("map", id, drawn.title, list(drawn.groups))

    def data(self) -> dict[str, Any]:
        """Return the data that the page's script reads."""
        return {"charts": self.charts, "maps": self.maps, "images": list(self.images)}


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    body: Markup  # its headings are one level below the title's
    parts: Sequence["Section"] = ()


def write(path: Path, title: str, sections: Sequence[Section], figures: Figures) -> None:
    """Write the page as one file that works without a network."""
    style = resource("gallery.css") + resource("report.css")
    scripts = plotly_script(), resource("report.js")
    write_page(path, "report.html", style, scripts, title=title, sections=sections, figures=figures.data())


def facts(caption: str, rows: Sequence[tuple[str, Sequence[str]]], runs: Sequence[str]) -> Markup:
    """Return a table with one fact per row and one column per run."""
    head = ["fact", *runs] if len(runs) > 1 else ["fact", "value"]
    return part("table", caption, head, [[name, *values] for name, values in rows], quiet=len(runs) == 1)
