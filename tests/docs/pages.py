"""Reads commands, links, anchors and quoted code from the pages of the documentation.

A page is README.md, CONTRIBUTING.md, CHANGELOG.md or any Markdown file below docs/.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moco.config import config_dir

REPOSITORY = Path(config_dir()).parent
FENCE = re.compile(r"^( *)```([\w-]*).*?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python -m moco\.\w+|torchrun(?= )|docker(?= )|tensorboard(?= ))[^`]*)`")
SEPARATORS = {"&&", ";"}  # between two commands on a line


@dataclass(frozen=True)
class Command:
    """One command, parsed as by a shell."""

    where: str
    """page:line, for messages"""
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Return every page, in a fixed order."""
    top = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return top + sorted((REPOSITORY / "docs").rglob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block[2] == language:
            yield text.count("\n", 0, block.start(3)) + 1, block[3]


def prose(page: Path) -> str:
    """Return the text without its fenced blocks, with the same number of lines."""
    text = page.read_text(encoding="utf-8")
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)


def commands_in(text: str, where: str = "", first: int = 1) -> Iterator[Command]:
    """Yield the commands of a shell text; `first` is the number of its first line.

    Raises:
        ValueError: for shell syntax that this parser does not support, such as a pipe or a loop.
    """
    waiting, start = "", first
    for number, line in enumerate(text.splitlines(), first):
        start = start if waiting else number
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        yield from _commands_of(waiting, f"{where}:{start}")
        waiting = ""


def _commands_of(line: str, where: str) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in SEPARATORS:
            if words:
                yield _command(words, where)
            words = []
        elif set(word) <= set(";&|()<>"):
            raise ValueError(
                f"{where}: {word!r} is shell syntax that tests/docs does not support: write the commands one by one"
            )
        else:
            words.append(word)


def _command(words: list[str], where: str) -> Command:
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    return Command(where, tuple(words), environment)


def block_commands(page: Path) -> list[Command]:
    """Return all commands of the page's ```bash blocks."""
    return [each for first, text in blocks(page, "bash") for each in commands_in(text, name_of(page), first)]


def inline_commands(page: Path) -> list[Command]:
    """Return moco's commands between backticks in the text."""
    text = prose(page)
    return [
        each
        for found in INLINE.finditer(text)
        for each in commands_in(" ".join(found[1].split()), name_of(page), text.count("\n", 0, found.start()) + 1)
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub generates them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield line and target of each link and figure in the text."""
    text = prose(page)
    for link in re.finditer(r"\]\(\s*<?([^)\s>]+)", text):
        yield text.count("\n", 0, link.start()) + 1, link[1]
