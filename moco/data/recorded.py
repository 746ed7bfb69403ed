"""The data set that a file names: an encoder's file, a run or an index, which may come from someone else.

Nothing is downloaded, no folder is created and no hub is contacted because a file says so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.config import require
from moco.data.sources import SOURCES


def recorded_data(
    recorded: Mapping[str, Any], given: Mapping[str, Any], source: str, trusted: bool, fix: str = ""
) -> dict[str, Any]:
    """Return the fields of `DataConfig` in a file that apply without the person's repeating them.

    Args:
        recorded: the fields in the file.
        given: the fields that the person has set.
        source: the file or directory, for the error.
        fix: what to do instead, for the error; empty: to give data.root.
        trusted: whether local folders that the file names are read: those of a run directory are.

    Raises:
        ConfigError: if the images would have to be fetched, or lie in a folder that only the file names.
    """
    name, root = str(recorded.get("name", "")), str(recorded.get("root") or "")
    kept = {field: value for field, value in recorded.items() if field != "download"}
    unused = name in SOURCES and not SOURCES[name].root  # digits need no folder
    if not root or unused or "root" in given or given.get("name", name) != name:
        return kept
    remote = name == "webdataset" or (name == "huggingface" and not Path(root).expanduser().is_dir())
    why = "they would be fetched from there" if remote else "a file alone does not decide which folder is read"
    require(
        trusted and not remote,
        f"{source} names the images of data.name={name} data.root={root}, and {why}: "
        f"{fix or f'to use them, add data.root={root}; for others, set data=folder data.root=IMAGES'}",
    )
    return kept


def in_run_directory(file: Path) -> bool:
    """Return whether a file lies in the directory of a run, which holds a config.yaml."""
    return any((folder / "config.yaml").is_file() for folder in list(file.absolute().parents)[:4])
