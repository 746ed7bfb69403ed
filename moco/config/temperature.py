"""The schema of `moco.temperature`: what the temperature does, explained on three logits or swept over real runs."""

from dataclasses import dataclass, field
from pathlib import Path

from moco.config.base import ComputeConfig, at_least, check_bounds, config_dir, one_of, require

OWN = ("run", "seed", "epochs", "experiment", "method.temperature", "checkpoint.keep_epochs")  # set by the sweep itself


@dataclass
class TemperatureConfig(ComputeConfig):
    """What to sweep over, and what to measure then."""

    mode: str = "sweep"
    """sweep (train at each temperature, measure, draw) or explain (three logits, no training: seconds)"""
    temperatures: list[float] = field(default_factory=list)
    """each gets its own runs; more can be added later, and finished runs are not run again"""
    seeds: int = 1
    """runs at each temperature, with seed 0, 1, ...; two or more show the spread"""
    recipe: str = "digits"
    """what moco.train calls experiment=: the name of a file in configs/experiment/"""
    overrides: list[str] = field(default_factory=list)
    """further ones for each run, as moco.train has them, in quotes: 'overrides=["data.root=IMAGES","threads=1"]'"""
    epochs: int | None = None
    """of each run; null: the recipe's"""
    keep_epochs: int = 0
    """each run keeps a checkpoint every so many epochs, for moco.choose; 0: the last ones only"""
    output: str = "runs/temperature"
    """directory for the runs (tT/seedS/), temperature.json and the figures (SVG); the same output resumes a study"""
    images: int = 2000
    """at most so many held-out pictures (training pictures where none are held out) are measured, drawn once"""
    labels_per_class: int = 1
    """of the few-label kNN"""
    k: int = 1
    """its neighbors"""
    draws: int = 100
    """of the few labels"""
    bins: int = 100
    """of the histograms of similarities, over -1 ... 1"""
    similarities: list[float] = field(default_factory=lambda: [0.8, 0.5, 0.1])
    """of mode=explain: cosines of the candidates; the answer is the first (right) or the second (wrong)"""


def check_temperature(config: TemperatureConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    one_of("mode", config.mode, ("sweep", "explain"))
    one_of(
        "recipe", config.recipe, tuple(sorted(path.stem for path in Path(config_dir(), "experiment").glob("*.yaml")))
    )
    temperatures = config.temperatures
    require(bool(temperatures), "temperatures=[] must hold one or more, e.g. temperatures=[0.05,0.1,0.2,0.5]")
    lowest = min(temperatures)
    require(lowest > 0, f"temperatures={temperatures}: {lowest:g} must be above 0, for logits are divided by it")
    names = [f"{each:g}" for each in temperatures]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"temperatures={temperatures} holds {', '.join(twice)} twice (to six digits): leave one out")
    at_least(
        1,
        {
            "seeds": config.seeds,
            "epochs": 1 if config.epochs is None else config.epochs,
            "labels_per_class": config.labels_per_class,
            "k": config.k,
            "draws": config.draws,
            "bins": config.bins,
        },
    )
    at_least(0, {"keep_epochs": config.keep_epochs})
    at_least(2, {"images": config.images})
    require(bool(config.output.strip()), "output='' must name the study's directory, e.g. output=runs/temperature")
    cosines = config.similarities
    require(
        2 <= len(cosines) <= 6 and all(-1 <= each <= 1 for each in cosines),
        f"similarities={cosines} must hold two to six cosines in -1 ... 1, e.g. similarities=[0.8,0.5,0.1]",
    )
    for override in config.overrides:
        _check_override(override)


def _check_override(override: str) -> None:
    name, _, value = override.lstrip("+~").partition("=")
    require(bool(value) and not override.startswith("-"), f"overrides: {override!r} must be field=value")
    require(
        name not in OWN,
        f"overrides: {override!r} is the sweep's own business: set temperatures, seeds, epochs, keep_epochs, "
        "recipe or output instead",
    )
    require(
        not (name == "method.temperature_schedule" and value != "constant"),
        f"overrides: {override!r} would change the temperature while a run trains: leave it out",
    )
