"""Write and read the metrics of a run: metrics.jsonl and TensorBoard's event files."""

import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moco.config import RunWarning
from moco.files import atomic_write, write_errors
from moco.untrusted import read_yaml

METRICS = "metrics.jsonl"

_HYPERPARAMETERS = {  # of TensorBoard's tab HParams, by the group of the configuration; "": of no group
    "": ("recipe", "seed", "epochs", "batch_size"),
    "data": ("name",),
    "model": ("backbone",),
    "method": ("name", "temperature", "momentum", "queue_size"),
    "optim": ("name", "lr", "weight_decay"),
}
_RESULTS = ("accuracy/knn", "retrieval/retrieval", "train/loss")  # metrics of that tab

Metrics = dict[str, tuple[list[float], list[float]]]  # by name: steps and values


class MetricsLogger:
    """Writes metrics.jsonl and TensorBoard's events. Every method raises `WriteError` if the disk is full.

    Args:
        path: the run's directory.
        step: the step from which training resumes. Later records of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

        self._path = file = path / METRICS
        with write_errors(file):
            if file.is_file():
                kept = [line for line, at, _ in _records(file) if at <= step and step > 0]
                with atomic_write(file) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in kept))
            self._file = self._open()
            self._hook = threading.excepthook
            threading.excepthook = self._on_thread_error
            self._events = SummaryWriter(str(path), purge_step=step + 1 if step else 0)
            self._describe(path / "config.yaml")

    def _describe(self, config: Path) -> None:
        """Add to TensorBoard: the configuration, its hyperparameters, and a chart of the accuracies with baselines."""
        if config.is_file():
            lines = config.read_text(encoding="utf-8").splitlines()
            self._events.add_text("configuration", "\n".join(f"    {line}" for line in lines))
            self._add_hyperparameters(read_yaml(config))
        charts = {name: {f"{name} and baselines": ["Multiline", [f"{name}/.*"]]} for name in ("accuracy", "retrieval")}
        self._events.add_custom_scalars(charts)

    def _add_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Add a row to the tab HParams. `SummaryWriter.add_hparams` would write it to a directory of its own."""
        from torch.utils.tensorboard.summary import hparams

        groups = {group: config if group == "" else config.get(group) or {} for group in _HYPERPARAMETERS}
        values = {
            f"{group}.{name}".lstrip("."): value
            for group, names in _HYPERPARAMETERS.items()
            for name in names
            if isinstance(value := groups[group].get(name), int | float | str)
        }
        experiment, start, _ = hparams(values, dict.fromkeys(_RESULTS, 0))
        writer: Any = self._events.file_writer
        writer.add_summary(experiment)
        writer.add_summary(start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, and one point per curve; names are "train/loss", "accuracy/knn", ..."""
        # JSON has neither NaN nor infinity (such as the gradient norm after an overflow of fp16): write null.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with write_errors(self._path):
            self._restore()
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            for name, value in values.items():
                if not (math.isnan(value) and name.startswith("analysis/")):  # nan: there was nothing to measure
                    self._events.add_scalar(name, value, step)

    def _open(self) -> TextIO:
        return self._path.open("a+", buffering=1)

    def _restore(self) -> None:
        """Write metrics.jsonl again if it was removed; append to the file that replaced it, if there is one."""
        opened = os.fstat(self._file.fileno())
        replaced = self._path.exists()
        if replaced and os.path.samestat(opened, self._path.stat()):
            return
        removed, self._file = self._file, self._open()
        with removed:
            if not replaced:
                removed.seek(0)  # its content stays on disk as long as it is open
                shutil.copyfileobj(removed, self._file)
        what = "replaced: records are appended to the new file" if replaced else "removed: it is written again"
        warnings.warn(f"{self._path} was {what}", RunWarning, stacklevel=2)

    def log_histogram(self, name: str, counts: Any, step: int) -> None:
        """Add counts in equal bins over -1 ... 1, shape (B,), to TensorBoard."""
        counts, edges = np.asarray(counts, np.float64), np.linspace(-1, 1, len(counts) + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        sums = counts.sum(), counts @ middles, counts @ middles**2  # of the values and of their squares
        with write_errors(self._path):
            self._events.add_histogram_raw(name, -1.0, 1.0, *sums, edges[1:].tolist(), counts.tolist(), step)

    def log_image(self, name: str, image: Any) -> None:
        """Add an image (3, H, W), float in 0 ... 1 or uint8, to TensorBoard, at step 0."""
        with write_errors(self._path):
            self._events.add_image(name, image, 0)

    def close(self) -> None:
        """Flush and close both files."""
        try:
            with write_errors(self._path):
                self._file.close()
                self._events.close()
        finally:
            threading.excepthook = self._hook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread: the next record raises its OSError again."""
        if not isinstance(error.exc_value, OSError):
            self._hook(error)


def read_metrics(file: Path) -> Metrics:
    """Return the series in a metrics.jsonl, empty if there is no such file. null becomes nan."""
    metrics: Metrics = {}
    for _, step, record in _records(file):
        try:
            values = {name: math.nan if value is None else float(value) for name, value in record.items()}
        except (ValueError, TypeError):
            continue
        for name, value in values.items():
            steps, numbers = metrics.setdefault(name, ([], []))
            steps.append(step)
            numbers.append(value)
    return metrics


def _records(file: Path) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield each line with its step and values; skip invalid lines, such as one that a kill cut in two."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            step = record.pop("step") + 0.0
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        yield line, step, record
