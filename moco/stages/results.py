"""What an evaluation leaves: an entry in results.json, points in TensorBoard, a table on the terminal."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

import moco
from moco.config import ConfigError
from moco.distributed import is_main, on_main, world_size
from moco.engine.display import Terminal
from moco.files import NotWritten, write_json


def provenance() -> dict[str, Any]:
    """With what, on what and when a figure was made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "moco": moco.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "processes": world_size(),
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with "-dirty" if it was changed; None outside of one."""
    package = Path(moco.__file__).resolve().parent
    if not (package.parent / ".git").exists():  # an installed wheel may lie inside somebody else's repository
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def record(folder: Path, entries: Sequence[Mapping[str, Any]], step: int) -> Path:
    """Adds entries to `folder/results.json`, a list, and their figures to the folder's TensorBoard.

    An entry holds "command", "encoder", "protocol", "data", "settings", "figures" (numbers by name) and what else the
    command has to say; `provenance` is added here. Call it on rank 0 alone.

    Args:
        folder: the run.
        entries: one for each encoder that was judged.
        step: where TensorBoard puts the points: the encoder's training step.

    Returns:
        The file's path.

    Raises:
        ConfigError: if the folder cannot be written to or its results.json is damaged.
    """
    from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

    file = folder / "results.json"
    about = provenance()
    with _opened(folder) as known:
        write_json(file, known + [dict(entry) | about for entry in entries])
    with SummaryWriter(str(folder)) as events:
        for entry in entries:
            for name, value in entry["figures"].items():
                if isinstance(value, int | float):
                    tag = f"evaluation/{entry['command']}_{entry['protocol']}/{entry['encoder']}_{name}"
                    events.add_scalar(tag, value, step)
    return file


def prepare(folder: Path) -> None:
    """Makes the folder and sees that `record` will be able to write there, before the work. Every rank calls it.

    Raises:
        ConfigError: as `record` does.
    """

    def attempt() -> None:
        with _opened(folder):
            pass

    on_main(attempt)


@contextmanager
def _opened(folder: Path) -> Iterator[list[Any]]:
    """The entries that `folder/results.json` holds, locked: two evaluations of one run may end at the same moment."""
    file = folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".results.lock").open("a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            known = json.loads(file.read_text()) if file.exists() else []
            if not isinstance(known, list):
                raise ValueError("no list")
            yield known
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written to: {error.strerror}: set output=DIR") from error
    except NotWritten:
        raise
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): move it away") from error


def say(line: str) -> None:
    """A line of a command, on rank 0."""
    if is_main():
        Terminal(highlight=False).print(line, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> None:
    """A table, on rank 0. Brackets are letters here, no markup."""
    if not is_main():
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
