"""The run directory: config.yaml, metrics.jsonl, checkpoints/, TensorBoard's events, views.png.

Rank 0 alone writes. A run started again in its directory resumes; the records that it made after
the checkpoint it resumes from are taken back, because it makes them again.
"""

import fcntl
import json
import math
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from moco.config import ConfigError
from moco.files import atomic_write, write_errors

LOCK = ".lock"

# What may differ when a run goes on: where things are and how fast they go, not what is computed.
FREE_FIELDS = (
    "run",
    "device",
    "threads",
    "log_every",
    "analyse_every",
    "stop_after",
    "hang_after",
    "accumulate",
    "compile",
    "channels_last",
    "profile",
    "optim.skip_nonfinite",
    "data.root",
    "data.eval_root",
    "data.download",
    "data.allow_pipe",
    "data.workers",
    "data.on_bad_image",  # no picture that was shown so far would have been another
    "data.max_bad",
    "checkpoint",
    "evaluate.batch_size",
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def refuse_difference(
    path: Path, there: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises ConfigError, naming each field, if the run in `path` was configured to compute something else.

    A field that is newer than the run, which so does not know it, had its value of `defaults` then.
    """
    before, now, usual = flatten(there), flatten(config), flatten(defaults or {})
    before |= {name: usual[name] for name in now.keys() & usual.keys() - before.keys()}
    # Micro-batches change nothing where BN works in groups; elsewhere they are part of the mathematics.
    free = [name for name in FREE_FIELDS if name != "accumulate" or before.get("model.bn") == "grouped"]
    differing = [
        f"{name} (there {before.get(name)!r}, now {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not any(name == each or name.startswith(f"{each}.") for each in free)
    ]
    if differing:
        raise ConfigError(
            f"run={path} holds a run with another configuration: {'; '.join(differing)}. "
            "Give this one its own directory (run=...) or take those values back"
        )


def open_run(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> IO[str]:
    """Makes the directory, locks it and writes config.yaml, or checks that what is there is the same run.

    Returns:
        The lock; it holds until the file is closed or the process ends, however it ends.

    Raises:
        ConfigError: if another process trains in the directory, if it holds something else, or if it holds a
            checkpoint of a run whose configuration differs.
    """
    file = path / "config.yaml"
    if (
        path.is_dir()
        and not file.exists()
        and not (path / "checkpoints").is_dir()
        and any(each.name != LOCK for each in path.iterdir())
    ):
        raise ConfigError(f"run={path} is not empty and holds no run (no config.yaml): choose another directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"run={path} cannot be made: {error.strerror}") from error
    try:
        # A record lock belongs to this process alone: loader workers that outlive a killed run do not hold it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        raise ConfigError(
            f"run={path} is in use by process {lock.read().strip() or 'unknown'}: wait for it, end it, "
            "or choose another directory"
        ) from error
    with write_errors(path / LOCK):
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
    with write_errors(path / "checkpoints"):
        for half_written in (path / "checkpoints").glob("*.tmp"):
            half_written.unlink()
    # A directory without a checkpoint holds nothing to go on with: a failed start does not block it.
    if file.is_file() and any((path / "checkpoints").glob("step_*.pt")):
        refuse_difference(path, _read(file), config, defaults)
    with atomic_write(file) as temporary:
        temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return lock


def _read(file: Path) -> dict[str, Any]:
    damaged = ConfigError(f"{file} is damaged: remove it, the checkpoints beside it hold the configuration too")
    try:
        there = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged from error
    if not isinstance(there, dict):
        raise damaged
    return there


class Journal:
    """metrics.jsonl and TensorBoard's events of a run, from a step on.

    Every method raises `WriteError` where the disk is full or fails.

    Args:
        path: the run's directory.
        step: the step that training goes on from; later records of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

        self._path = file = path / "metrics.jsonl"
        with write_errors(file):
            _keep(file, step)
            self._file = file.open("a", buffering=1)
            self._hook = threading.excepthook
            threading.excepthook = self._received
            self._events = SummaryWriter(str(path), purge_step=step + 1 if step else 0)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one point a curve; names are "train/loss", "accuracy/knn", ..."""
        # JSON knows no NaN and no infinity (fp16's overflowing gradient norm): null.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with write_errors(self._path):
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def histogram(self, name: str, counts: Any, step: int) -> None:
        """Counts in equal bins over -1 ... 1, shape (B,), for TensorBoard."""
        size = len(counts)
        edges = [-1 + 2 * (bin + 1) / size for bin in range(size)]
        middles = [edge - 1 / size for edge in edges]
        counts = [float(each) for each in counts]
        total, mean = sum(counts), sum(c * m for c, m in zip(counts, middles, strict=True))
        squares = sum(c * m * m for c, m in zip(counts, middles, strict=True))
        with write_errors(self._path):
            self._events.add_histogram_raw(name, -1.0, 1.0, total, mean, squares, edges, counts, step)

    def picture(self, name: str, image: Any, step: int = 0) -> None:
        """A picture (3, H, W), float in 0 ... 1 or uint8, for TensorBoard."""
        with write_errors(self._path):
            self._events.add_image(name, image, step)

    def close(self) -> None:
        try:
            with write_errors(self._path):
                self._file.close()
                self._events.close()
        finally:
            threading.excepthook = self._hook

    def _received(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread, whose error the next record raises again: no traceback besides."""
        if not isinstance(error.exc_value, OSError):
            self._hook(error)


def _keep(file: Path, step: int) -> None:
    """Leaves in metrics.jsonl the records up to a step."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # no record: the line that a kill cut in two, whose step comes again, or what somebody wrote
    with atomic_write(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
