"""TensorBoard's event files: curves, histograms, images, the configuration and its hyperparameters."""

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.files import write_errors

_HYPERPARAMETERS = {  # the fields in TensorBoard's tab HParams, by their group in the configuration; "": no group
    "": ("recipe", "seed", "epochs", "batch_size"),
    "data": ("name",),
    "model": ("backbone",),
    "method": ("name", "temperature", "momentum", "queue_size"),
    "optim": ("name", "lr", "weight_decay"),
}
_RESULTS = ("accuracy/knn", "retrieval/retrieval", "train/loss")  # the metrics in the tab HParams


class TensorBoard:
    """The logger that writes TensorBoard's events; see `moco.runs.metrics.Logger`.

    The constructor and all methods of an instance raise `WriteError` if the files cannot be written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

        self._path = path
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        with write_errors(path):
            self._events = SummaryWriter(str(path), purge_step=step + 1 if step else 0)
            self._describe(path / "config.yaml", config)

    def _describe(self, file: Path, config: Mapping[str, Any]) -> None:
        """Add the configuration, its hyperparameters, and charts of accuracy and of retrieval with their baselines."""
        if config:
            lines = file.read_text(encoding="utf-8").splitlines()
            self._events.add_text("configuration", "\n".join(f"    {line}" for line in lines))
            self._add_hyperparameters(config)
        charts = {name: {f"{name} and baselines": ["Multiline", [f"{name}/.*"]]} for name in ("accuracy", "retrieval")}
        self._events.add_custom_scalars(charts)

    def _add_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Add a row to the tab HParams. `SummaryWriter.add_hparams` would write the row to another directory."""
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
        """Add one point per curve."""
        with write_errors(self._path):
            for name, value in values.items():
                if not (math.isnan(value) and name.startswith("analysis/")):  # nan: there was nothing to measure
                    self._events.add_scalar(name, value, step)

    @staticmethod
    def check() -> None:
        """Do nothing: TensorBoard is always installed."""

    @staticmethod
    def add_results(path: Path, values: Mapping[str, float], step: int) -> None:
        """Add one point per result, in a new event file. Raises `OSError` if the file cannot be written."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(path)) as events:
            for name, value in values.items():
                events.add_scalar(name, value, step)

    def log_histogram(self, name: str, counts: Any, step: int) -> None:
        """Add a histogram to TensorBoard: the counts, (B,), in B equal bins over -1 ... 1."""
        counts, edges = np.asarray(counts, np.float64), np.linspace(-1, 1, len(counts) + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        # The number of values, their sum, and the sum of their squares.
        sums = counts.sum(), counts @ middles, counts @ middles**2
        with write_errors(self._path):
            self._events.add_histogram_raw(name, -1.0, 1.0, *sums, edges[1:].tolist(), counts.tolist(), step)

    def log_image(self, name: str, image: Any) -> None:
        """Add an image (3, H, W), float in 0 ... 1 or uint8, to TensorBoard, at step 0."""
        with write_errors(self._path):
            self._events.add_image(name, image, 0)

    def close(self) -> None:
        """Flush and close the file."""
        try:
            with write_errors(self._path):
                self._events.close()
        finally:
            threading.excepthook = self._hook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of an OSError in TensorBoard's writer thread: the next write raises it again."""
        if not isinstance(error.exc_value, OSError):
            self._hook(error)
