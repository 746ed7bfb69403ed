"""results.json, and the results of evaluations in TensorBoard and the other loggers of a run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.config.data import FOLDERS
from moco.distributed import on_rank_zero
from moco.files import WriteError, lock, write_json
from moco.runs.metrics import add_results
from moco.runtime.next_command import value_text
from moco.runtime.provenance import provenance
from moco.untrusted import read_json

BASELINES = ("untrained", "pixels")
# The fields of an entry's data that tell images and labels apart; the last three are of moco.segment and moco.detect.
_IMAGES = (
    *("name", "root", "more_roots", "eval_root", "label_file", "label_column", "subset", "split", "eval_split"),
    *("hold_out", "layout", "file", "eval_file"),
)


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


def label(entry: Mapping[str, Any]) -> str:
    """Return the command and the protocol of an entry, with the fields that differ from the protocol's values."""
    name = f"{entry.get('command', '?')}, {entry.get('protocol', '?')}"
    changed = entry.get("changed")
    if not isinstance(changed, Mapping) or not changed:
        return name
    shown = (f"{field.lstrip('+')}={value_text(value)}" for field, value in changed.items())
    return f"{name} ({', '.join(shown)})"


def newest(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the newest entry of each evaluation: of one encoder, with the same settings and images."""
    return list({(*evaluation_key(entry), *_encoder_key(entry)): entry for entry in entries}.values())


def evaluation_key(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what entries of several encoders must share to be compared: command, settings and data."""
    data = entry.get("data") or {}
    return label(entry), str([data.get(name) for name in _IMAGES])


def encoder_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each entry's encoder; entries of one name and different weights get the step, too."""
    names = []
    for entry in entries:
        weights = entry.get("weights", "encoder")
        plain = entry.get("encoder") in BASELINES or weights == "encoder"
        names.append(str(entry.get("encoder", "?")) + ("" if plain else f", {weights}"))
    steps: dict[str, set[str]] = {}
    for name, entry in zip(names, entries, strict=True):
        steps.setdefault(name, set()).add(str(entry.get("step", "?")))
    several = {name for name, found in steps.items() if len(found) > 1 and name not in BASELINES}
    return [
        f"{name}, step {entry.get('step', '?')}" if name in several else name
        for name, entry in zip(names, entries, strict=True)
    ]


def _encoder_key(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what identifies an entry's encoder: its image preparation and, except for a baseline, its weights."""
    names = ("encoder", "look") if entry.get("encoder") in BASELINES else ("encoder", "look", "weights", "sha256")
    return tuple(str(entry.get(name)) for name in names)


def data_name(data: Mapping[str, Any]) -> str:
    """Return the name of an entry's data set. The root is left out where it is only the folder of the download."""
    has_root = data.get("name") in (None, *FOLDERS, "huggingface")  # None: of moco.segment and moco.detect
    names = ("name", "root", "file", "subset") if has_root else ("name",)
    more = data.get("more_roots") or []
    return " ".join([*(str(data[name]) for name in names if data.get(name)), *map(str, more)])


def evaluated_on(data: Mapping[str, Any]) -> str:
    """Return the name of an entry's data set, where its held-out images come from, and which of them were seen."""
    share = data.get("hold_out")
    parts = [data.get(name) for name in ("eval_root", "eval_file")] if data.get("name") in (None, *FOLDERS) else []
    held_out = " ".join(str(each) for each in parts if each)
    part = f", held out: {held_out}" if held_out else f", held out: {share} of them" if share else ""
    notes = ["held-out images were in the training set, without labels"] * bool(data.get("held_out_seen"))
    if copies := data.get("held_out_in_training"):
        notes.append(f"{copies} held-out images are copies of training images")
    return data_name(data) + part + (f" ({'; '.join(notes)})" if notes else "")


def chosen_neighbors(entry: Mapping[str, Any]) -> str:
    """Return k and temperature of an entry of moco.knn, which may have been chosen; "" for other commands."""
    settings = entry.get("settings") or {}
    if entry.get("command") != "knn" or not {"k", "temperature"} <= settings.keys():
        return ""
    return f"k={settings['k']}, temperature={settings['temperature']:g}"


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
