"""The schema of `moco.pack`: pictures into tar shards."""

from dataclasses import dataclass, field

from moco.config.base import at_least, check_bounds, require
from moco.config.data import DataConfig, check_data_fields


@dataclass
class PackConfig:
    """Which pictures, where to, and whether they are made smaller."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="folder"))
    """as for moco.train; a held-out split is packed with it. Pictures that cannot be read are left out and listed, and
    more than data.max_bad of them end the command"""
    output: str = ""
    """the folder for shards and index; started again there, the same command goes on, or checks what it finished"""
    short_side: int = 0
    """scale pictures whose shorter side is longer down to so many pixels; 0: keep every file as it is"""
    quality: int = 90
    """of the JPEGs that scaled pictures become, 1 ... 95"""
    shard_mb: float = 256.0
    """a shard ends before it would exceed so many megabytes (of 1,000,000 bytes)"""
    workers: int | None = None
    """processes that read, check and scale; null: data.workers"""


def check_pack(config: PackConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    check_data_fields(config.data)
    require(
        bool(config.output.strip()), "output='' must name the folder for the shards, e.g. output=/data/pictures_packed"
    )
    require(
        config.data.name != "webdataset",
        "data.name=webdataset is in shards already: set data=webdataset for moco.train, or pack what they were made of",
    )
    at_least(0, {"short_side": config.short_side, "workers": config.workers or 0})
    require((config.workers or 0) <= 256, f"workers={config.workers} must be at most 256 processes")
    require(1 <= config.quality <= 95, f"quality={config.quality} must lie in 1 ... 95")
    require(0 < config.shard_mb <= 8000, f"shard_mb={config.shard_mb:g} must be above 0 and at most 8000")
