"""A report in a real browser: no console messages, no requests; the map works by mouse, touch and keyboard.

Skipped without playwright (pip install playwright) or without a chromium on the system.
"""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco.config.report import ReportConfig
from moco.reporting.report import report
from tests.reporting.runs import images, run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a chromium on the system: apt-get install chromium")

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report with fifteen held-out images in three classes, each in its own color."""
    root = tmp_path_factory.mktemp("browser")
    one = run(root / "run", images(root / "train", 6), images(root / "test", 5))
    figures = {"top1": 98.7, "top5": 100.0, "interval95": [97.1, 99.3], "balanced": 98.6, "majority": 10.0, "mAP": 12.3}
    entry = {
        "protocol": "all labels",
        "encoder": "pretrained",
        "step": 300,
        "time": "2026-11-29T10:23:00",
        "figures": figures,
    }
    (one / "results.json").write_text(json.dumps([entry | {"command": each} for each in ("knn", "linear", "finetune")]))
    report(ReportConfig(run=str(one), device="cpu", queries=4, neighbours=3, projector=False))
    return one / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # chromium has no sandbox for root; the page is our own.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, made: Path) -> Iterator[Any]:
    """Yield the page; then check that the console is empty and that nothing was requested."""
    page = browser.new_page(viewport=DESKTOP)
    messages: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(made.as_uri())
    page.wait_for_selector(".map .scatterlayer .point")
    yield page
    assert messages == []
    assert [url for url in requested if not url.startswith("data:")] == [made.as_uri()]
    page.close()


def shown_color(page: Any) -> tuple[str, list[int]]:
    """Return the name in the card and the color of its image."""
    source = page.get_attribute(".card img", "src")
    assert page.get_attribute(".card img", "alt") == page.inner_text(".card .name")
    image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")
    return page.inner_text(".card .name"), np.asarray(image).reshape(-1, 3).mean(axis=0).round().astype(int).tolist()


def true_color(made: Path, name: str) -> list[int]:
    with Image.open(made.parents[1] / "test" / name) as image:
        return list(image.convert("RGB").getpixel((0, 0)))  # type: ignore[arg-type]


def test_pointing_at_a_marker_shows_its_image(opened: Any, made: Path) -> None:
    opened.locator(".map .plane").scroll_into_view_if_needed()
    points = opened.query_selector_all(".map .scatterlayer .point")
    assert len(points) == 15
    seen = set()
    for point in points[::4]:
        box = point.bounding_box()
        opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        opened.wait_for_timeout(150)
        name, color = shown_color(opened)
        np.testing.assert_allclose(color, true_color(made, name), atol=4)
        assert f"label {name.split('/')[0]}" in opened.inner_text(".card .group")
        seen.add(name)
    assert len(seen) == len(points[::4])


def test_the_legend_filters_by_mouse_and_keyboard(opened: Any) -> None:
    def visible() -> int:
        return len(opened.query_selector_all(".map .scatterlayer .point"))

    button = opened.locator(".map .legend button").first
    assert button.inner_text().split() == ["●", "blue", "5"]
    button.click()
    assert (button.get_attribute("aria-pressed"), visible()) == ("false", 10)
    button.focus()
    opened.keyboard.press("Space")
    assert (button.get_attribute("aria-pressed"), visible()) == ("true", 15)
    opened.locator("[data-do=none]").click()
    assert visible() == 0
    opened.locator(".map .legend button").nth(2).press("Enter")
    assert visible() == 5
    opened.locator("input[value=cluster]").check()
    assert visible() == 15
    assert opened.locator(".map .legend button").first.inner_text().split()[1:3] == ["cluster", "1"]


def test_the_keyboard_reaches_all_images(opened: Any, made: Path) -> None:
    opened.locator("[data-do=next]").focus()
    names = []
    for _ in range(15):
        opened.keyboard.press("Enter")
        names.append(shown_color(opened)[0])
    assert len(set(names)) == 15
    opened.keyboard.press("Enter")
    assert shown_color(opened)[0] == names[0]  # wraps around
    opened.locator("[data-do=previous]").press("Enter")
    assert shown_color(opened)[0] == names[-1]
    opened.locator(".map .plot").focus()
    reached = set()
    for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown") * 6:
        opened.keyboard.press(key)
        name, color = shown_color(opened)
        np.testing.assert_allclose(color, true_color(made, name), atol=4)
        reached.add(name)
    assert len(reached) > 2
    opened.keyboard.press("Tab")  # the map does not trap the focus
    assert opened.evaluate("document.activeElement.dataset.do") == "previous"


def test_a_folded_chart_is_drawn_when_it_is_opened(opened: Any) -> None:
    folded = opened.locator("details.folded").filter(has_text="Training: ")
    assert folded.locator(".chart").count() > 0
    assert folded.locator(".main-svg").count() == 0
    folded.locator("summary").first.click()
    opened.wait_for_selector("details.folded .chart .main-svg")
    assert all(each.bounding_box()["width"] > 300 for each in folded.locator(".chart .plot").all())
    assert opened.locator("details.folded").filter(has_text="2 more queries").locator(".query").count() == 2


def test_the_skip_link_comes_first_and_focus_shows(opened: Any) -> None:
    opened.keyboard.press("Tab")
    link = opened.locator("a.skip")
    assert opened.evaluate("document.activeElement.className") == "skip"
    assert link.bounding_box()["x"] >= 0
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_full_page(browser: Any, made: Path, scheme: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=scheme, has_touch=True)
    page.goto(made.as_uri())
    page.wait_for_selector(".map .scatterlayer .point")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.documentElement.scrollHeight") < 6500  # pixels
    for each in page.locator("details.folded > summary").all():
        each.click()
    scrolled = "[...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth).length"
    assert page.evaluate(scrolled) == 0
    page.locator(".map .plane").scroll_into_view_if_needed()
    box = page.query_selector_all(".map .scatterlayer .point")[3].bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(150)
    name, color = shown_color(page)
    np.testing.assert_allclose(color, true_color(made, name), atol=4)
    assert page.evaluate("document.querySelector('.map .plot').clientWidth") > 300
    ink, back = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (ink, back) == {
        "light": ("rgb(28, 28, 30)", "rgb(250, 250, 250)"),
        "dark": ("rgb(236, 236, 238)", "rgb(22, 22, 24)"),
    }[scheme]
    page.close()


def test_the_policy_blocks_other_scripts(browser: Any, made: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    text = made.read_text()
    changed.write_text(
        text.replace("</header>", "<script>window.ran = 1</script><img src=x onerror='ran = 2'></header>", 1)
    )
    page = browser.new_page()
    page.goto(changed.as_uri())
    page.wait_for_selector(".map .scatterlayer .point")
    assert page.evaluate("window.ran") is None
    page.close()


def test_the_file_is_small(made: Path) -> None:
    assert made.stat().st_size < 15e6
