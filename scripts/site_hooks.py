"""What mkdocs.yml asks for beside its plugins: README.md and CONTRIBUTING.md are pages of the site, kept once.

They stand at the top level, where GitHub shows them, and mkdocs reads docs/ alone. Links between the two places are
written for GitHub, and turned here to where the pages are in the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}


def from_the_top(text: str) -> str:
    """A page of the top level as one of docs/: `docs/results.md` is `results.md`, `README.md` is `readme.md`."""
    text = re.sub(r"\]\(docs/", "](", text)
    for page, name in PAGES.items():
        text = text.replace(f"]({page}", f"]({name}")
    return text


def to_the_top(text: str) -> str:
    """A page of docs/ with links to `../README.md`, or `../../README.md`, turned to the copy inside."""
    for page, name in PAGES.items():
        text = re.sub(rf"\]\(((?:\.\./)*)\.\./{re.escape(page)}", rf"](\1{name}", text)
    return text


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the top level."""
    for page, name in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=from_the_top(text)))
    return files


def on_post_build(config: Any) -> None:
    """A page that is opened from the disk may not start the search's worker: it hides the box and stays silent."""
    script = Path(config["site_dir"]) / "search" / "main.js"
    hide = "document.querySelectorAll('[role=search]').forEach(box => { box.hidden = true; });"
    searched = script.read_text(encoding="utf-8")
    script.write_text(f"if (location.protocol === 'file:') {{ {hide} }} else {{\n{searched}\n}}\n", encoding="utf-8")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Each page as it goes into the site."""
    return to_the_top(markdown)
