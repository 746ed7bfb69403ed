"""The machine and the versions that a benchmark ran on."""

import os
import platform
import subprocess
from pathlib import Path

import PIL
import torch
import torchvision


def machine() -> list[str]:
    """Return processor, threads, versions and commit as lines of text."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return [
        f"{_processor()}, {os.cpu_count()} cores{device}; {torch.get_num_threads()} thread(s) in the process",
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Pillow {PIL.__version__}; commit {_commit()}",
    ]


def status_field(name: str, process: int | str = "self") -> int:
    """Read a field of a process's status, in KiB (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
