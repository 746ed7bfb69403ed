"""Terminal output: a live progress display on a terminal, plain lines elsewhere. Only rank 0 prints.

All text passes through `printable` here, because names of files, classes and runs are part of it.
"""

import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from moco.distributed import is_rank_zero
from moco.runtime.stdio import discard_output, holds_command, printable, wrapped


class Terminal(Console):
    """A console that drops its output after a broken pipe (`| head`, a closed terminal); rich would end the process."""

    def __init__(self) -> None:
        # A notebook does not move the cursor: each state of a progress bar would stay in the cell.
        force = False if "JPY_PARENT_PID" in os.environ else None  # set in a kernel and in commands that it starts
        super().__init__(highlight=False, quiet=not is_rank_zero(), force_terminal=force, force_jupyter=force)
        if self.width < 1:  # COLUMNS=0
            self.width = 80

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output(self.file)

    def __exit__(self, *about: Any) -> None:
        try:
            super().__exit__(*about)  # rich writes here
        except OSError:  # a closed terminal, or a log file on a full disk
            self.on_broken_pipe()


_LIVE: list[Terminal] = []  # consoles of the progress bars that are shown, the innermost last


def _console() -> Terminal:
    """Return the console to print on: while a progress bar is shown, the bar's console, which prints above the bar."""
    return _LIVE[-1] if _LIVE else Terminal()


class Display:
    """The live display of a training run that resumes from step `start`."""

    def __init__(self, total_steps: int, steps_per_epoch: int, start: int) -> None:
        self.console = Terminal()
        self._total, self._steps_per_epoch, self._start = total_steps, steps_per_epoch, start
        self._last_line = self._first_step = time.monotonic()  # _first_step: the end of the first step
        name, share, left = map(TextColumn, ("[bold]{task.description}", "{task.percentage:3.0f} %", "left"))
        columns = (name, BarColumn(bar_width=None), share, MofNCompleteColumn(), left, TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, expand=True)
        self._task = self._progress.add_task("epoch 1", total=total_steps, completed=start)
        self._status = Text("")
        self._live: Live | None = None
        self._show_live = self.console.is_terminal and not self.console.quiet

    def log(self, line: str) -> None:
        """Print a line above the progress bar."""
        _print_line(self.console, line)

    def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Advance the bar to `step` finished steps; show the metrics of that step if `values` are given."""
        if self._show_live and self._live is None:  # not before the first step, so that opening lines are above it
            self._live = Live(Group(self._progress, self._status), console=self.console, refresh_per_second=8)
            self._live.start()
            _LIVE.append(self.console)
        if step == self._start + 1:
            self._first_step = time.monotonic()
        epochs = self._total // self._steps_per_epoch
        epoch = min((step - 1) // self._steps_per_epoch + 1, epochs)
        self._progress.update(self._task, completed=step, description=f"epoch {epoch}/{epochs}")
        if values is None:
            return
        line = status_line(values)
        self._status.plain = _wrapped(line, self.console.width)
        # Without a terminal, print a line at most every ten seconds.
        if self._live is None and (time.monotonic() - self._last_line > 10 or step == self._total):
            self._last_line = time.monotonic()
            # The first step is left out: it contains the start of the loader processes.
            steps = step - self._start - 1
            seconds = (self._last_line - self._first_step) / max(1, steps) * (self._total - step)
            left = f" · left {duration(seconds)}" if steps else ""
            self.log(f"epoch {epoch}/{epochs} step {step}/{self._total} · {line}{left}")

    def close(self) -> None:
        """Stop the live display. Its last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            _LIVE.remove(self.console)
            self._live, self._show_live = None, False


def status_line(values: Mapping[str, float]) -> str:
    """Format a step's metrics as one line, with reference values such as the chance-level loss."""
    chance = values.get("train/chance")
    accuracy = values.get("train/contrast_accuracy")
    parts = [
        f"loss {values['train/loss']:.3f}" + (f" (chance {chance:.3f})" if chance else ""),
        *([] if accuracy is None else [f"contrast acc {100 * accuracy:.0f} %"]),
        f"lr {values['train/lr']:.2g}",
        f"{values['speed/images_per_second']:,.0f} img/s",
        f"data wait {100 * values['speed/data_wait']:.0f} %",
    ]
    optional = {"speed/mfu": "MFU {:.0%}", "speed/peak_memory_gib": "{:.1f} GiB", "train/queue_fill": "queue {:.0%}"}
    parts += [text.format(values[name]).replace("%", " %") for name, text in optional.items() if name in values]
    return " · ".join(parts)


