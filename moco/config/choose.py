"""The configuration of `python -m moco.choose`."""

from dataclasses import dataclass, field

from moco.config.base import ComputeConfig, bounded, check_bounds, refuse_on_mps
from moco.config.data import SubjectDataConfig, refuse_hold_out


@dataclass
class ChooseConfig(ComputeConfig):
    """Rank the checkpoints of runs by measures that need no labels."""

    runs: list[str] = bounded([], min_length=1, path=True, example="runs=[runs/digits]")
    """Directories of runs of moco.train on the same images. All their checkpoints are ranked: those that
    checkpoint.keep_epochs kept, and the newest ones. A pattern such as runs/temperature/t*/seed* names several runs."""
    output: str = bounded("runs/choose", min_length=1, path=True, example="output=runs/choose")
    """Directory for the results, choose.json."""
    images: int = bounded(2000, ge=2)
    """Number of training images, drawn once, on which the label-free measures are computed; all if there are fewer."""
    labels: bool = True
    """If the images have labels, report how well each measure agrees with the accuracy of a kNN classifier and of a
    linear probe; false: ignore the labels."""
    labels_per_class: int = bounded(1, ge=1)
    """Labeled images per class of the kNN classifier whose accuracy is compared with the measures."""
    draws: int = bounded(100, ge=1)
    """Number of random draws of the kNN classifier's labeled images. The classifier's accuracy is the mean over the
    draws."""
    probe_labels_per_class: int = bounded(10, ge=1)
    """Labeled images per class of the linear probe whose accuracy is also compared with the measures."""
    data: SubjectDataConfig = field(default_factory=SubjectDataConfig)


def check_choose(config: ChooseConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    refuse_on_mps(config, "this command")
    refuse_hold_out(config.data)
