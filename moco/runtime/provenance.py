"""The code, versions and machine that produced a result."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moco
from moco.distributed import world_size


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
