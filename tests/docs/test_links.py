"""Every link and anchor resolves, every file that is named is there, every quoted line of code is in its file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import REPOSITORY, anchors, blocks, links, name_of, pages, prose

NAMED = re.compile(r"`((?:moco|configs|scripts|tests|docs)/[\w./-]+)`")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for line, target in links(page):
        where = f"{name_of(page)}:{line}: {target}"
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{where} is not there"
        assert file.is_relative_to(REPOSITORY), f"{where} leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{where}: {name_of(file)} has {', '.join(sorted(anchors(file)))}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in NAMED.findall(prose(page)):
        if re.search(r"NAME|GROUP|MINE", name):
            continue  # a pattern
        assert (REPOSITORY / name).exists(), f"{name_of(page)} names {name}, which is not there"


CONCEPTS = sorted((REPOSITORY / "docs" / "concepts").glob("*.md"))


@pytest.mark.parametrize("page", CONCEPTS, ids=name_of)
def test_a_concept_shows_the_lines_that_do_it(page: Path) -> None:
    """Each Python block stands in the file that was named last before it, line after line."""
    text, quotes = page.read_text(encoding="utf-8"), 0
    for first, block in blocks(page, "python"):
        before = "\n".join(text.splitlines()[: first - 1])
        (*_, named) = re.findall(r"`(moco/[\w/]+\.py)`", before)
        code = [line.strip() for line in (REPOSITORY / named).read_text(encoding="utf-8").splitlines()]
        quoted = [line.strip() for line in block.splitlines()]
        found = any(code[i : i + len(quoted)] == quoted for i in range(len(code)))
        assert found, f"{name_of(page)}:{first}: {named} has not these lines"
        quotes += 1
    assert quotes, f"{name_of(page)} shows no line of the code"


def test_the_menu_of_the_site_has_every_page_once() -> None:
    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for each in (part.values() if isinstance(part, dict) else part) for leaf in leaves(each)]

    menu = leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = REPOSITORY / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | {"readme.md", "contributing.md"}
    assert sorted(menu) == sorted(there)


@pytest.mark.parametrize("page", [page for page in pages() if page.parent.name == "api"], ids=name_of)
def test_the_api_pages_name_modules_that_are_there(page: Path) -> None:
    named = re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert named
    for module in named:
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{name_of(page)}: {module}"
