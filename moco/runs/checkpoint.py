"""Checkpoints of plain types, written atomically and read with `weights_only=True`.

A checkpoint is a file `step_00001234.pt` that holds a dict: the values of `_SCHEMA`, "computed_on" (the devices),
"probe" (the state of the online probe, if there is one), and "sha256" of all of these. `best.pt` is a second name of
one of these files. When the first name of this file is deleted, the file remains as `best.pt`.
"""

import copy
import math
import re
import shlex
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.config import ConfigError, RunWarning
from moco.config.types import type_error
from moco.digest import digest
from moco.files import atomic_write, cause, flush, temporary_name
from moco.runs.weights_file import CheckpointError as CheckpointError  # exported
from moco.runs.weights_file import read_weights
from moco.runtime.precision import PRECISIONS

Checkpoint = dict[str, Any]

BEST = "best.pt"  # not listed by `list_checkpoints`: a run resumes from its newest checkpoint, never from its best

_NAME = re.compile(r"step_(\d+)(\.keep)?\.pt")


# Types of a checkpoint's values, which `_refuse_malformed` checks. Checkpoints of earlier versions lack some values.
_SCHEMA: dict[str, Any] = {
    "config": Mapping,
    "step": int,
    "method": Mapping,  # its state dict; "optimizer" and "scaler" are state dicts, too
    "optimizer": {"state": Mapping, "param_groups": list},
    "scaler": Mapping,
    "history": list,  # evaluations so far
    "measured": str,  # what the evaluations measure
    "seconds": float,  # of training
    "versions": Mapping,
    "world_size": int,
    "statistics": Tensor,  # with several ranks: BN's running statistics of each rank; "method" has their average
    "skipped": int,  # steps with a non-finite loss or gradient
    "precision": str,
    "data": {"length": int, "sha256": str},
    "bits": int,  # the number of significant bits of the images; found by reading them if data.bits is null
}


def save(folder: Path, step: int, state: Checkpoint, keep_last: int, keep: bool = False, best: bool = False) -> Path:
    """Write `folder/step_XXXXXXXX.pt` atomically and return its path.

    Args:
        keep_last: number of newest checkpoints to keep, not counting those kept permanently; older ones are deleted.
        keep: keep this one permanently (its name ends in `.keep.pt`).
        best: also name it `best.pt`, until there is a better one.

    Raises:
        WriteError, OSError: if it cannot be written; the earlier checkpoints are unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}{'.keep' if keep else ''}.pt"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({**state, "sha256": digest(state)}, file)
    if best:
        _link_best(path)
    flush(folder)  # so that the new name survives a power failure
    for old in [each for each in list_checkpoints(folder) if ".keep" not in each.name][keep_last:]:
        old.unlink(missing_ok=True)
    return path


def _link_best(path: Path) -> None:
    temporary = temporary_name(path.with_name(BEST))
    try:
        try:
            temporary.hardlink_to(path)  # takes no space, and remains when the step's own name is deleted
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        temporary.replace(path.with_name(BEST))
    finally:
        temporary.unlink(missing_ok=True)


def is_best(history: list[dict[str, Any]], step: int) -> bool:
    """Return whether the kNN accuracy after `step` steps is higher than all earlier ones, except that of step 0."""
    scores = {each["step"]: each["knn"][0] for each in history if each["step"] > 0}
    return step in scores and all(scores[step] > score for at, score in scores.items() if at < step)


def copy_to_host(state: Any) -> Any:
    """Copy a nested state; the tensors of the copy are in host memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # keeps an OrderedDict, and the attributes that torch has set on it
        copied.update((name, copy_to_host(value)) for name, value in state.items())
        return copied
    if isinstance(state, list | tuple):
        return type(state)(copy_to_host(value) for value in state)
    return state


