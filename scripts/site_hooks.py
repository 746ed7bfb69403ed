"""Hooks of mkdocs.yml: add README.md, CONTRIBUTING.md, CHANGELOG.md and LICENSE to the site.

They are at the top level, where GitHub shows them, but mkdocs reads only docs/. Links between the two places are
written for GitHub; the hooks convert them to the paths in the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def links_from_top_level(text: str) -> str:
    """Convert a top-level page's links: `docs/results.md` becomes `results.md`, `README.md` becomes `readme.md`."""
    text = re.sub(r"\]\(docs/", "](", text)
    for page, name in PAGES.items():
        text = text.replace(f"]({page}", f"]({name}")
    return text


def links_to_top_level(text: str) -> str:
    """Convert a docs page's links: `../README.md` and `../../README.md` become links to the copy in the site."""
    for page, name in PAGES.items():
        text = re.sub(rf"\]\(((?:\.\./)*)\.\./{re.escape(page)}", rf"](\1{name}", text)
    return text


def on_files(files: Files, config: Any) -> Files:
    """Add the top-level pages and the license, to which the README links."""
    for page, name in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=links_from_top_level(text)))
    files.append(File.generated(config, "LICENSE", content=(ROOT / "LICENSE").read_text(encoding="utf-8")))
    return files


def on_post_build(config: Any) -> None:
    """Hide the search box on pages opened from the disk: there, browsers do not start the web worker that searches."""
    script = Path(config["site_dir"]) / "search" / "main.js"
    hide = "document.querySelectorAll('[role=search]').forEach(box => { box.hidden = true; });"
    search = script.read_text(encoding="utf-8")
    script.write_text(f"if (location.protocol === 'file:') {{ {hide} }} else {{\n{search}\n}}\n", encoding="utf-8")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Convert the links of each page."""
    return links_to_top_level(markdown)
