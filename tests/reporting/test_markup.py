"""Pages: text never becomes markup, only the page's own scripts may run, and colors have enough contrast."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moco.reporting import markup
from moco.reporting.gallery import Section
from moco.reporting.page import Figures
from moco.reporting.page import write as write_report
from moco.reporting.plotly_figures import PALETTE

EVIL = '</script><script>alert(1)</script>"onerror="x\' & \u202egpj.exe\n'


def test_text_is_escaped_and_control_characters_are_visible() -> None:
    for shown in (markup.part("paragraph", EVIL)[3:-5], markup.breakable(EVIL).replace("<wbr>", "")):
        assert not set('<>"\n\u202e') & set(shown)
        assert shown.count("\N{REPLACEMENT CHARACTER}") == 2  # the direction mark and the line end
    assert markup.breakable("a_b/<c>") == "a_<wbr>b/<wbr>&lt;c&gt;"


def test_data_cannot_end_its_element_and_is_read_back_unchanged(tmp_path: Path) -> None:
    figures = Figures(charts={"name": EVIL, "x": [1.5, None]})
    write_report(tmp_path / "page.html", "t", [], figures)
    element = (tmp_path / "page.html").read_text().split('<script type="application/json" id="figures">')[1]
    assert json.loads(element.split("</script>")[0]) == figures.data()
    figures.charts["x"] = float("nan")  # JSON.parse would reject the page
    with pytest.raises(ValueError, match="Out of range float"):
        write_report(tmp_path / "page.html", "t", [], figures)


def test_tables_have_headings_and_a_caption() -> None:
    made = markup.part("table", "Results <b>", ["encoder", "top-1"], [["knn", "98.6"], ["<i>", "1"]])
    assert made.count('<th scope="col">') == 2
    assert made.count('<th scope="row">') == 2
    assert "<caption>Results &lt;b&gt;</caption>" in made
    assert "<i>" not in made
    assert 'class="quiet"' not in made
    assert 'class="quiet"' in markup.part("table", "c", ["a"], [], quiet=True)


def test_settings_keep_their_lines() -> None:
    assert '<pre tabindex="0">a:\n  b: &lt;i&gt;\n</pre>' in markup.part("settings", ["a:", "  b: <i>"])


@pytest.mark.parametrize("scripts", [(), ("let a = 1",)])
def test_a_page_allows_only_its_own_scripts(tmp_path: Path, scripts: tuple[str, ...]) -> None:
    path = tmp_path / "page.html"
    markup.write_page(path, "gallery.html", "", scripts, title="t", about="", sections=[])
    page = path.read_text()
    assert "default-src 'none'" in page
    assert "unsafe-eval" not in page
    # echo -n 'let a = 1' | openssl dgst -sha256 -binary | base64
    policy = "script-src 'sha256-LAfYd7pbFUgwfQu8b4q135PeTG2z+/coPEUYCd74eCQ='"
    assert (policy in page, "script-src" in page) == (bool(scripts), bool(scripts))
    assert page.count("<script>let a = 1</script>") == len(scripts)


def test_a_page_is_written_atomically_and_keeps_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")

    def sections() -> Iterator[Section]:
        yield Section("caf\udce9", [])
        if path.read_text() == "before":
            raise RuntimeError

    def write() -> None:
        markup.write_page(path, "gallery.html", "", title="t", about="", sections=sections())

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "before"
    path.write_text("now")
    write()
    assert "caf\\udce9" in path.read_text()


def luminance(color: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    digits = color.lstrip("#")
    digits = "".join(2 * each for each in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def schemes() -> list[dict[str, str]]:
    """Return the colors of the light and of the dark style sheet."""
    found = re.findall(r":root \{([^}]*)\}", markup.resource("gallery.css"))
    return [dict(re.findall(r"--(\w+): (#\w+)", each)) for each in found]


def test_text_has_enough_contrast() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    light, dark = schemes()
    for colors in (light, dark):
        for ink in ("ink", "soft", "mark"):
            for back in ("back", "card"):
                assert contrast(colors[ink], colors[back]) >= 4.5, (ink, back, colors)


def test_lines_and_points_have_enough_contrast() -> None:
    light, dark = schemes()
    assert len(set(PALETTE)) == len(PALETTE)
    for color in PALETTE:
        for colors in (light, dark):
            assert contrast(color, colors["card"]) >= 3, (color, colors["card"])
