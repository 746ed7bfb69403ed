"""The schema of `moco.choose`: which checkpoint, told without labels."""

from dataclasses import dataclass, field

from moco.config.base import at_least, one_of, require, require_finite


@dataclass
class ChooseConfig:
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
    device: str = "auto"
    """auto, cpu, cuda"""
    threads: int = 0
    """CPU threads; 0: torch's choice"""


def check_choose(config: ChooseConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    require_finite(config)
    one_of("device", config.device, ("auto", "cpu", "cuda"))
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
    at_least(0, {"threads": config.threads})
