"""The configuration of `python -m moco.temperature`."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moco.config.base import ComputeConfig, bounded, check_bounds, config_dir, refuse_on_mps, require

# The sweep sets these fields of its runs.
SET_BY_SWEEP = ("run", "seed", "epochs", "experiment", "method.temperature", "checkpoint.keep_epochs")


@dataclass
class TemperatureConfig(ComputeConfig):
    """Study the effect of the temperature in real runs, or on one query with two to six candidates.

    `device` and `threads` apply to the measurements. For the runs, set them in overrides.
    """

    mode: str = bounded("sweep", choices=("sweep", "explain"))
    """sweep: train runs at each temperature, measure their encoders, and draw figures; explain: print the loss and the
    gradient of one query with the candidates of `similarities`, one positive and the negatives."""
    temperatures: list[float] = bounded([], gt=0, min_length=1, example="temperatures=[0.05,0.1,0.2,0.5]")
    """Temperatures to compare. Each temperature has runs of its own. More temperatures can be added later; finished
    runs are not repeated."""
    seeds: int = bounded(1, ge=1)
    """Runs per temperature, with the seeds 0, 1, ... Two or more show the variation between seeds."""
    recipe: str = "digits"
    """Recipe of the runs: a file of configs/experiment/, as experiment=NAME of moco.train."""
    overrides: list[str] = field(default_factory=list)
    """Further settings of each run, as for moco.train, in quotes: 'overrides=["data.root=IMAGES","threads=1"]'."""
    epochs: int | None = bounded(None, ge=1)
    """Epochs of each run; null: those of the recipe."""
    keep_epochs: int = bounded(0, ge=0)
    """Keep a checkpoint of each run every N epochs, for moco.choose; 0: keep only the newest checkpoints."""
    output: str = bounded("runs/temperature", min_length=1, path=True, example="output=runs/temperature")
    """Directory for runs (such as t0.1/seed0/), results (temperature.json) and figures. To resume a study, run the
    command again with the same output."""
    images: int = bounded(2000, ge=2)
    """Number of images on which the encoders are measured. They are drawn from the held-out images, or from the
    training images if none are held out."""
    labels_per_class: int = bounded(1, ge=1)
    """Labeled images per class for the kNN accuracy."""
    k: int = bounded(1, ge=1)
    """Number of nearest neighbors for the kNN accuracy."""
    draws: int = bounded(100, ge=1)
    """Number of random draws of the labeled images, over which the kNN accuracy is averaged."""
    bins: int = bounded(100, ge=1)
    """Number of bins of the histograms of similarities, over -1 ... 1."""
    similarities: list[float] = bounded(
        [0.8, 0.5, 0.1], min_length=2, max_length=6, example="similarities=[0.8,0.5,0.1]"
    )
    """For mode=explain: cosine similarities of the query to each candidate, or any logits, such as [1,2,3]. In the
    columns titled "right", the first candidate is the positive; in those titled "wrong", the second one.
    All other candidates are negatives."""


def check_temperature(config: TemperatureConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    refuse_on_mps(config, "this command")
    recipes = sorted(path.stem for path in Path(config_dir(), "experiment").glob("*.yaml"))
    require(config.recipe in recipes, f"recipe={config.recipe!r} must be one of {', '.join(recipes)}")
    names = Counter(f"{each:g}" for each in config.temperatures)
    repeated = ", ".join(name for name, count in names.items() if count > 1)
    require(not repeated, f"temperatures={config.temperatures} repeats {repeated} (to six digits): remove one")
    for override in config.overrides:
        _check_override(override)


def _check_override(override: str) -> None:
    name, _, value = override.lstrip("+~").partition("=")
    require(bool(value) and not override.startswith("-"), f"overrides: {override!r} must be field=value")
    fields = "temperatures, seeds, epochs, keep_epochs, recipe or output"
    error = f"overrides must not set {name} ({override!r}), because the sweep sets it: use {fields}"
    require(name not in SET_BY_SWEEP, error)
    error = f"overrides must not change the temperature during a run ({override!r}): remove it"
    require(name != "method.temperature_schedule" or value == "constant", error)
