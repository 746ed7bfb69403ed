"""What pages are made of: no text becomes markup, no script but the page's own may run, colors can be read."""

import json
import re
from pathlib import Path

import pytest

from moco.reporting import gallery, html

EVIL = '</script><script>alert(1)</script>"onerror="x\' & \u202egpj.exe\n'


def test_text_is_inert_and_what_steers_the_display_shows() -> None:
    shown = html.text(EVIL)
    assert not set('<>"\n\u202e') & set(shown)
    assert shown.count("\N{REPLACEMENT CHARACTER}") == 2  # the direction mark and the line's end
    assert html.breaking("a_b/<c>") == "a_<wbr>b/<wbr>&lt;c&gt;"


def test_a_value_cannot_end_its_element_and_comes_back_whole() -> None:
    value = {"name": EVIL, "x": [1.5, None]}
    element = html.data("figures", value)
    assert element.count("<") == 2  # its own two tags
    inside = element[element.index(">") + 1 : element.rindex("<")]
    assert json.loads(inside) == value
    with pytest.raises(ValueError, match="Out of range float"):
        html.data("figures", {"x": float("nan")})  # JSON.parse would refuse the whole page


def test_tables_have_headings_and_a_caption() -> None:
    made = html.table("Figures <b>", ["encoder", "top-1"], [["knn", "98.6"], ["<i>", "1"]])
    assert made.count('<th scope="col">') == 2
    assert made.count('<th scope="row">') == 2
    assert "<caption>Figures &lt;b&gt;</caption>" in made
    assert "<i>" not in made
    assert "class=quiet" not in made
    assert "class=quiet" in html.table("c", ["a"], [], quiet=True)


def test_a_page_allows_its_own_scripts_by_their_digest_and_nothing_else() -> None:
    with_one, without = html.opening("t", "", ["let a = 1"]), html.opening("t", "")
    # echo -n 'let a = 1' | openssl dgst -sha256 -binary | base64
    assert "script-src 'sha256-LAfYd7pbFUgwfQu8b4q135PeTG2z+/coPEUYCd74eCQ='" in with_one
    for each in (with_one, without):
        assert "default-src 'none'" in each
        assert "unsafe-eval" not in each
    assert "script-src" not in without


def test_half_a_page_is_never_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")

    def parts() -> object:
        yield "after"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        html.write(path, parts())  # type: ignore[arg-type]
    assert path.read_text() == "before"
    html.write(path, ["caf\udce9"])  # a name that is no UTF-8
    assert path.read_text() == "caf\\udce9"


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance."""
    digits = color.lstrip("#")
    digits = "".join(2 * each for each in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def schemes() -> list[dict[str, str]]:
    """The colors of the style sheet in light and in dark."""
    found = re.findall(r":root \{([^}]*)\}", gallery.style())
    return [dict(re.findall(r"--(\w+): (#\w+)", each)) for each in found]


def test_text_can_be_read_in_light_and_dark() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    light, dark = schemes()
    for colors in (light, dark):
        for ink in ("ink", "soft", "mark"):
            for back in ("back", "card"):
                assert contrast(colors[ink], colors[back]) >= 4.5, (ink, back, colors)


def test_lines_and_points_can_be_told_from_the_background() -> None:
    from moco.reporting.curves import PALETTE

    light, dark = schemes()
    assert len(set(PALETTE)) == len(PALETTE)
    for color in PALETTE:
        for colors in (light, dark):
            assert contrast(color, colors["card"]) >= 3, (color, colors["card"])
