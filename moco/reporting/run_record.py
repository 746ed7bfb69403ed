"""Read a run directory: configuration, metrics, evaluations and newest checkpoint."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moco.analysis.doctor import Alarm, diagnose, facts_of
from moco.config import ComputeConfig, ConfigError, MethodConfig, RunWarning, TrainConfig, require
from moco.methods import read_method
from moco.plugins import naming_plugins
from moco.runs import checkpoint
from moco.runs.directory import no_checkpoint_message, no_directory_message
from moco.runs.metrics import Metrics, read_metrics
from moco.runs.results import recorded
from moco.runtime.next_command import next_commands
from moco.untrusted import read_yaml


@dataclass(frozen=True, eq=False)
class Run:
    """A run of moco.train on disk."""

    path: Path
    config: dict[str, Any]
    values: Metrics
    results: list[dict[str, Any]]
    checkpoint: Path | None  # the newest readable one
    state: dict[str, Any]  # of the checkpoint, without "method", "optimizer" and "scaler"; {} without a checkpoint
    given: Mapping[str, Any] = field(default_factory=dict)  # fields of the data set that the command line sets

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def get(self, dotted: str, default: Any = None) -> Any:
        """Return a field of the configuration, or `default` if the field is null or newer than the run."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def method(self) -> MethodConfig:
        """The configuration of the run's method; fields that are newer than the run have their defaults."""
        with naming_plugins(self.path, self.config):
            return read_method(self.config.get("method", {}))

    @property
    def starts_trained(self) -> bool:
        """See `moco.config.TrainConfig.starts_trained`."""
        return bool(self.get("init_from") or self.get("model.options.pretrained"))

    @property
    def step(self) -> int:
        recorded = [steps[-1] for steps, _ in self.values.values() if steps]
        return int(max([*recorded, self.state.get("step", 0)]))

    @property
    def steps_per_epoch(self) -> float:
        """The recorded length of an epoch in steps; nan if it was not recorded."""
        epochs, steps = self.values.get("train/epoch", ([], []))[::-1]
        return steps[-1] / epochs[-1] if epochs and epochs[-1] > 0 else math.nan

    @property
    def total_steps(self) -> float:
        return float(self.get("epochs", math.nan)) * self.steps_per_epoch

    @property
    def images(self) -> int | None:
        """The number of training images; None without a checkpoint, or for a checkpoint of an early version."""
        length: int | None = self.state.get("data", {}).get("length")
        return length

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps - 0.5  # false for nan

    @property
    def labeled(self) -> bool:
        """Whether the run's data set is known to have labels and held-out images."""
        return self.get("data.name") in _LABELED or "accuracy/knn" in self.values

    def next_commands(self, compute: ComputeConfig | None = None) -> list[str]:
        """Return the commands that evaluate or use the run's encoder, computing as `compute` does."""
        data = (self.get("data.name", ""), self.get("data.root", ""))
        on_bad_image, step = self.get("data.on_bad_image", "raise"), self.state.get("step")
        return next_commands(str(self.path), *data, self.labeled, on_bad_image, self.given, step, compute)


_IN_MEMORY = {"digits", "cifar10", "cifar100", "stl10"}  # data sets whose images are always in memory
_LABELED = _IN_MEMORY | {"imagenet"}  # data sets with labels and held-out images


def open_run(path: Path, field: str = "run") -> Run:
    """Read a run.

    Raises:
        ConfigError: if there is no such run, or none of its checkpoints can be read: the message names `field`. Also if
            config.yaml or results.json is damaged.
    """
    require(path.is_dir(), no_directory_message(path, field))
    file, state = _newest(path, field)
    if file is None and not (path / "config.yaml").is_file() and any(path.glob("*/checkpoints/")):
        raise ConfigError(no_checkpoint_message(path, field))
    config = state.get("config") or _configuration(path, field)
    values = read_metrics(path / "metrics.jsonl")
    if not values and file is None:
        raise ConfigError(no_checkpoint_message(path, field))
    slim = {name: value for name, value in state.items() if name not in ("method", "optimizer", "scaler")}
    results = [entry for entry in recorded(path) if isinstance(entry.get("figures"), dict)]
    return Run(path, config, values, results, file, slim)


def _newest(path: Path, field: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest readable checkpoint and its state; None and {} for a run without checkpoints."""
    found = checkpoint.list_checkpoints(path / "checkpoints")
    for file in found:
        try:
            state = checkpoint.load(file)
        except checkpoint.CheckpointError as error:
            before = "" if file == found[-1] else "; using the previous checkpoint"
            warnings.warn(f"{error}{before}", RunWarning, stacklevel=3)
            continue
        if isinstance(state.get("config"), dict) and isinstance(state.get("method"), dict):
            return file, state
    require(
        not found,
        f"{field}={path}: none of its {len(found)} checkpoints can be read: move them away, or name another run",
    )
    return None, {}


def _configuration(path: Path, field: str) -> dict[str, Any]:
    file = path / "config.yaml"
    require(
        file.is_file(),
        f"{field}={path} contains no config.yaml, so it is not a run of moco.train: name the directory of a run",
    )
    try:
        config = read_yaml(file)
    except ValueError:
        config = None
    require(isinstance(config, dict), f"{file} is damaged, and there is no checkpoint: name another run")
    return dict(config)


def findings(run: Run) -> list[Alarm]:
    """Return the findings of the training doctor; without a checkpoint, none about the number of training images."""
    batch_size, epochs = run.get("batch_size", TrainConfig.batch_size), run.get("epochs", math.inf)
    more = {"lr": run.get("optim.lr", math.nan), "starts_trained": run.starts_trained, "source": run.get("data.name")}
    more["shuffled_keys"] = run.get("model.shuffle_keys", False) and run.get("model.bn") == "grouped"
    more["batch_parts"] = run.get("accumulate", 1)  # not times the processes: their number can change on resuming
    more["bn_group"] = run.get("model.bn_group_size", 1) if run.get("model.bn") == "grouped" else 1
    more["in_memory"] = run.get("data.resident", False) or run.get("data.name") in _IN_MEMORY
    if run.images is None and not math.isnan(run.total_steps):
        more["total_steps"] = run.total_steps
    facts = facts_of(run.method, run.images or 2**62, batch_size, epochs, **more)
    return diagnose({name: series for name, (_, series) in run.values.items()}, facts)


def by_epoch(runs: Sequence[Run]) -> tuple[dict[str, Metrics], str]:
    """Return the metrics by run, and the unit of their x axis: "epoch" if every run recorded epochs, else "step"."""
    epochs = all(not math.isnan(run.steps_per_epoch) for run in runs)
    moved = {}
    for run, name in zip(runs, names(runs), strict=True):
        by = run.steps_per_epoch if epochs else 1.0
        moved[name] = {key: ([step / by for step in steps], series) for key, (steps, series) in run.values.items()}
    return moved, "epoch" if epochs else "step"


def names(runs: Sequence[Run]) -> list[str]:
    """Return the directory names of the runs, or their paths if two names are equal."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]
