"""Checkpoints of plain types, written atomically, read with `weights_only=True`.

A checkpoint is one file `step_00001234.pt` holding a dict with the keys "config" (plain dict), "step", "epoch",
"method", "optimizer", "scaler" (state dicts), "history" (evaluations so far) and "sha256" of the tensors.
"""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.config import RunWarning

Checkpoint = dict[str, Any]

_NAME = re.compile(r"step_(\d+)(\.keep)?\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; its message is one sentence."""


def digest(state: Any) -> str:
    """SHA-256 over every tensor (bytes, type, shape) and plain value of a nested state, in its order.

    A flipped bit in a `.pt` file loads without any error, silently wrong; the digest notices.
    """
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            sha.update(f"{data.dtype}{tuple(data.shape)}".encode())
            sha.update(data.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def save(folder: Path, step: int, state: Checkpoint, keep_last: int, keep: bool = False) -> Path:
    """Writes `folder/step_XXXXXXXX.pt`: to a temporary name first, flushed, then renamed, so never half.

    Args:
        keep_last: how many of the newest checkpoints to leave; older ones go, but those kept for good.
        keep: keep this one for good (its name ends in `.keep.pt`).

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}{'.keep' if keep else ''}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({**state, "sha256": digest(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself survives a power cut
    finally:
        os.close(directory)
    for old in [each for each in found(folder) if ".keep" not in each.name][keep_last:]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """The folder's checkpoints, the newest step first."""
    steps = {path: _NAME.fullmatch(path.name) for path in folder.glob("step_*.pt")}
    return sorted((path for path in steps if steps[path]), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint to the CPU and checks its digest.

    Raises:
        CheckpointError: if it is missing, truncated, altered, or holds anything but plain types.
    """
    try:
        state: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one damaged file
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    return verified(path, state)


def verified(path: Path, state: Any) -> Checkpoint:
    """The content of a checkpoint of ours without its digest, which is checked.

    Raises:
        CheckpointError: if there is no digest, or it does not match.
    """
    if not isinstance(state, dict) or "sha256" not in state:
        raise CheckpointError(f"{path} cannot be read as a checkpoint (it has no SHA-256)")
    content = {name: value for name, value in state.items() if name != "sha256"}
    if state["sha256"] != digest(content):
        raise CheckpointError(f"{path} was altered after it was written: its SHA-256 does not match")
    return content


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint; warns of each unreadable one that it passes over. None if there is none.

    Raises:
        CheckpointError: if there are checkpoints, but none that can be read.
    """
    paths = found(folder)
    for path in paths:
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", RunWarning, stacklevel=2)
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; move them away to start anew"
        )
    return None
