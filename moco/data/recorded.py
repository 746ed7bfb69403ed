"""The data set that a run, an encoder file or an index names; these files may come from someone else.

A file alone never causes a download, the creation of a folder, a command or a request to a hub.
"""

from collections.abc import Mapping
from typing import Any

from moco.config import ConfigError, require
from moco.config.data import is_remote
from moco.config.quoting import override
from moco.data.sources import SOURCES

# Fields that name further files of this machine, and fields that have no meaning without such files.
_LOCAL_PATHS = {"eval_root", "more_roots", "label_file", "label_separator"}
# Not taken from a file: `download` and `allow_pipe`, which only the user may set, and `weights`, which only pretraining
# uses.
_NEVER = {"download", "allow_pipe", "weights"}
# Fields to repeat on the command line if they may not be taken from a file, in the order of that command line.
_REPEATED = ("root", "more_roots", "eval_root", "label_file", "label_separator")


def fields_to_repeat(recorded: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """Return the recorded fields to repeat on the command line for the same images; see `recorded_data`."""
    name, root = (str(recorded.get(field) or "") for field in ("name", "root"))
    unused = name in SOURCES and not SOURCES[name].root  # digits need no folder
    if not root or unused or (trusted and not is_remote(name, root)):
        return {}
    return {field: recorded[field] for field in _REPEATED if recorded.get(field)}


def recorded_data(
    recorded: Mapping[str, Any], given: Mapping[str, Any], source: str, trusted: bool, fix: str = ""
) -> dict[str, Any]:
    """Return the recorded fields of `DataConfig` that may replace fields that the user has not set.

    Args:
        recorded: the fields in the file.
        given: the fields that the user has set.
        source: the file or directory, for the error.
        trusted: whether to read a local folder whose path is given only by the file; true, for example, for a file in
            a run directory.
        fix: what to do instead, for the error; empty: the error proposes to repeat the fields or to set data.root.

    Raises:
        ConfigError: if the images would have to be fetched, or lie in a folder whose path is given only by an untrusted
            file. Also if the data set is a stream, because all callers read images one by one.
    """
    other = "set data.name=folder data.root=IMAGES, or another data set whose images can be read one by one"
    stream = given.get("name", recorded.get("name")) == "webdataset"
    require(not stream, f"data.name=webdataset can be read from start to end only: {other}")
    name, root = (str(recorded.get(field) or "") for field in ("name", "root"))
    never = _NEVER | (set() if trusted else _LOCAL_PATHS)
    if name == "digits":  # they are in no folder, but moco.embed records an absolute path
        never = never | {"root"}
    kept = {field: value for field, value in recorded.items() if field not in never}
    missing = fields_to_repeat(recorded, trusted)
    if not missing or "root" in given or given.get("name", name) != name:
        return kept
    remote = is_remote(name, root)
    why = "they would be fetched from there" if remote else "a file alone does not decide which folder is read"
    same = " ".join(override(f"data.{field}", value) for field, value in missing.items())
    raise ConfigError(
        f"{source} names the images of data.name={name} data.root={root}, and {why}: "
        f"{fix or f'to use them, add {same}; for others, set data=folder data.root=IMAGES'}"
    )
