"""Write and read the metrics of a run: metrics.jsonl, and the loggers that the field `logger` names.

To add a logger, write a class derived from `Logger` and add a line to `LOGGERS`.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from moco.config import RunWarning
from moco.files import WriteError, atomic_write, cause, write_errors
from moco.plugins import Registry
from moco.runs.tensorboard import TensorBoard
from moco.runs.trackers import MLflow, Wandb
from moco.runtime.stdio import printable
from moco.untrusted import read_yaml

METRICS = "metrics.jsonl"

Metrics = dict[str, tuple[list[float], list[float]]]  # by name: steps and values


class Logger(Protocol):
    """Receives the metrics of a run on rank zero. A class that derives from it has the defaults, which do nothing.

    An error of `check` is raised before the run starts. An error that another method raises does not end the run: it is
    reported once, and the logger gets nothing more. Only a `moco.files.WriteError` ends the run, as if metrics.jsonl
    could not be written.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers, some of which may be nan or infinite; names are "train/loss", "accuracy/knn", ..."""

    def log_histogram(self, name: str, counts: Any, step: int) -> None:
        """Record a histogram: the number of values in each of B equal bins over -1 ... 1, shape (B,)."""

    def log_image(self, name: str, image: Any) -> None:
        """Record an image (3, H, W), float in 0 ... 1 or uint8."""

    def close(self) -> None:
        """Write what is left; called at the end of the run, also if an error ends it."""

    @staticmethod
    def check() -> None:
        """Raise ConfigError if the logger cannot work here; called on rank zero before anything is computed."""

    @staticmethod
    def add_results(path: Path, values: Mapping[str, float], step: int) -> None:
        """Record the results of an evaluation after the end of the run in `path`, at the encoder's training step."""


# The loggers' constructors by name. Their arguments are the run's directory, the run's configuration as nested dicts,
# and the step from which the run resumes, 0 for a new run.
LOGGERS: Registry[Callable[[Path, Mapping[str, Any], int], Logger]] = Registry(
    "logger", {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
)


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if a logger is unknown or cannot work here, such as without its package. Collective."""
    from moco.distributed import on_rank_zero  # imports torch, which scripts/sweep.py does not need

    for construct in [LOGGERS.find(name) for name in names]:
        on_rank_zero(getattr(construct, "check", lambda: None))


def add_results(path: Path, values: Mapping[str, float], step: int) -> None:
    """Pass the results of an evaluation to every logger in `LOGGERS`; W&B and MLflow ignore a run they did not log.

    An error of a logger becomes a warning, except a `WriteError`.

    Args:
        path: the run's directory.
        values: the results by name, "evaluation/knn_all labels/pretrained_top1", ...
        step: the encoder's training step.
    """
    values = {printable(name): value for name, value in values.items()}  # the path of a data set can be any bytes
    for name, construct in LOGGERS.items():
        with _without_failing(name, "it did not record the results"):
            getattr(construct, "add_results", Logger.add_results)(path, values, step)


@contextmanager
def _without_failing(name: str, consequence: str, on_failure: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Turn an exception of a logger into a warning, which ends with `consequence`."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # a logger raises whatever its library does
        on_failure()
        message = f"logger={name} failed ({type(error).__name__}: {cause(error)}): {consequence}"
        warnings.warn(message, RunWarning, stacklevel=5)


class MetricsLogger:
    """Writes metrics.jsonl and passes all metrics to the loggers. Raises `WriteError` if the disk is full.

    Args:
        path: the run's directory.
        step: the step from which training resumes. Existing records of later steps are dropped; at 0, all records.
        loggers: names in `LOGGERS`.
    """

    def __init__(self, path: Path, step: int, loggers: Sequence[str] = ("tensorboard",)) -> None:
        self._path = file = path / METRICS
        with write_errors(file):
            if file.is_file():
                kept = [line for line, at, _ in _records(file) if at <= step and step > 0]
                with atomic_write(file) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in kept))
            self._file = self._open()
        config = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
        self._loggers: dict[str, Logger] = {}
        for name in loggers:
            construct = LOGGERS.find(name)
            with self._left_out_if_failing(name):
                self._loggers[name] = construct(path, config, step)

    def _left_out_if_failing(self, name: str) -> AbstractContextManager[None]:
        return _without_failing(name, "the run continues without it", lambda: self._loggers.pop(name, None))

    def _each(self, call: Callable[[Logger], object]) -> None:
        for name, logger in list(self._loggers.items()):
            with self._left_out_if_failing(name):
                call(logger)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, and pass the values on; names are "train/loss", "accuracy/knn", ..."""
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has neither NaN nor infinity (such as the gradient norm after an overflow of fp16): write null.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with write_errors(self._path):
            self._restore()
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._each(lambda logger: logger.log(step, numbers))

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
        """Pass on a histogram: the number of values in each of B equal bins over -1 ... 1, shape (B,)."""
        self._each(lambda logger: logger.log_histogram(name, counts, step))

    def log_image(self, name: str, image: Any) -> None:
        """Pass on an image (3, H, W), float in 0 ... 1 or uint8."""
        self._each(lambda logger: logger.log_image(name, image))

    def close(self) -> None:
        """Flush and close the file and all loggers."""
        try:
            with write_errors(self._path):
                self._file.close()
        finally:
            self._each(lambda logger: logger.close())


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
    """Yield each line with its step and values; skip invalid lines, such as one that a killed run left incomplete."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            step = record.pop("step") + 0.0
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        yield line, step, record
