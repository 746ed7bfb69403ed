"""What a person sees while a run goes: a live bar on a terminal, plain lines without one. Rank 0 only."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moco.distributed import is_rank_zero
from moco.runtime.stdio import mute


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def status_line(values: Mapping[str, float]) -> str:
    """The figures of a step in one line, each next to what it is to be read against."""
    chance = values.get("train/chance")
    parts = [
        f"loss {values['train/loss']:.3f}" + (f" (chance {chance:.3f})" if chance else ""),
        f"contrast acc {100 * values['train/contrast_accuracy']:.0f} %",
        f"lr {values['train/lr']:.2g}",
        f"{values['speed/images_per_second']:,.0f} img/s",
        f"data wait {100 * values['speed/data_wait']:.0f} %",
    ]
    if "speed/mfu" in values:
        parts.append(f"MFU {100 * values['speed/mfu']:.0f} %")
    if "speed/peak_memory_gib" in values:
        parts.append(f"{values['speed/peak_memory_gib']:.1f} GiB")
    if "train/queue_fill" in values:
        parts.append(f"queue {100 * values['train/queue_fill']:.0f} %")
    return " · ".join(parts)


class Terminal(Console):
    """A console whose reader may leave (`| head`, a terminal that is closed): the work goes on, unheard.

    rich's own ends the process there, and leaves the way to another end to a subclass.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute(self.file)

    def __exit__(self, *about: Any) -> None:
        try:
            super().__exit__(*about)  # which is where rich writes
        except OSError:  # a terminal that is gone, a log on a full disk
            self.on_broken_pipe()


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that counts: gives a function to call with (done, total). Gone when it is over."""
    console = Terminal()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


class Display:
    """The run's terminal.

    Args:
        total_steps, steps_per_epoch: the length of training.
        start: the step it goes on from.
        quiet: write nothing (ranks other than 0).
    """

    def __init__(self, total_steps: int, steps_per_epoch: int, start: int, quiet: bool) -> None:
        self.console = Terminal(quiet=quiet, highlight=False)
        self._total, self._steps_per_epoch, self._start = total_steps, steps_per_epoch, start
        self._began = self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("epoch 1", total=total_steps, completed=start)
        self._figures = Text("")
        self._live: Live | None = None
        self._wanted = self.console.is_terminal and not quiet

    def log(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False, soft_wrap=True)

    def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Moves the bar behind `step` steps done; `values` are that step's figures where they were read."""
        if self._wanted and self._live is None:  # from the first step on, so that no opening line runs through the bar
            self._live = Live(Group(self._progress, self._figures), console=self.console, refresh_per_second=8)
            self._live.start()
        epochs = self._total // self._steps_per_epoch
        epoch = min((step - 1) // self._steps_per_epoch + 1, epochs)
        self._progress.update(self._task, completed=step, description=f"epoch {epoch}/{epochs}")
        if values is None:
            return
        line = status_line(values)
        self._figures.plain = line
        # Without a terminal: a line now and then, not one a step.
        if self._live is None and (time.monotonic() - self._last_line > 10 or step == self._total):
            self._last_line = time.monotonic()
            rate = (self._last_line - self._began) / max(1, step - self._start)
            left = duration(rate * (self._total - step))
            self.log(f"epoch {epoch}/{epochs} step {step}/{self._total} · {line} · left {left}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._wanted = None, False

    def summary(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """The closing panel."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, Text(text))
        self.console.print(Panel(table, title=title, title_align="left", expand=False))


def log(line: str) -> None:
    """A line of a command, on rank 0."""
    if is_rank_zero():
        Terminal(highlight=False).print(line, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> None:
    """A table, on rank 0. Brackets are letters here, no markup."""
    if not is_rank_zero():
        return
    out = Table(
        title=Text(title, style="table.title"),
        title_justify="left",
        caption=Text(caption, style="table.caption") if caption else None,
        caption_justify="left",
        box=box.ROUNDED,
    )
    for i, column in enumerate(columns):
        out.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*map(Text, row))
    Terminal(highlight=False).print(out)


def percent(value: float | None, half_width: float | None = None) -> str:
    """86.3, or 86.3 ± 0.4; a dash for what does not exist."""
    if value is None:
        return "–"
    return f"{value:.1f}" + (f" ± {half_width:.1f}" if half_width is not None else "")
