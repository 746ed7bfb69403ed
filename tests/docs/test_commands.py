"""Every command of the documentation is executed: page by page, in the order in which it stands there."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import torchvision

from moco.training import speed
from tests.docs.pages import Command, block_commands, commands_in, inline_commands, name_of, pages
from tests.docs.shell import Done, Shell
from tests.docs.stand_ins import SmallCifar, make

WITH_COMMANDS = [page for page in pages() if block_commands(page)]
WITH_MENTIONS = [page for page in pages() if inline_commands(page)]


class Workplace:
    """A folder with all that pages may name, made once; each page gets a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, Done()
        make(folder)

    def copied(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to, symlinks=True))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR without its archive; the terminal's width; no look at the machine's speed: half of a small run."""
    monkeypatch.setattr(speed, "step_flops", lambda *_: 1)
    monkeypatch.setattr(speed, "matrix_rate", lambda *_: 1.0)
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, type(name, (SmallCifar,), {}))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def shell_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], done: Done | None = None
) -> Shell:
    monkeypatch.chdir(folder)

    def output() -> str:
        said = capfd.readouterr()
        return said.out[-3000:] + said.err[-3000:]

    return Shell(folder, monkeypatch, output, done)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With runs/digits, trained by the first command of the documentation, small."""
    made = Workplace(tmp_path_factory.mktemp("docs") / "work")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(made.folder)
        Shell(made.folder, patch, said.getvalue).run(
            Command("first", ("python", "-m", "moco.train", "run=runs/digits"))
        )
    for other in ("runs/first", "runs/temperature/t0.5/seed0"):  # further runs that pages name
        shutil.copytree(made.folder / "runs" / "digits", made.folder / other)
    return made


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page(
    page: Path,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shell = shell_in(workplace.copied(tmp_path / "work"), monkeypatch, capfd, workplace.done)
    commands = block_commands(page)
    for command in commands:
        shell.run(command)
    assert len(shell.ran) >= len(commands)


@pytest.mark.parametrize("page", WITH_MENTIONS, ids=name_of)
def test_what_a_page_mentions_composes(
    page: Path,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shell = shell_in(workplace.copied(tmp_path / "work"), monkeypatch, capfd, workplace.done)
    for command in inline_commands(page):
        shell.compose(command)
    assert shell.ran


def test_no_command_hides_in_a_block_of_another_kind() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"^ *```(?:sh|shell|console|zsh)\b", text, flags=re.MULTILINE), page
        fences = len(re.findall(r"^ *```bash", text, flags=re.MULTILINE))
        assert fences == 0 or len(block_commands(page)) >= fences, page
    assert sum(len(block_commands(page)) for page in pages()) > 60


def test_a_command_that_nobody_knows_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = shell_in(tmp_path, monkeypatch, capfd)
    for line in ("make all", "python -m moco.sing loud=true", "python other.py"):
        with pytest.raises(ValueError, match=r"say in tests/docs/\w+.py"):
            shell.run(Command("here", tuple(line.split())))
    with pytest.raises(AssertionError, match="there is no such extra"):
        shell.run(Command("here", ("pip", "install", "momentum-contrast[opera]")))


def test_what_is_said_twice_runs_once_and_leaves_the_same(tmp_path: Path) -> None:
    done, first, second, words = (
        Done(),
        tmp_path / "first",
        tmp_path / "second",
        ["sing", "song=songs/one", "loud=true"],
    )
    for folder in (first, second):
        folder.mkdir()
        (folder / "kept").write_text("as it was")
    said = Done.said(first, words, {"A": "1"})
    assert not done.again(said, first)
    with done.noting(said, first):
        (first / "songs").mkdir()
        (first / "songs" / "one").write_text("la")
    (first / "kept").write_text("changed by another command")
    # Of a field that is set twice only the last word counts, as for Hydra.
    assert done.again(Done.said(second, [words[0], "loud=false", *words[1:]], {"A": "1"}), second)
    assert (second / "songs" / "one").read_text() == "la"
    assert (second / "kept").read_text() == "as it was"
    # It finds something now; its environment differs; it failed.
    assert not done.again(Done.said(second, words, {"A": "1"}), second)
    third = tmp_path / "third"
    assert not done.again(Done.said(third, words, {"A": "2"}), third)
    with pytest.raises(AssertionError), done.noting(Done.said(third, ["shout"], {}), third):
        raise AssertionError
    assert not done.again(Done.said(third, ["shout"], {}), third)


def test_how_a_line_is_read() -> None:
    text = "A=1 one 'a b' c=[1,2] && two   # said\nthree \\\n  four; five 'x=${seed}'\n"
    found = list(commands_in(text, "p", 7))
    assert [(each.where, each.words) for each in found] == [
        ("p:7", ("one", "a b", "c=[1,2]")),
        ("p:7", ("two",)),
        ("p:8", ("three", "four")),
        ("p:8", ("five", "x=${seed}")),
    ]
    assert found[0].environment == {"A": "1"}
    with pytest.raises(ValueError, match="more of a shell"):
        list(commands_in("one | two"))


def test_a_command_that_fails_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = shell_in(tmp_path, monkeypatch, capfd)
    with pytest.raises(AssertionError, match=r"here: python -m moco\.knn run=nowhere"):
        shell.run(Command("here", ("python", "-m", "moco.knn", "run=nowhere")))
    with pytest.raises(AssertionError, match="no field 'optm'"):
        shell.run(Command("here", ("python", "-m", "moco.train", "optm.lr=1")))
