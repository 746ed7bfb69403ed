"""Create and lock the directory that a command writes to."""

from pathlib import Path
from typing import IO

from moco.config import ConfigError
from moco.files import FileLocked, cause, lock

LOCK = ".lock"


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
        raise ConfigError(f"{field}={path} cannot be created or written to: {cause(error)}") from error
