"""The schema of `moco.choose`: which checkpoint, told without labels."""

from dataclasses import dataclass, field

from moco.config.base import ComputeConfig, at_least, check_bounds, require


@dataclass
class ChooseConfig(ComputeConfig):
    """Which runs' checkpoints to rank."""

    runs: list[str] = field(default_factory=list)
    """directories of runs of moco.train on the same pictures, each with the checkpoints that it kept
    (checkpoint.keep_epochs); a pattern such as runs/temperature/t*/seed* names several"""
    output: str = "runs/choose"
    """directory for choose.json, the results"""
    images: int = 2000
    """at most so many training pictures are measured, drawn once, without their labels"""
    labels: bool = True
    """where the pictures have labels, also say how well each measure agrees with them; false: do not look at them"""
    labels_per_class: int = 1
    """of the few-label kNN that measures are held against"""
    draws: int = 100
    """of its labels"""
    probe_labels_per_class: int = 10
    """of the linear probe that they are held against as well"""


def check_choose(config: ChooseConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    require(bool(config.runs), "say which runs: runs=[runs/digits] or runs=['runs/temperature/t*/seed*']")
    require(bool(config.output.strip()), "output='' must name a directory, e.g. output=runs/choose")
    at_least(
        1,
        {
            "labels_per_class": config.labels_per_class,
            "draws": config.draws,
            "probe_labels_per_class": config.probe_labels_per_class,
        },
    )
    at_least(2, {"images": config.images})
