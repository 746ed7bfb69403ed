"""Links and anchors resolve, named files exist, and quoted code is in its file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import REPOSITORY, anchors, blocks, links, name_of, pages, prose

NAMED = re.compile(r"`((?:moco|configs|scripts|tests|docs)/[\w./-]+)`")


def broken_links(page: Path) -> Iterator[str]:
    for line, target in links(page):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(REPOSITORY) or not file.exists() or (anchor and anchor not in anchors(file)):
            yield f"{name_of(page)}:{line}: {target}"


def test_links_and_anchors_resolve() -> None:
    assert [each for page in pages() for each in broken_links(page)] == []


def test_optional_parts_are_written_as_code() -> None:
    """Markdown reads `[A][B]` in prose as a link to B, and the strict build of the site fails."""
    found = [name_of(page) for page in pages() if "][" in re.sub(r"`[^`]*`", "", prose(page))]
    assert found == []


def test_named_files_exist() -> None:
    current = [page for page in pages() if page.name != "CHANGELOG.md"]  # which names removed files too
    named = [(page, name) for page in current for name in NAMED.findall(prose(page))]
    assert len(named) > 50
    missing = [
        f"{name_of(page)}: {name}"
        for page, name in named
        if not re.search(r"NAME|GROUP|MINE", name) and not (REPOSITORY / name).exists()
    ]
    assert missing == []


def wrong_quotes(page: Path) -> Iterator[str]:
    """Each Python block must be in the file named last before it, line by line."""
    text = page.read_text(encoding="utf-8")
    for first, block in blocks(page, "python"):
        before = "\n".join(text.splitlines()[: first - 1])
        (*_, named) = re.findall(r"`(moco/[\w/]+\.py)`", before)
        code = [line.strip() for line in (REPOSITORY / named).read_text(encoding="utf-8").splitlines()]
        quoted = [line.strip() for line in block.splitlines()]
        if not any(code[i : i + len(quoted)] == quoted for i in range(len(code))):
            yield f"{name_of(page)}:{first}: not in {named}"


def test_concept_pages_quote_the_code() -> None:
    concepts = sorted((REPOSITORY / "docs" / "concepts").glob("*.md"))
    assert [name_of(page) for page in concepts if not list(blocks(page, "python"))] == []
    assert [each for page in concepts for each in wrong_quotes(page)] == []


def test_the_menu_lists_every_page_once() -> None:
    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for each in (part.values() if isinstance(part, dict) else part) for leaf in leaves(each)]

    menu = leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = REPOSITORY / "docs"
    generated = {"readme.md", "contributing.md", "changelog.md"}
    assert sorted(menu) == sorted({path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | generated)


def test_api_pages_name_existing_modules() -> None:
    api = [page for page in pages() if page.parent == REPOSITORY / "docs" / "api"]
    named = [
        (page, module)
        for page in api
        for module in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert {page for page, _ in named} == set(api)
    missing = [
        f"{name_of(page)}: {module}"
        for page, module in named
        if not (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
        and not (REPOSITORY / module.replace(".", "/") / "__init__.py").is_file()
    ]
    assert missing == []


def test_the_api_page_of_the_losses_has_all_modules() -> None:
    """moco.losses is stable as a whole, so each of its modules is documented."""
    page = (REPOSITORY / "docs" / "api" / "losses.md").read_text(encoding="utf-8")
    modules = {f"moco.losses.{file.stem}" for file in (REPOSITORY / "moco" / "losses").glob("[!_]*.py")}
    assert set(re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)) == modules