@contextmanager
def progress_bar(
    description: str, heartbeat: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on rank 0, and remove the bar at the end. Yields a function to call with (done, total).

    The yielded function also calls `heartbeat`, even on ranks and terminals without a bar.
    """

    def progress(done: int, total: int) -> None:
        heartbeat()
        bar.update(task, completed=done, total=total, visible=True)

    console = Terminal()
    name = TextColumn(printable(description), markup=False, table_column=Column())  # wraps, so that no number is cut
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        _LIVE.append(console)
        try:
            yield progress
        finally:
            _LIVE.remove(console)


def log(line: str) -> None:
    """Print a line, on rank 0; on a terminal, a long line is broken between words."""
    _print_line(_console(), line)


def _print_line(console: Terminal, line: str) -> None:
    line = printable(line)
    if console.is_terminal and not holds_command(line):
        line = _wrapped(line, console.width)
    console.print(line, markup=False, soft_wrap=True)


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> str:
    """Break lines as `wrapped` does, but break a list, such as "loss 1.5 · lr 0.1", only between its entries."""
    entries = text.split(" · ")
    if len(entries) > 1 and max(map(cell_len, entries)) < width - 2:
        text = "\N{NO-BREAK SPACE}· ".join(entry.replace(" ", "\N{NO-BREAK SPACE}") for entry in entries)
    return wrapped(text, width, first, others)


def log_next(command: str, reason: str = "") -> None:
    """Print a command that continues from here, on rank 0. It is one line, however long, so that it can be copied.

    On a terminal, a reason that does not fit behind the command is printed on the next line.
    """
    console, line, reason = _console(), f"next: {command}", f"  ({reason})" * bool(reason)
    if reason and console.is_terminal and cell_len(line + reason) > console.width:
        _print_line(console, line)
        line, reason = reason, ""
    _print_line(console, line + reason)


def summary_panel(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print the closing panel of a command, on rank 0: rows of a name and a text. `log_next` prints commands below it.

    A text with a word that is wider than the panel, such as a path, is printed below the panel, with the word unbroken.
    """
    console = _console()
    shown = [(name, printable(text)) for name, text in rows]
    room = console.width - max((cell_len(name) for name, _ in shown), default=0) - 6  # 6: borders and spaces
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in shown:
        if _longest_word(text) <= room:
            grid.add_row(name, Text(text))
    if cell_len(printable(title)) > console.width - 6:  # a panel would cut it
        _print_line(console, title)
        title = ""
    console.print(Panel(grid, title=_text(title) if title else None, title_align="left", expand=False))
    for name, text in shown:
        if _longest_word(text) > room:
            _print_line(console, f"{name}: {text}")


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    left: Sequence[int] = (0,),
    alarming: Container[int] = (),
) -> None:
    """Print a table, on rank 0. Brackets in the text are not markup.

    Args:
        title, columns, rows: the texts.
        caption: text below the table, which may have several lines.
        left: the numbers of the columns that are aligned to the left, not to the right.
        alarming: the numbers of the rows to print in bold red.
    """
    out = Table(title=_text(title, "table.title"), title_justify="left", caption_justify="left", box=box.ROUNDED)
    out.caption = Text("\n".join(map(printable, caption.split("\n"))), style="table.caption") if caption else None
    console = _console()
    cells = [[printable(cell).strip() for cell in row] for row in (columns, *rows)]
    room = console.width - 3 * len(columns) - 1  # without borders
    widths = _column_widths(cells, room)
    if sum(widths) > room:
        _print_blocks(console, title, cells, caption)
        return
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        out.add_column(_text(column), justify="left" if i in left else "right", width=width)
    for i, row in enumerate(cells[1:]):
        out.add_row(*map(Text, row), style="bold red" if i in alarming else "")
    console.print(out)


def _column_widths(cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return the widths of the columns of a table, `cells` in rows, so that no word is broken.

    The widest column that can shrink is made narrower, one character at a time, until the widths sum to `room` or each
    column is as narrow as its longest word.
    """
    columns = list(zip(*cells, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    lowest = [max(map(_longest_word, column)) for column in columns]
    while sum(widths) > room and widths != lowest:
        widths[max((i for i, low in enumerate(lowest) if widths[i] > low), key=widths.__getitem__)] -= 1
    return widths


def _print_blocks(console: Terminal, title: str, cells: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table that is wider than the terminal: a block per row, with a line per column."""
    _print_line(console, title)
    width = max(map(cell_len, cells[0]))
    for row in cells[1:]:
        for name, value in zip(cells[0], row, strict=True):
            start = f"{name:>{width}}  "
            line = _wrapped(value, console.width, start, " " * len(start)) or start
            console.print(line, markup=False, soft_wrap=True)
        console.print()
    for line in caption.split("\n") if caption else ():
        _print_line(console, line)


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds: 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def percent(value: float | None, half_width: float | None = None, interval: Sequence[float] | None = None) -> str:
    """Format a percentage: 86.3 ± 0.4 if `half_width` is given, else 86.3 (85.9–86.7); None: a dash."""
    if value is None:
        return "–"
    if half_width is not None:
        return f"{value:.1f} ± {half_width:.1f}"
    return f"{value:.1f}" + (f" ({interval[0]:.1f}–{interval[1]:.1f})" if interval else "")
