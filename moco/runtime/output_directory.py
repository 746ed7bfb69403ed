"""Check, before the work, that a command can write its output; create and lock its directory."""

from pathlib import Path
from typing import IO

from moco.config import ConfigError, require
from moco.config.quoting import override
from moco.files import FileLocked, WriteError, cause, check_writable, lock

LOCK = ".lock"
FEATURES, ABOUT = "features.npy", "features.json"  # of a complete output of moco.embed


def check_output_file(path: Path, example: str) -> None:
    """Create the folder of the file `output` and check that the file can be written.

    Raises:
        ConfigError: if the file cannot be written, or if `output` is a folder. For a folder, the message proposes a
            file in it with the name `example`.
    """
    require(not path.is_dir(), f"output={path} is a folder: name a file, e.g. {override('output', path / example)}")
    try:
        check_writable(path)
    except WriteError as error:
        raise ConfigError(f"output={path} cannot be written ({cause(error)}): set output=FILE") from error


def prepare_output(folder: Path) -> None:
    """Create the directory `output` if needed and check that files can be written there.

    Raises:
        ConfigError: if files cannot be written there.
    """
    try:
        check_writable(folder, is_folder=True)
    except WriteError as error:
        raise ConfigError(f"output={folder} cannot be written to ({cause(error)}): set output=DIR") from error


def lock_directory(path: Path, field: str) -> IO[str]:
    """Create a directory if needed and lock it for this process; see `moco.files.lock`.

    Raises:
        ConfigError: if the directory cannot be created, or another process writes to it; the message names `field`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return lock(path / LOCK)
    except FileLocked as error:
        fix = "wait for it, stop it, or choose another directory"
        raise ConfigError(f"{field}={path} is in use by {error}: {fix}") from error
    except FileExistsError as error:
        what = "a link whose target does not exist" if path.is_symlink() else "a file, not a directory"
        raise ConfigError(f"{field}={path} is {what}: choose another directory") from error
    except OSError as error:
        fix = "choose another directory, or make it writable"
        raise ConfigError(f"{field}={path} cannot be created or written to ({cause(error)}): {fix}") from error
