"""Galleries: self-contained files with all tiles, in which file names stay text."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco.reporting.contact_sheet import write_png
from moco.reporting.gallery import Section, Tile, write_html

EVIL = '<script>alert(1)</script>"onerror="x\' & \u202egpj.exe\n'


def flat(height: int, width: int, color: tuple[int, int, int]) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_contains_its_images_and_requests_nothing(tmp_path: Path) -> None:
    path = tmp_path / "g.html"
    tiles = [
        Tile(flat(400, 800, (200, 30, 30)), "query", "a/red.png", marked=True),
        Tile(flat(20, 10, (30, 30, 200)), "0.875", "a/blue.png · sky", "10 × 20 · 3 kB"),
        Tile(None, "0.5", "gone.png"),
    ]
    write_html(path, "Title", "About it", [Section("first", tiles), Section("second", tiles[1:2])])
    page = Page(path)
    assert len(page.all("section")) == 2
    assert len(page.all("figure")) == 4
    assert [each.get("class") for each in page.all("figure")] == ["mark", None, None, None]
    images = [each["src"] for each in page.all("img") if "src" in each]
    decoded = []
    for source in images:
        assert source is not None
        head, data = source.split(",")
        assert head == "data:image/jpeg;base64"
        decoded.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert [each.size for each in decoded] == [(320, 160), (10, 20), (10, 20)]
    assert np.abs(np.asarray(decoded[0]).reshape(-1, 3).mean(axis=0) - [200, 30, 30]).max() < 4
    for word in ("Title", "About it", "first", "0.875", "a/blue.png · sky", "10 × 20 · 3 kB", "gone.png"):
        assert word in page.text, word
    assert not re.search(r"https?:|<link|<script|@import|url\(", path.read_text())
    assert "default-src 'none'" in path.read_text()
    assert "prefers-color-scheme: dark" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["g.html"]  # no temporary file is left


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "g.html"
    write_html(path, EVIL, EVIL, [Section(EVIL, [Tile(flat(8, 8, (0, 0, 0)), EVIL, EVIL, EVIL)])])
    page = Page(path)
    assert page.all("script") == []
    assert all(set(each) <= {"class", "loading", "alt", "src", "title"} for _, each in page.elements[8:])
    assert page.text.count("<script>alert(1)") == 7  # title twice, about, section, headline, detail, caption
    assert "\u202e" not in path.read_text()  # it would display exe.jpg for gpj.exe


def test_names_that_are_not_utf8_show_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "g.html"
    section = Section("s", [Tile(flat(8, 8, (0, 0, 0)), "0.5", b"caf\xe9.png".decode("utf-8", "surrogateescape"))])
    write_html(path, "t", "a", [section])
    assert "caf\\udce9.png" in Page(path).text
    write_png(tmp_path / "g.png", "t", "a", [section])
    assert Image.open(tmp_path / "g.png").width > 1000


@pytest.mark.parametrize(("height", "width"), [(400, 800), (10, 10), (3000, 20)])
def test_the_contact_sheet_contains_its_tiles(tmp_path: Path, height: int, width: int) -> None:
    color = (220, 40, 10)
    path = tmp_path / "g.png"
    tile = Tile(flat(height, width, color), "0.9", f"{'long/' * 40}name.png", marked=True)
    write_png(path, "Title", EVIL, [Section("one", [tile] * 3), Section("two", [Tile(None, "0.1", "gone")])], columns=2)
    sheet = np.asarray(Image.open(path)).astype(int)
    shown = (np.abs(sheet - color).max(axis=2) < 6).sum()
    area = 168 * 168 * min(height, width) / max(height, width)
    assert shown == pytest.approx(3 * area, rel=0.15, abs=400)
    assert sheet.shape[1] == 12 + 2 * (168 + 12)


def test_a_page_without_images_says_so_and_a_query_has_a_row_of_its_own(tmp_path: Path) -> None:
    write_html(tmp_path / "none.html", "t", "a", [])
    assert "No images to show." in (tmp_path / "none.html").read_text()
    tiles = [Tile(None, "query", "q", marked=True), Tile(None, "0.9", "n")]
    write_html(tmp_path / "some.html", "t", "a", [Section("q", tiles), Section("group", tiles[1:])])
    assert (tmp_path / "some.html").read_text().count('<section class="of-query">') == 1
