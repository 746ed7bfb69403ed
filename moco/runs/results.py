"""results.json, and the results of evaluations in TensorBoard and the other loggers of a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.distributed import on_rank_zero
from moco.files import WriteError, lock, write_json
from moco.runs.metrics import add_results
from moco.runtime.provenance import provenance
from moco.untrusted import read_json


def record(folder: Path, entries: Sequence[Mapping[str, Any]], step: int) -> Path:
    """Append entries to `folder/results.json`, pass their metrics to the loggers of the run; return the file's path.

    For rank 0 only. An entry describes one encoder: "command", "encoder", "protocol", "figures" (metrics by name) and
    whatever the command adds. `provenance` is added here. `step` is the encoder's training step, for the loggers.

    Raises:
        ConfigError: if the folder cannot be written to or its results.json is damaged.
        WriteError: if the disk is full.
    """
    file = folder / "results.json"
    about = provenance()
    with _open(folder) as known:
        write_json(file, known + [dict(entry) | about for entry in entries])
    values = {
        f"evaluation/{entry['command']}_{entry['protocol']}/{entry['encoder']}_{name}": value
        for entry in entries
        for name, value in entry["figures"].items()
        if isinstance(value, int | float)
    }
    add_results(folder, values, step)
    return file


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of `folder/results.json`; none if there is no such file.

    Raises:
        ConfigError: if the file is damaged.
    """
    file = folder / "results.json"
    if not file.is_file():
        return []
    try:
        entries = read_json(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise _damaged(file, "not a list of entries")
    return entries


def _damaged(file: Path, reason: object) -> ConfigError:
    return ConfigError(f"{file} is damaged ({reason}): move it to another place")


def prepare(folder: Path) -> None:
    """Create the folder and check, before the work, that `record` can write there. Collective. Errors: see `record`."""

    def attempt() -> None:
        with _open(folder):
            pass

    on_rank_zero(attempt)


@contextmanager
def _open(folder: Path) -> Iterator[list[Any]]:
    """Yield the entries of `folder/results.json` under a lock: two evaluations of a run may end at the same moment."""
    file = folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".results.lock", wait=True):
            known = read_json(file) if file.exists() else []
            if not isinstance(known, list):
                raise ValueError("not a list")
            yield known
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written to ({error.strerror}): set output=DIR") from error
    except WriteError:
        raise
    except ValueError as error:
        raise _damaged(file, error) from error
