"""Output: names are escaped; a closed stream, a broken pipe or a full disk does not stop the work."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moco.__main__ import main as list_commands
from moco.config import config_dir
from moco.runtime import console
from moco.runtime.console import Display, Terminal, log, progress_bar, status_line, summary_panel
from moco.runtime.stdio import print_error, printable, wrapped

REPOSITORY = Path(config_dir()).parent

PRINT_AND_WRITE = """
import os
from moco.runtime.console import Terminal
from moco.runtime.stdio import print_error, protected_streams
with protected_streams():
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    print_error("moco: a sentence")
    Terminal().print("a line")
    with open("result", "w") as file:
        file.write(str(min(opened)))
"""


def run(code: str, folder: Path, redirection: str) -> int:
    command = f"{sys.executable} -c '{code}' {redirection}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, timeout=60).returncode


@pytest.mark.parametrize("redirection", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams_do_not_change_the_status(redirection: str, tmp_path: Path) -> None:
    assert run(PRINT_AND_WRITE, tmp_path, redirection) == 0
    assert int((tmp_path / "result").read_text()) > 2


def broken(name: str) -> int:
    """A descriptor of a pipe, or of a terminal, whose other end is closed."""
    other, end = os.pipe() if name == "pipe" else os.openpty()
    os.close(other)
    return end


COLUMNS = ["encoder", "validation %", "top-1 %", "top-5 %", "a setting", "g"]
WORDS = st.text(alphabet="abcdefgh%±ü ", min_size=1, max_size=30)


@pytest.mark.parametrize("width", [60, 80, 120])
@given(st.lists(st.lists(WORDS, min_size=6, max_size=6), min_size=1, max_size=3))
def test_no_word_of_a_table_is_broken(width: int, rows: list[list[str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        with io.StringIO() as file, contextlib.redirect_stdout(file):
            console.table("a title", COLUMNS, rows, "a note")
            printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    for word in {word for row in rows for cell in row for word in cell.split()}:
        assert word in words


def test_a_terminal_breaks_lines_between_words_and_never_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(Terminal, "is_terminal", True)
    line = "a long line of words with runs/a_path/that_is_longer/than_the_width/of_this/encoder.safetensors in it"
    with io.StringIO() as file, contextlib.redirect_stdout(file):
        console.log(line)
        console.log_next(f"python -m moco.embed {line}", "a reason")
        console.log_next("python -m moco.knn run=runs/digits", "a reason")
        console.log_next(f"python -m moco.search {line}")
        console.log(f"set a field: python -m moco.knn {line}")
        *printed, following, reason, short, long, last = file.getvalue().splitlines()
    assert " ".join(printed) == line
    assert (following, reason) == (f"next: python -m moco.embed {line}", "  (a reason)")
    assert short == "next: python -m moco.knn run=runs/digits  (a reason)"
    assert long == f"next: python -m moco.search {line}"
    assert last == f"set a field: python -m moco.knn {line}"


def test_a_number_stays_with_its_unit_and_its_uncertainty() -> None:
    line = "raw pixels 64.9 % ± 5.3, untrained 60.2 % ± 5.7, 8 as 1 6.0 %"
    for width in range(14, 80):
        lines = wrapped(line, width).splitlines()
        assert " ".join(lines) == line
        assert not any(each.startswith(("%", "±", "5.")) for each in lines)


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_errors_and_warnings_on_a_terminal_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = (
        "optim.warmup_epochs=2.0 is not below epochs=2: the learning rate rises to the end; set optim.warmup_epochs=0"
    )
    for line, lines in ((words, 2), (f"{words}, python -m moco.train run=runs/digits", 1)):
        for stream, expected in ((FakeTerminal(), lines), (io.StringIO(), 1)):
            monkeypatch.setattr(sys, "stderr", stream)
            print_error(line)
            printed = stream.getvalue().splitlines()
            assert (" ".join(printed), len(printed)) == (line, expected)
            assert expected == 1 or max(map(len, printed)) <= 60


@pytest.mark.parametrize("print_line", [log, console.log_next, lambda line: print_error(line)])
def test_a_line_is_printed_above_the_progress_bar_and_not_behind_it(
    print_line: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar("epochs") as progress:
        progress(1, 2)
        time.sleep(0.3)  # the bar is drawn ten times per second
        print_line("a line")
    printed = "".join(capsys.readouterr())
    assert "1/2" in printed.partition("a line")[0]
    assert re.search(r"\x1b\[2K(next: )?a line\n", printed)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_neither_the_numbers_of_a_bar_nor_the_title_of_a_panel_are_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with progress_bar("pretrained: features of the held-out images") as progress:
        progress(1000, 1297)
    printed = capsys.readouterr().out
    assert "1000/1297" in printed
    assert "…" not in printed
    title = "Outliers (mean cosine similarity to the 12 nearest neighbors)"
    summary_panel(title, [("median", "0.914")])
    assert title.rpartition(" ")[2] in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_of_commands_breaks_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    list_commands()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("name", ["pipe", "terminal"])
def test_output_is_dropped_after_the_reader_has_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = broken(name)
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        if name == "terminal":
            monkeypatch.setattr(Console, "is_terminal", True)
        display = Display(10, 10, 0)
        for step in range(1, 11):
            display.step(step)
        display.log("a line")
        display.close()
        summary_panel("done", [("a", "b")])
        assert display.console.quiet
        with progress_bar("work") as progress:
            progress(1, 2)
        print("dropped too", flush=True)
        assert os.readlink(f"/proc/self/fd/{end}") == os.devnull


def test_other_errors_are_still_raised() -> None:
    with pytest.raises(ValueError, match="a defect"), Terminal():
        raise ValueError("a defect")


def test_the_status_line_omits_measures_that_a_method_does_not_return() -> None:
    values = {"train/loss": 1.5, "train/lr": 0.1, "speed/images_per_second": 100.0, "speed/data_wait": 0.0}
    assert status_line(values) == "loss 1.500 · lr 0.1 · 100 img/s · data wait 0 %"
    assert "contrast acc 25 %" in status_line(values | {"train/contrast_accuracy": 0.25})


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_breaks_lines_between_entries(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    entries = ["loss 1.500 (chance 6.240)", "contrast acc 25 %", "lr 0.1", "100 img/s", "data wait 0 %", "MFU 40 %"]
    log(" · ".join(entries))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {40: 3, 60: 2, 80: 2, 120: 1}[width]
    assert max(map(len, lines)) <= width
    assert [each for line in lines for each in line.removesuffix(" ·").split(" · ")] == entries


@given(st.text())
def test_printable_text_is_one_line_that_cannot_control_a_terminal(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in BIDI_CONTROLS for letter in shown)
    assert printable(shown) == shown
    shown.encode()


BIDI_CONTROLS = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Bücher, 日本, 👩‍🔬, ملف", "plain, Bücher, 日本, 👩‍🔬, ملف"),
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("a\nmoco: forged", r"a\nmoco: forged"),
        ("\x9b2J\x07\r\x7f", r"\x9b2J\x07\r\x7f"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("\ufeffcat", r"\ufeffcat"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("\u2028", r"\u2028"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_path_is_never_broken(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(Terminal, "is_terminal", terminal)
    path = f"/a_home/{'a_long_folder/' * 9}report.html"
    with io.StringIO() as file, contextlib.redirect_stdout(file):
        console.summary_panel("report", [("state", "finished: 2 epochs"), ("page", f"{path} (5.5 MB)")])
        panel = file.getvalue()
        console.table("a title", ["file", "accuracy"], [[path, "98.7"], ["", "1.0"]])
        printed = file.getvalue()
    assert printed.count(path) == 2
    assert panel.index("finished: 2 epochs") < panel.index("page:")  # below the panel
    assert [line.split() for line in printed.splitlines() if "accuracy" in line] == [
        ["accuracy", each] for each in ("98.7", "1.0")
    ]


HOSTILE = "[b]\x1b[2J\n\u202e" + os.fsdecode(b"\xff")
ESCAPED = r"[b]\x1b[2J\n\u202e\udcff"


def test_every_way_to_print_escapes_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    console.log(HOSTILE)
    console.summary_panel(HOSTILE, [("name", HOSTILE)])
    console.table(HOSTILE, [HOSTILE], [[HOSTILE]], f"{HOSTILE[:8]}\nsecond line")
    Display(10, 10, 0).log(HOSTILE)
    print_error(HOSTILE)
    printed, errors = capsys.readouterr()
    assert printed.count(ESCAPED) == 1 + 2 + 3 + 1
    assert errors == f"{ESCAPED}\n"
    assert "\x1b" not in printed
    assert "\u202e" not in printed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8:strict"])
def test_characters_that_the_terminal_lacks_do_not_end_the_work(encoding: str, tmp_path: Path) -> None:
    code = (
        "from moco.runtime.stdio import print_error, protected_streams\n"
        "from moco.runtime import console\n"
        "with protected_streams():\n"
        '    console.log("a · 日本 \\udcff")\n'
        '    console.table("·", ["日本"], [["👩"]])\n'
        '    print_error("日本 \\udcff")\n'
        '    print("日本 \\udcff")\n'
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert rb"\udcff" in done.stdout
    assert rb"\udcff" in done.stderr
    if encoding != "utf-8:strict":
        assert rb"\u65e5\u672c" in done.stdout


def test_only_the_console_and_stdio_print() -> None:
    package = Path(console.__file__).parents[1]
    allowed = {package / "runtime" / "console.py", package / "runtime" / "stdio.py"}
    # `__main__.py` prints only the table of commands, which needs no escapes.
    sources = {path: path.read_text() for path in package.rglob("*.py") if path.name != "__main__.py"}
    uses = re.compile(r"^\s*print\(|sys\.std(out|err)\.write|^(from|import) rich\b", re.MULTILINE)
    assert {path for path, source in sources.items() if uses.search(source)} == allowed


def test_a_terminal_without_width_has_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert console.Terminal().width == 80


def test_a_notebook_gets_plain_lines_without_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jupyter gives `!COMMAND` a terminal that does not move the cursor."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal

    def printed() -> str:
        with progress_bar("images") as progress:
            progress(1, 2)
        log("done")
        return capsys.readouterr().out

    assert "\x1b[" in printed()
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert printed() == "done\n"
