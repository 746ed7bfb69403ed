"""The loggers Weights & Biases and MLflow. When a training run resumes, its run in the tracker continues.

The tracker's id of a run is in wandb_id.txt or mlflow_id.txt in the run's directory, so that a run that resumes on
another machine finds this id too.
"""

import hashlib
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import flatten, require
from moco.config.base import install, optional_module
from moco.files import atomic_write

_PROJECT = "moco"  # unless an environment variable of the tracker names another
_WAIT = 60.0  # seconds that the end of a run waits for a server
# MLflow's limits in characters: for the value of a parameter, and for the name of a parameter, a metric or a run.
_LONGEST_VALUE, _LONGEST_NAME = 6000, 250
_IN_MLFLOW = {"%": "percent", ", ": " - "}  # parts of moco's names that MLflow refuses, and their replacements


class Wandb:
    """The logger of Weights & Biases, whose own process sends the records; see `moco.runs.metrics.Logger`.

    The environment variables of Weights & Biases apply: WANDB_MODE, WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, ...
    """

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        known = _read_id(path, "wandb") if step else None
        run_id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)
        self._wandb = _import("wandb")
        self._run = _wandb_run(path, run_id, {**config, "commit": _commit()})
        _write_id(path, "wandb", run_id)

    @staticmethod
    def check() -> None:
        """Raise ConfigError if the package is missing, or if wandb is online and nobody is logged in."""
        wandb = _import("wandb")
        ready = not _online(wandb) or wandb.login(prompt=False)
        require(ready, "logger=[wandb] needs an account: run `wandb login`, or set WANDB_MODE=offline")

    @staticmethod
    def add_results(path: Path, values: Mapping[str, float], step: int) -> None:
        """Add the results of an evaluation to the summary of the run that was trained in `path`, if W&B logged it."""
        if run_id := _read_id(path, "wandb"):
            Wandb.check()
            run = _wandb_run(path, run_id, None)
            try:
                run.summary.update(dict(values))
            finally:
                run.finish()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers, except those of steps that an earlier attempt has recorded already."""
        self._log(step, dict(values))

    def log_histogram(self, name: str, counts: Any, step: int) -> None:
        """Record counts in equal bins over -1 ... 1, shape (B,)."""
        counts = np.asarray(counts)
        edges = np.linspace(-1, 1, len(counts) + 1)
        self._log(step, {name: self._wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))})

    def log_image(self, name: str, image: Any) -> None:
        """Record an image (3, H, W), float in 0 ... 1 or uint8."""
        pixels = np.asarray(image.cpu()).transpose(1, 2, 0)  # (H, W, 3)
        if pixels.dtype != np.uint8:
            pixels = (255 * pixels).round().astype(np.uint8)
        self._log(self._run.step, {name: self._wandb.Image(pixels)})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:  # wandb drops the records of earlier steps, with a warning each
            self._run.log(values, step=step)

    def close(self) -> None:
        """Send the remaining records, for at most a minute; `wandb sync` can send the rest later."""
        self._run.finish(exit_code=int(_failing()))


def _online(wandb: Any) -> bool:
    return bool(wandb.setup().settings.mode == "online")


def _wandb_run(path: Path, run_id: str, config: Mapping[str, Any] | None) -> Any:
    """Open a run by its id. Its files are in `path`/wandb."""
    wandb = _import("wandb")
    settings = wandb.Settings(console="off", quiet=True, finish_timeout=_WAIT)  # console: the terminal belongs to moco
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=os.environ.get("WANDB_NAME", str(path)),
        id=run_id,
        dir=str(path),
        resume="allow" if _online(wandb) else None,
        config=config,
        allow_val_change=True,  # some fields may differ in a resumed run
        reinit="create_new",
        settings=settings,
    )


class MLflow:
    """The logger of MLflow; see `moco.runs.metrics.Logger`. It records numbers only, no histograms and images.

    A thread sends the records, so that no step waits for a server or a database. The environment variables of MLflow
    apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID, ...
    """

    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        self._client = _mlflow_client()
        known = _read_id(path, "mlflow") if step else None
        # `_first`, the first step to record, is the last step that an earlier attempt recorded; 0 if there is none.
        self._id, self._first = self._continue(known or os.environ.get("MLFLOW_RUN_ID"))
        if self._id is None:
            self._id = self._create(path, config)
        _write_id(path, "mlflow", self._id)
        self._records: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    @staticmethod
    def check() -> None:
        """Raise ConfigError if the package is missing."""
        _import("mlflow")

    @staticmethod
    def add_results(path: Path, values: Mapping[str, float], step: int) -> None:
        """Add the results of an evaluation to the run that was trained in `path`, if MLflow logged it."""
        if run_id := _read_id(path, "mlflow"):
            _mlflow_client().log_batch(run_id, metrics=_metrics(values, step))

    def _continue(self, run_id: str | None) -> tuple[str | None, int]:
        """Reopen a run and return its id and last step; (None, 0) if MLflow does not know the run."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None, 0
        try:
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "train/loss")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None, 0
        return run_id, max((each.step for each in history), default=0)

    def _create(self, path: Path, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = _import("mlflow").set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        tags = {"mlflow.source.git.commit": _commit() or "unknown"}
        run = self._client.create_run(experiment.experiment_id, run_name=str(path)[-_LONGEST_NAME:], tags=tags)
        values = [Param(mlflow_name(name), str(value)[:_LONGEST_VALUE]) for name, value in flatten(config).items()]
        self._client.log_batch(run.info.run_id, params=values)
        return str(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers, except those of steps before the last step that an earlier attempt recorded."""
        if self._error:
            raise self._error
        if step >= self._first:
            self._records.put(_metrics(values, step))

    def _send(self) -> None:
        try:
            while (metrics := self._records.get()) is not None:
                self._client.log_batch(self._id, metrics=metrics)
        except Exception as error:  # the next call of `log` or `close` raises it
            self._error = error

    def log_histogram(self, name: str, counts: Any, step: int) -> None:
        """Do nothing: MLflow has no histograms."""

    def log_image(self, name: str, image: Any) -> None:
        """Do nothing: the server may store files elsewhere, with other credentials."""

    def close(self) -> None:
        """Send the remaining records, for at most a minute."""
        self._records.put(None)
        self._thread.join(_WAIT)
        if self._thread.is_alive():
            raise TimeoutError(f"the server has not taken all records after {_WAIT:.0f} s")
        if self._error:
            raise self._error
        self._client.set_terminated(self._id, "FAILED" if _failing() else "FINISHED")


def _mlflow_client() -> Any:
    # By default MLflow repeats a request for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    return _import("mlflow").MlflowClient()


def _metrics(values: Mapping[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(mlflow_name(name), value, int(1000 * time.time()), step) for name, value in values.items()]


def mlflow_name(name: str) -> str:
    """Return a name that MLflow accepts: letters, digits and `_-./ `, a relative path, at most 250 characters.

    Different names remain different: a name that cannot be recovered from the result gets its digest at the end.
    """
    text = name
    for old, new in _IN_MLFLOW.items():
        text = text.replace(old, new)
    restored = text
    for old, new in _IN_MLFLOW.items():
        restored = restored.replace(new, old)
    parts = re.sub(r"[^\w ./-]", "_", text).split("/")
    plain = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if (plain, restored) == (text, name) and len(plain) <= _LONGEST_NAME:
        return plain
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{plain[: _LONGEST_NAME - 9]} {digest}"


def _import(name: str) -> Any:
    module = optional_module(name, f"logger=[{name}]", name)
    # Without the package, a folder wandb/ in the current directory is imported as an empty module.
    require(getattr(module, "__version__", None) is not None, f"logger=[{name}] needs {install(name)}")
    return module


def _failing() -> bool:
    """Return whether an error or a signal ends the run; call it in a `finally`, before the exception is handled."""
    return sys.exc_info()[0] is not None


def _commit() -> str | None:
    from moco.runtime.provenance import commit  # imports torch, which scripts/sweep.py does not need

    return commit()


def _read_id(path: Path, tracker: str) -> str | None:
    file = path / f"{tracker}_id.txt"
    return file.read_text(errors="replace").strip() or None if file.is_file() else None


def _write_id(path: Path, tracker: str, run_id: str) -> None:
    if run_id != _read_id(path, tracker):
        with atomic_write(path / f"{tracker}_id.txt") as temporary:
            temporary.write_text(f"{run_id}\n")
