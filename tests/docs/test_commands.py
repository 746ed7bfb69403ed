"""Runs every command of the documentation, page by page, in the order of the page."""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torchvision

from moco.training import throughput
from tests.docs.pages import Command, block_commands, commands_in, inline_commands, name_of, pages
from tests.docs.shell import CommandCache, Shell
from tests.docs.stand_ins import SmallCifar, make

WITH_COMMANDS = [page for page in pages() if block_commands(page)]
WITH_MENTIONS = [page for page in pages() if inline_commands(page)]


class Workplace:
    """A folder with all data that pages name, made once. Each page gets a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, CommandCache()
        make(folder)

    def copied(self) -> Path:
        """Return a new copy, which stays until the last test of the module: the cache names its files."""
        return Path(
            shutil.copytree(self.folder, tempfile.mkdtemp(dir=self.folder.parent), symlinks=True, dirs_exist_ok=True)
        )


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CIFAR's archive, set the terminal's width, and skip the measurement of the machine's speed."""
    monkeypatch.setattr(throughput, "step_flops", lambda *_: 1)
    monkeypatch.setattr(throughput, "matrix_rate", lambda *_: 1.0)
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, type(name, (SmallCifar,), {}))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def shell_in(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    cache: CommandCache | None = None,
) -> Shell:
    monkeypatch.chdir(folder)

    def output() -> str:
        captured = capfd.readouterr()
        return captured.out[-3000:] + captured.err[-3000:]

    return Shell(folder, monkeypatch, output, cache)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The folder with runs/digits, trained by a small version of the documentation's first command."""
    made = Workplace(tmp_path_factory.mktemp("docs") / "work")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as captured:
        patch.chdir(made.folder)
        Shell(made.folder, patch, captured.getvalue).run(
            Command("first", ("python", "-m", "moco.train", "run=runs/digits"))
        )
    for other in ("runs/first", "runs/temperature/t0.5/seed0"):  # other runs that pages name
        shutil.copytree(made.folder / "runs" / "digits", made.folder / other)
    return made


SLOW = ("README.md", "docs/howto/own_images.md")  # .ci/run runs these pages; the other pages are long tests
MARKS = [pytest.mark.slow if name_of(each) in SLOW else pytest.mark.long for each in WITH_COMMANDS]
PAGES = [pytest.param(each, marks=mark) for each, mark in zip(WITH_COMMANDS, MARKS, strict=True)]


@pytest.mark.parametrize("page", PAGES, ids=map(name_of, WITH_COMMANDS))
def test_commands_of_a_page_run(
    page: Path,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shell = shell_in(workplace.copied(), monkeypatch, capfd, workplace.cache)
    commands = block_commands(page)
    for command in commands:
        shell.run(command)
    assert len(shell.ran) >= len(commands)


@pytest.mark.parametrize("page", WITH_MENTIONS, ids=name_of)
def test_commands_mentioned_in_the_text_compose(
    page: Path,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shell = shell_in(workplace.copied(), monkeypatch, capfd, workplace.cache)
    for command in inline_commands(page):
        shell.compose(command)
    assert shell.ran


def test_commands_are_only_in_bash_blocks() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"^ *```(?:sh|shell|console|zsh)\b", text, flags=re.MULTILINE), page
        fences = len(re.findall(r"^ *```bash", text, flags=re.MULTILINE))
        assert fences == 0 or len(block_commands(page)) >= fences, page
    assert sum(len(block_commands(page)) for page in pages()) > 60


def test_an_unknown_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = shell_in(tmp_path, monkeypatch, capfd)
    for line in ("make all", "python -m moco.sing loud=true", "python other.py"):
        with pytest.raises(ValueError, match=r"tests/docs/\w+\.py"):
            shell.run(Command("here", tuple(line.split())))
    with pytest.raises(AssertionError, match=r"momentum-contrast\[opera\]"):
        shell.run(Command("here", ("pip", "install", "momentum-contrast[opera]")))


def test_a_repeated_command_runs_once_and_restores_its_files(tmp_path: Path) -> None:
    cache, first, second = CommandCache(), tmp_path / "first", tmp_path / "second"
    words = ["sing", "song=songs/one", "loud=true"]
    for folder in (first, second):
        folder.mkdir()
        (folder / "other").write_text("before")
    invocation = cache.invocation(first, words, {"A": "1"})
    assert not cache.restore(invocation, first)
    with cache.record(invocation, first):
        (first / "songs").mkdir()
        (first / "songs" / "one").write_text("la")
    (first / "other").write_text("changed by another command")
    # If a field is set twice, only the last value counts, as in Hydra.
    assert cache.restore(cache.invocation(second, [words[0], "loud=false", *words[1:]], {"A": "1"}), second)
    assert (second / "songs" / "one").read_text() == "la"
    assert (second / "other").read_text() == "before"
    # Another command: a path that it names exists now, its environment differs, or it failed.
    assert not cache.restore(cache.invocation(second, words, {"A": "1"}), second)
    third = tmp_path / "third"
    assert not cache.restore(cache.invocation(third, words, {"A": "2"}), third)
    with pytest.raises(AssertionError), cache.record(cache.invocation(third, ["shout"], {}), third):
        raise AssertionError
    assert not cache.restore(cache.invocation(third, ["shout"], {}), third)


def test_a_shell_line_is_split_into_commands() -> None:
    text = "A=1 one 'a b' c=[1,2] && two   # a comment\nthree \\\n  four; five 'x=${seed}'\n"
    found = list(commands_in(text, "p", 7))
    assert [(each.where, each.words) for each in found] == [
        ("p:7", ("one", "a b", "c=[1,2]")),
        ("p:7", ("two",)),
        ("p:8", ("three", "four")),
        ("p:8", ("five", "x=${seed}")),
    ]
    assert found[0].environment == {"A": "1"}
    with pytest.raises(ValueError, match=r"'\|'"):
        list(commands_in("one | two"))


def test_a_failing_command_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = shell_in(tmp_path, monkeypatch, capfd)
    with pytest.raises(AssertionError, match=r"here: python -m moco\.knn run=nowhere"):
        shell.run(Command("here", ("python", "-m", "moco.knn", "run=nowhere")))
    with pytest.raises(AssertionError, match="no field 'optm'"):
        shell.run(Command("here", ("python", "-m", "moco.train", "optm.lr=1")))