class Saver:
    """Writes checkpoints in another thread, one at a time.

    `save` returns when the previous checkpoint is written and the new state is copied to host memory. An error while
    writing is raised by the next `save` or `join`. At the end of a `with` block, the saver waits for the checkpoint
    that is being written, except after KeyboardInterrupt: then the unfinished file keeps its temporary name. See the
    function `save` for `keep_last`.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: Checkpoint, keep: bool = False, best: bool = False) -> None:
        """Wait for the previous checkpoint as `join` does, copy the state, and start to write it."""
        self.join()
        # A daemon, so that the interpreter does not wait for it after a KeyboardInterrupt.
        self._writer = threading.Thread(target=self._write, args=(step, copy_to_host(state), keep, best), daemon=True)
        self._writer.start()

    def failed(self) -> bool:
        """Return whether writing has failed since the last `save` or `join`, without waiting."""
        return self._error is not None

    def join(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            CheckpointError: if it could not be written. The previous checkpoints are unchanged.
        """
        if self._writer is not None:
            self._writer.join()
        error, self._writer, self._error = self._error, None, None
        if error is not None:
            problem = f"no checkpoint could be written to {self._folder} ({cause(error)})"
            earlier = list_checkpoints(self._folder)
            resume = (
                f"to resume from {earlier[0].name}, which is untouched" if earlier else "to start from the beginning"
            )
            raise CheckpointError(f"{problem}: free some space, then run the same command again {resume}") from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.join()
        elif self._writer is not None and not issubclass(kind, KeyboardInterrupt):
            self._writer.join()  # without raising its error: the run already ends with another one

    def _write(self, step: int, state: Checkpoint, keep: bool, best: bool) -> None:
        try:
            save(self._folder, step, state, self._keep_last, keep, best)
        except Exception as error:  # raised by the next `save` or `join`
            self._error = error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a directory, newest step first."""
    return sorted((path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's file name."""
    return int(_NAME.sub(r"\1", path.name))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU and check its digest.

    Raises:
        CheckpointError: if it is missing, truncated, altered, or holds anything but plain types.
    """
    return verify(path, read_weights(path))


def verify(path: Path, state: Any) -> Checkpoint:
    """Check the digest of a loaded checkpoint and return the content without it.

    Raises:
        CheckpointError: if the digest is missing or does not match, or if a value has another type or range than in a
            checkpoint of moco.train.
    """
    if not isinstance(state, dict) or "sha256" not in state:
        raise CheckpointError(f"{path} cannot be read as a checkpoint (it has no SHA-256)")
    content = {name: value for name, value in state.items() if name != "sha256"}
    if state["sha256"] != digest(content):
        raise CheckpointError(f"{path} was altered after it was written: its SHA-256 does not match")
    _refuse_malformed(path, content)
    return content


def _refuse_malformed(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse values that training would not have saved; a correct digest shows only that a file is not damaged."""
    error = type_error("", state, _SCHEMA, exact=True)
    if not error:
        numbers = {name: state.get(name, 0) for name in ("step", "seconds", "skipped")}
        numbers |= {"data.length": state.get("data", {}).get("length", 0)}
        checks = {name: math.isfinite(number) and 0 <= number < 2**53 for name, number in numbers.items()}
        checks["precision"] = state.get("precision", "fp32") in PRECISIONS
        checks["history"] = all(map(_is_evaluation, state.get("history", [])))
        checks["method"] = all(isinstance(each, Tensor) for each in state.get("method", {}).values())
        error = next((f"its value {name!r} is invalid" for name, valid in checks.items() if not valid), "")
    if error:
        raise CheckpointError(f"{path} is not a checkpoint of moco.train: {error}")


def _is_evaluation(entry: Any) -> bool:
    """Return whether an entry of the history has a step, and all other values are numbers, None, or lists of them."""
    if type_error("", entry, {"step": int, "epoch": float}, exact=True) or "step" not in entry:
        return False
    results = (each for name, value in entry.items() if name != "step" for each in _as_list(value))
    return all(each is None or isinstance(each, int | float) for each in results)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) and value else [value]


@contextmanager
def refuse_misfit(folder: Path) -> Iterator[None]:
    """Raise CheckpointError if a checkpoint of `folder`, restored in the block, does not fit the run."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"{lines[0]} {lines[1].strip()}" if lines[0].startswith("Error(s)") and len(lines) > 1 else lines[0]
        raise CheckpointError(
            f"the newest readable checkpoint in {folder} does not fit this run ({reason[:200]}): move it away, and the "
            "run resumes from an earlier one, or starts again from step 0 if there is none"
        ) from error


def load_newest(folder: Path) -> Checkpoint | None:
    """Return the content of the newest readable checkpoint; see `find_newest`."""
    return (find_newest(folder) or (None, None))[1]


def find_newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest readable checkpoint and its content, or None for a folder without checkpoints.

    Warns of each newer one that cannot be read.

    Raises:
        CheckpointError: if there are checkpoints but none can be read.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return path, load(path)
        except CheckpointError as error:
            if path == paths[-1]:
                others = f", and none of the {len(paths)} checkpoints in {folder} can be read" * (len(paths) > 1)
                raise CheckpointError(f"{error}{others}; {_advice(folder, len(paths))}") from error
            warnings.warn(f"{error}; using the previous checkpoint", RunWarning, stacklevel=3)
    return None


def _advice(folder: Path, damaged: int) -> str:
    """Describe how to continue a run if all its checkpoints are damaged."""
    best = folder / BEST
    try:
        step = load(best)["step"]
    except CheckpointError:
        return f"move {'it' if damaged == 1 else 'them'} away to start again from step 0"
    copy = shlex.join(["cp", str(best), str(best.with_name(f"step_{step:08d}.pt"))])
    return f"{best} can be read: run {copy}, then the same command again to resume from step {step}"
