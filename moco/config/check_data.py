"""The schema of `moco.check_data`: what is wrong with a folder of pictures, before a run."""

from dataclasses import dataclass, field

from moco.config.base import at_least, check_bounds, one_of, require
from moco.config.data import DataConfig, check_data_fields


@dataclass
class CheckDataConfig:
    """Which pictures, judged by what a run with the same `data` would do with them."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="folder"))
    """as for moco.train; its loader processes (data.workers) decode here too"""
    output: str = "check_data.json"
    """the report, with the files of each kind"""
    listed: int = 1000
    """at most so many files of a kind are named in the report; all are counted"""


def check_check_data(config: CheckDataConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    require(
        config.data.name != "shards",
        "data.name=shards: a packed folder is checked, and mended, by the same moco.pack command once more; "
        "moco.check_data is for the pictures before that, data=folder",
    )
    one_of("data.name", config.data.name, ("folder", "imagenet"))  # the others are arrays, with checksums of their own
    check_data_fields(config.data)
    at_least(1, {"listed": config.listed})
    require(bool(config.output.strip()), "output='' must name the report's file, e.g. output=check_data.json")
