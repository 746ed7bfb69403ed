"""What an evaluation leaves: an entry in results.json, points in TensorBoard, a table on the terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.distributed import on_rank_zero
from moco.files import WriteError, lock, write_json
from moco.runtime.provenance import provenance


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

    on_rank_zero(attempt)


@contextmanager
def _opened(folder: Path) -> Iterator[list[Any]]:
    """The entries that `folder/results.json` holds, locked: two evaluations of one run may end at the same moment."""
    file = folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".results.lock", wait=True):
            known = json.loads(file.read_text()) if file.exists() else []
            if not isinstance(known, list):
                raise ValueError("no list")
            yield known
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written to: {error.strerror}: set output=DIR") from error
    except WriteError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): move it away") from error
