"""The configuration of `python -m moco.pack`."""

from dataclasses import dataclass, field

from moco.config.base import CommandConfig, bounded, check_bounds, require
from moco.config.data import DataConfig, check_data_fields


@dataclass
class PackConfig(CommandConfig):
    """Pack a folder of images into tar files (shards), optionally at a smaller size."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="folder"))
    """The images to pack, as for moco.train. A held-out split is packed too. Unreadable images are omitted and listed;
    the command fails if their fraction exceeds data.max_bad."""
    output: str = bounded("", min_length=1, path=True, example="output=/data/images_packed")
    """Directory for the shards and their index. Run the same command again to resume, or to check finished shards."""
    short_side: int = bounded(0, ge=0)
    """Reduce each image whose shorter side exceeds N pixels to a shorter side of N pixels; 0: reduce no image. The file
    of an image that is not reduced is packed unchanged, with two exceptions: images without files of their own (frames
    of videos, CIFAR, STL-10, digits) become PNG files; arrays, and images that are read with other channels than gray
    or RGB or with more than 8 bits (data.channels, data.dtype), become NPY files."""
    quality: int = bounded(90, ge=1, le=95)
    """JPEG quality of the images that are reduced."""
    shard_mb: float = bounded(256.0, gt=0, le=8000)
    """Largest size of a shard in megabytes (1,000,000 bytes); the padding of the tar file can add up to 12 kB. An image
    that is larger than shard_mb has a shard of its own."""
    workers: int | None = bounded(None, ge=0, le=256)
    """Processes that read, check and reduce images; null: the value of data.workers."""


def check_pack(config: PackConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    check_data_fields(config.data)
    weights = f"data.weights={config.data.weights} has no effect on shards, which hold each image once"
    require(not config.data.weights, f"{weights}: remove it, or train on the folders with moco.train instead")
    packed = config.data.name == "webdataset"
    require(not packed, "data.name=webdataset is in shards already: use it with moco.train, or pack the originals")
