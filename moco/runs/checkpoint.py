"""Checkpoints of plain types, written atomically, read with `weights_only=True`.

A checkpoint is one file `step_00001234.pt` holding a dict with the keys "config" (plain dict), "step", "epoch",
"method", "optimizer", "scaler" (state dicts), "history" (evaluations so far), "data" (what the pictures were),
"versions" and "world_size" (what wrote it) and "sha256" of it all. `best.pt` is a second name for one of them.
"""

import copy
import os
import re
import shlex
import shutil
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.config import RunWarning
from moco.digest import digest
from moco.files import atomic_write, cause

Checkpoint = dict[str, Any]

BEST = "best.pt"  # no name that `found` knows: a run resumes from its newest checkpoint, never from its best

_NAME = re.compile(r"step_(\d+)(\.keep)?\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or not be written; its message is one sentence."""


def save(folder: Path, step: int, state: Checkpoint, keep_last: int, keep: bool = False, best: bool = False) -> Path:
    """Writes `folder/step_XXXXXXXX.pt`: to a temporary name first, flushed, then renamed, so never half.

    Args:
        keep_last: how many of the newest checkpoints to leave; older ones go, but those kept for good.
        keep: keep this one for good (its name ends in `.keep.pt`).
        best: it becomes `best.pt` as well, and stays under that name until there is a better one.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}{'.keep' if keep else ''}.pt"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({**state, "sha256": digest(state)}, file)
    if best:
        _name_best(path)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself survives a power cut
    finally:
        os.close(directory)
    for old in [each for each in found(folder) if ".keep" not in each.name][keep_last:]:
        old.unlink(missing_ok=True)
    return path


def _name_best(path: Path) -> None:
    temporary = path.with_name("best.tmp")
    try:
        try:
            temporary.hardlink_to(path)  # costs no space, and outlives the step's own name
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        temporary.replace(path.with_name(BEST))
    finally:
        temporary.unlink(missing_ok=True)


def is_best(history: list[dict[str, Any]], step: int) -> bool:
    """Whether training was evaluated behind `step` steps, and never as well before. Untrained does not count."""
    scores = {each["step"]: each["knn"][0] for each in history if each["step"] > 0}
    return step in scores and all(scores[step] > score for at, score in scores.items() if at < step)


def on_host(state: Any) -> Any:
    """A copy of a nested state whose tensors lie in host memory and share nothing with the state."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # an OrderedDict stays one, and keeps what torch has noted on it
        copied.update((name, on_host(value)) for name, value in state.items())
        return copied
    if isinstance(state, list | tuple):
        return type(state)(on_host(value) for value in state)
    return state


class Saver:
    """Writes checkpoints while training goes on, which waits only for a copy to host memory.

    At most one is being written at a time. Its failure is raised by the next `save` or `join`. As a context it waits at
    the end for what is being written, but for a KeyboardInterrupt, which leaves at once: what is half written then has
    no checkpoint's name.

    Args:
        folder: where they go.
        keep_last: see `save`.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: Checkpoint, keep: bool = False, best: bool = False) -> None:
        """Waits for the checkpoint before this one, copies the state, and leaves the rest to another thread.

        Raises:
            CheckpointError: if the checkpoint before this one could not be written.
        """
        self.join()
        # A daemon: the interpreter does not wait for it where the user has asked to leave at once.
        self._writer = threading.Thread(target=self._write, args=(step, on_host(state), keep, best), daemon=True)
        self._writer.start()

    def failed(self) -> bool:
        """Whether the checkpoint that was being written could not be; waits for nothing."""
        return self._error is not None

    def join(self) -> None:
        """Waits until what was saved last is on disk.

        Raises:
            CheckpointError: if it could not be written. The checkpoints before it are as they were.
        """
        if self._writer is not None:
            self._writer.join()
        error, self._writer, self._error = self._error, None, None
        if error is not None:
            raise CheckpointError(
                f"no checkpoint could be written to {self._folder} ({cause(error)}): make room there; "
                "the one before is untouched, and the same command goes on from it"
            ) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.join()
        elif self._writer is not None and not issubclass(kind, KeyboardInterrupt):
            self._writer.join()  # and what ends the run is told, not what the writer may have to say

    def _write(self, step: int, state: Checkpoint, keep: bool, best: bool) -> None:
        try:
            save(self._folder, step, state, self._keep_last, keep, best)
        except Exception as error:  # told to the loop, which this thread cannot raise in
            self._error = error


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
        refuse_bomb(path)
        state: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for one damaged file
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    return verified(path, state)


def refuse_bomb(path: Path) -> None:
    """Refuses a file of weights that would unpack to more than it is: torch compresses nothing.

    Raises:
        CheckpointError: if it would.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            unpacked = sum(each.file_size for each in parts.infolist())
        if unpacked > path.stat().st_size:
            raise CheckpointError(
                f"{path} would unpack to {unpacked:,} bytes, more than it has: it is no file of torch's"
            )


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    for each in state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ():
        yield from _tensors(each)


def verified(path: Path, state: Any) -> Checkpoint:
    """The content of a checkpoint of ours without its digest, which is checked.

    Raises:
        CheckpointError: if there is no digest, it does not match, or a tensor is larger than its bytes.
    """
    if not isinstance(state, dict) or "sha256" not in state:
        raise CheckpointError(f"{path} cannot be read as a checkpoint (it has no SHA-256)")
    # A tensor may claim any shape over few bytes (stride 0); to look at one of those takes the memory that it claims.
    if any(each.numel() * each.element_size() > each.untyped_storage().nbytes() for each in _tensors(state)):
        raise CheckpointError(f"{path} cannot be read as a checkpoint (a tensor claims more than the file holds)")
    content = {name: value for name, value in state.items() if name != "sha256"}
    if state["sha256"] != digest(content):
        raise CheckpointError(f"{path} was altered after it was written: its SHA-256 does not match")
    return content


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint; warns of each unreadable one that it passes over. None if there is none.

    Raises:
        CheckpointError: if there are checkpoints, but none that can be read; says whether the best one can.
    """
    paths = found(folder)
    for path in paths:
        try:
            return load(path)
        except CheckpointError as error:
            if path == paths[-1]:
                all_of_them = f", and none of the {len(paths)} checkpoints in {folder} can be read" * (len(paths) > 1)
                raise CheckpointError(f"{error}{all_of_them}; {_way_out(folder, len(paths))}") from error
            warnings.warn(f"{error}; falling back to the checkpoint before it", RunWarning, stacklevel=2)
    return None


def _way_out(folder: Path, damaged: int) -> str:
    """How a run goes on that has so many checkpoints, none of which can be read."""
    best = folder / BEST
    try:
        step = load(best)["step"]
    except CheckpointError:
        return f"move {'it' if damaged == 1 else 'them'} away to start anew"
    copy = shlex.join(["cp", str(best), str(best.with_name(f"step_{step:08d}.pt"))])
    return f"{best} can be read: after {copy} the same command goes on from step {step}"
