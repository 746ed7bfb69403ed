"""The code, versions and machine that produced a result."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moco
from moco import plugins
from moco.distributed import world_size


def provenance() -> dict[str, Any]:
    """Return the time, the versions and the machine, for a file of results."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "moco": moco.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        **plugins.recorded(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "processes": world_size(),
    }


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files were changed; None outside of a checkout."""
    root = Path(moco.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may be inside another project's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
