"""The configuration of `python -m moco.check_data`."""

from dataclasses import dataclass, field

from moco.config.base import CommandConfig, bounded, check_bounds, require
from moco.config.data import DataConfig, check_data_fields
from moco.config.recommended import BUDGET


@dataclass
class CheckDataConfig(CommandConfig):
    """Check a folder of images for anything that would stop a run."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="folder"))
    """The images to check, as for moco.train. They are decoded by data.workers processes. For data=shards,
    only the checksums of the files are compared; this does not need the original images."""
    output: str = bounded("check_data.json", min_length=1, path=True, example="output=check_data.json")
    """File for the report, which lists the files with each kind of problem; by default in the current directory."""
    listed: int = bounded(1000, ge=1)
    """The report names at most this number of files for each kind of problem. It counts all files with a problem."""
    stats: bool = False
    """Also compute the mean and the standard deviation of each channel over all training images, for augment.mean and
    augment.std. The report, and the moco.train command that moco.check_data suggests, contain these numbers."""
    budget: int = bounded(BUDGET, ge=1)
    """For a small data set: approximate product of epochs and images in the moco.train command that moco.check_data
    suggests. With 40000 that command takes about ten minutes on a laptop."""


def check_check_data(config: CheckDataConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    name = config.data.name
    # The other data sets hold no separate files to check: they are arrays, tables or streams.
    known = ("folder", "imagenet", "video", "shards")
    require(name in known, f"data.name={name!r} must be one of {', '.join(known)}")
    packed = "stats=true needs the original images, and data.name=shards only compares checksums: set stats=false"
    require(not (config.stats and name == "shards"), packed)
    check_data_fields(config.data)
