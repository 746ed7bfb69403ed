"""The run directory: config.yaml, metrics.jsonl, checkpoints/, TensorBoard's events, views.png.

Rank 0 alone writes. A run started again in its directory resumes; the records that it made after
the checkpoint it resumes from are taken back, because it makes them again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moco.config import ConfigError

# What may differ when a run goes on: where things are and how fast they go, not what is computed.
FREE_FIELDS = (
    "run",
    "device",
    "threads",
    "log_every",
    "accumulate",
    "compile",
    "channels_last",
    "data.root",
    "data.eval_root",
    "data.download",
    "data.workers",
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


def open_run(path: Path, config: Mapping[str, Any]) -> None:
    """Makes the directory and writes config.yaml, or checks that what is there is the same run.

    Raises:
        ConfigError: if the directory holds a run whose configuration differs, naming each field.
    """
    file = path / "config.yaml"
    if file.is_file():
        before, now = flatten(yaml.safe_load(file.read_text())), flatten(config)
        differing = [
            f"{name} (there {before.get(name)!r}, now {now.get(name)!r})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and not any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)
        ]
        if differing:
            raise ConfigError(
                f"run={path} holds a run with another configuration: {'; '.join(differing)}. "
                "Give this one its own directory (run=...) or take those values back"
            )
    elif path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"run={path} is not empty and holds no run (no config.yaml): choose another directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run={path} cannot be made: {error.strerror}") from error
    temporary = file.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    temporary.replace(file)


class Journal:
    """metrics.jsonl and TensorBoard's events of a run, from a step on.

    Args:
        path: the run's directory.
        step: the step that training goes on from; later records of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds at start-up

        file = path / "metrics.jsonl"
        kept = []
        if file.is_file():
            for line in file.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step and step > 0:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the line that a kill cut in two; its step comes again
            temporary = file.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(file)
        self._file = file.open("a", buffering=1)
        self._events = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one point a curve; names are "train/loss", "accuracy/knn", ..."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, image: Any, step: int = 0) -> None:
        """A picture (3, H, W), float in 0 ... 1 or uint8, for TensorBoard."""
        self._events.add_image(name, image, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()
