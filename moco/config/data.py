"""The schema of a data set: where the pictures are, and what a run does with those that cannot be read."""

from dataclasses import dataclass

from moco.config.base import at_least, one_of, require


@dataclass
class DataConfig:
    """Where the images come from."""

    name: str = "digits"
    """digits, cifar10, cifar100, stl10, imagenet, folder, shards, huggingface or webdataset"""
    root: str = "data"
    """where the data set is, or is downloaded to; for `folder` the pictures themselves; for `shards` what moco.pack
    wrote; for `huggingface` a name on the hub, or a folder; for `webdataset` addresses of tar files, in which
    {000000..000099} counts"""
    download: bool = False
    """fetch CIFAR or STL-10 into root if it is not there"""
    labels: str = "none"
    """for `folder`: none, or folder (the first-level folder names are the classes)"""
    eval_root: str = ""
    """for `folder` with labels: held-out pictures in folders of the same class names"""
    resident: bool = False
    """for `folder`, `shards` and `huggingface`: decode all pictures into memory once (they must have one size)"""
    workers: int = 2
    """loader processes for pictures that are not in memory, on each rank"""
    subset: str = ""
    """for `huggingface`: which configuration of a data set that has several"""
    split: str = "train"
    """for `huggingface`: the split to train on"""
    eval_split: str = ""
    """for `huggingface`: the held-out split; empty: the first of test, validation, valid and val that has labels"""
    image_column: str = ""
    """for `huggingface`: the pictures' column; empty: the only one there is"""
    label_column: str = ""
    """for `huggingface`: the labels' column, or none; empty: the only one with class labels, if any"""
    length: int = 0
    """for `webdataset`: images in an epoch, which a stream cannot know"""
    shuffle_buffer: int = 1000
    """for `webdataset`: so many undecoded pictures each loader process holds and picks the next one from"""
    allow_pipe: bool = False
    """for `webdataset`: let an address that begins with pipe: run its shell command"""
    on_bad_image: str = "raise"
    """what training does at a picture that cannot be read: raise (end with its name), or replace (show another one,
    always the same, and list it in bad_images.csv). The live accuracy is then measured without such pictures"""
    max_bad: float = 0.01
    """with replace: the run ends when more than this fraction of the pictures cannot be read"""


def check_pictures(data: DataConfig) -> None:
    """Refuses what no command can do with pictures.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    one_of("data.on_bad_image", data.on_bad_image, ("raise", "replace"))
    require(
        0 <= data.max_bad < 1,
        f"data.max_bad={data.max_bad} must lie in 0 ... 1, and below 1: it is a fraction, e.g. 0.01",
    )
    at_least(0, {"data.workers": data.workers, "data.length": data.length})
    at_least(1, {"data.shuffle_buffer": data.shuffle_buffer})
    require(data.workers <= 256, f"data.workers={data.workers} must be at most 256 processes")
