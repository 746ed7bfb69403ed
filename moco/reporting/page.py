"""The report's page: sections of markup, the figures they hold, and all of it in one file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moco.reporting import curves, gallery, html, points
from moco.reporting.html import text

PICTURE = 96  # pixels of a map's picture at most


@dataclass
class Figures:
    """What the page's script draws, by the name of its place; pictures are held once, however often they show."""

    charts: dict[str, Any] = field(default_factory=dict)
    maps: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)

    def picture(self, image: Tensor) -> int:
        """The number of a picture (3, H, W) in the page."""
        return self.pictures.setdefault(html.jpeg(html.thumbnail(image, PICTURE)), len(self.pictures))

    def chart(self, chart: curves.Chart, x_title: str) -> str:
        """Adds a chart; gives its place."""
        name = f"chart-{len(self.charts)}"
        self.charts[name] = curves.figure(chart, x_title)
        return curves.markup(name, chart, x_title)

    def map(self, each: points.Map) -> str:
        """Adds a map; gives its place."""
        name = f"map-{len(self.maps)}"
        self.maps[name] = points.figure(each)
        return points.markup(name, each)

    def plain(self) -> dict[str, Any]:
        return {"charts": self.charts, "maps": self.maps, "pictures": list(self.pictures)}


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    body: str  # markup; its own headings are one level below
    parts: Sequence["Section"] = ()


def write(path: Path, title: str, about: str, sections: Sequence[Section], figures: Figures) -> None:
    """One file with everything in it: pictures, figures, plotly. It opens without a network and asks for none."""
    scripts = [curves.library(), (html.DIRECTORY / "report.js").read_text()]
    style = gallery.style() + (html.DIRECTORY / "report.css").read_text()
    html.write(path, _parts(title, about, sections, figures.plain(), style, scripts))


def _parts(
    title: str,
    about: str,
    sections: Sequence[Section],
    figures: Mapping[str, Any],
    style: str,
    scripts: Sequence[str],
) -> Iterator[str]:
    yield html.opening(title, style, scripts)
    yield '<a class="skip" href="#main">To the content</a>\n'
    yield f'<header><h1>{text(title)}</h1>\n<p class="about">{text(about)}</p></header>\n'
    links = "".join(f'<li><a href="#s{i}">{text(each.title)}</a></li>' for i, each in enumerate(sections))
    yield f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
    yield '<noscript><p class="note">Curves and map need JavaScript; the numbers of the curves are in the tables.</p>'
    yield '</noscript>\n<main id="main" tabindex="-1">\n'
    for i, each in enumerate(sections):
        yield f'<section id="s{i}" aria-labeledby="h{i}"><h2 id="h{i}">{text(each.title)}</h2>\n{each.body}'
        for part in each.parts:
            yield f"<h3>{text(part.title)}</h3>\n{part.body}"
        yield "</section>\n"
    yield "</main>\n"
    yield html.data("figures", figures)
    yield html.closing(scripts)


def paragraph(said: str, kind: str = "") -> str:
    """A paragraph of text; a number stays with its percent sign."""
    shown = text(said).replace(" %", "&nbsp;%")
    return f'<p class="{kind}">{shown}</p>\n' if kind else f"<p>{shown}</p>\n"


def facts(caption: str, rows: Sequence[tuple[str, Sequence[str]]], runs: Sequence[str]) -> str:
    """What is said of one run or of several side by side: a row a fact."""
    head = ["what", *runs] if len(runs) > 1 else ["what", "value"]
    return html.table(caption, head, [[name, *values] for name, values in rows], quiet=len(runs) == 1)


def alarms(found: Sequence[tuple[str, str, str]]) -> str:
    """The doctor's findings: (name, evidence, remedy)."""
    if not found:
        return paragraph("Nothing to report: no alarm rings over what was recorded.")
    return "".join(
        f'<div class="alarm"><p><strong>{text(name[:1].upper() + name[1:])}.</strong> {text(evidence)}.</p>'
        f"<p>Remedy: {text(remedy)}</p></div>\n"
        for name, evidence, remedy in found
    )


def views(data: bytes, said: str) -> str:
    """The picture that the run wrote of its views, from the bytes of its PNG."""
    return (
        f'<figure class="views"><img alt="{text(said)}" src="{html.png(data)}">'
        f"<figcaption>{text(said)}</figcaption></figure>\n"
    )


def queries(found: Sequence[tuple[str, Sequence[gallery.Tile]]], level: int) -> str:
    """Each query with its neighbors, the query first."""
    return "".join(
        f'<div class="query"><h{level}>{text(title)}</h{level}>{gallery.grid(tiles)}</div>\n' for title, tiles in found
    )


def looks(tiles: Sequence[gallery.Tile]) -> str:
    """Pictures and what is attended to in them, in turn."""
    return f'<div class="looks">{gallery.grid(tiles)}</div>\n'


def settings(yaml: str) -> str:
    """The configuration in full, folded."""
    return html.details("The configuration in full", f'<pre tabindex="0">{"".join(_lines(yaml))}</pre>')


def _lines(yaml: str) -> Iterator[str]:
    for line in yaml.splitlines():
        yield text(line) + "\n"
