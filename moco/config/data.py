"""The schema of a data set: where its images are, how they are read, and how unreadable images are handled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from moco.config.base import bounded, require

Schema = TypeVar("Schema")
FOLDERS = ("folder", "video")  # data sets of files below data.root; labels come from folder names or data.label_file
# For each field that only some of moco's data sets use, the names of these data sets.
USERS = {
    "frame_interval": ("video",),
    "labels": FOLDERS,
    "eval_root": FOLDERS,
    "more_roots": FOLDERS,
    "weights": FOLDERS,
    "label_file": FOLDERS,
    "subset": ("huggingface",),
    "image_column": ("huggingface",),
    "label_column": ("huggingface",),
    "length": ("webdataset",),
    "shuffle_buffer": ("webdataset",),
    "allow_pipe": ("webdataset",),
}
OF_MOCO = ("digits", "cifar10", "cifar100", "stl10", "imagenet", "shards", "huggingface", "webdataset", *FOLDERS)


@dataclass
class SourceConfig:
    """Which data set to open: the fields of the group `data`, in every command that has this group."""

    name: str = "digits"
    """The data set: digits, cifar10, cifar100, stl10, imagenet, folder, video, shards, huggingface or webdataset
    (webdataset works with moco.train only)."""
    root: str = bounded("data", path=True)
    """The folder that holds the data set, or into which it is downloaded. For `folder`: the folder of images. For
    `video`: the folder of video files. For `shards`: the output of moco.pack. For `huggingface`: a name on the hub, or
    a folder. For `webdataset`: paths or URLs of tar files, in which {000000..000099} expands to 100 numbers."""
    download: bool = False
    """Download CIFAR or STL-10 into root if root does not contain it."""
    frame_interval: float = bounded(1.0, ge=0, le=86_400, example="data.frame_interval=0.5")
    """For `video`: length of an interval in seconds. Each file is divided into intervals of this length, from its first
    frame on, and the first frame of each interval is used as an image. 0: every frame is used."""
    labels: str = bounded("none", choices=("none", "folder"))
    """For `folder` and `video`: none, or folder (the first-level folder names are the classes)."""
    eval_root: str = bounded("", path=True)
    """For `folder` and `video` with labels: a folder of held-out images, with a class folder for each class of root, or
    for some of the classes."""
    more_roots: list[str] = bounded([], path=True, unique=True, example="'data.more_roots=[IMAGES]'")
    """For `folder` and `video`: further folders, used together with root. Image names then begin with the number of
    the folder: 0 for root, 1 for the first of more_roots. With labels=folder each folder has class folders."""
    label_file: str = bounded("", path=True)
    """For `folder` and `video`: a CSV or Parquet file with the columns path (relative to root), label (a text or a
    whole number) and, optionally, split. It must have one row for each image or video file; a row with `unused` as its
    split needs no label, and the image or video of that row is not used. label_file replaces `labels` and
    `eval_root`."""
    label_separator: str = bounded("", example="'data.label_separator=\";\"'")
    """For label_file: the text between the labels of an image that has several, such as ; or |. An image whose label is
    empty then has none of the classes. If label_separator is empty, each image has one label, unless the column `label`
    of a Parquet file has lists."""
    resident: bool = False
    """For `folder`, `imagenet`, `video`, `shards`, `huggingface`: keep all images decoded in memory. All images must
    have the same size."""
    bits: int | None = bounded(None, ge=8, le=16)
    """For images with 16 bits per channel and dtype=uint8: the number of significant bits (with 12, 0 becomes black and
    4095 white). Null: the smallest of 8, 10, 12, 14 and 16 that holds the values of 32 evenly spaced training images;
    for `webdataset` 16."""
    channels: int = bounded(3, ge=1, le=4096)
    """Channels of each image. 3: red, green and blue; 1: gray (with dtype=uint8, color is converted); other numbers:
    the bands of TIFF, NPY and NPZ files, for `folder`, `shards`, `huggingface` and `webdataset`. Except
    with 3, moco.train needs augment.mean and augment.std with one number per channel: moco.check_data stats=true
    computes them."""
    dtype: str = bounded("uint8", choices=("uint8", "uint16", "float32"))
    """Data type of the pixels after a file is read, until they are on the device: uint8 (0 ... 255; gray and color
    files of 16 bits are converted), uint16 (0 ... 65535), or float32 (any range; files of other types are converted
    without scaling). uint8 and uint16 are divided by 255 and 65535 on the device, float32 is not scaled."""
    preview: list[int] = bounded([], ge=0, max_length=3)
    """Channels that galleries, reports and views.png show as red, green and blue, counted from 0, such as [3,2,1]; one
    number: that channel in gray. Empty: the first three channels, or the first one of images with fewer than three
    channels."""
    workers: int | None = bounded(None, ge=0, le=256)
    """Loader processes per training process, for images that are not in memory; 0: load in the main process; null: the
    number of CPU cores divided by the number of training processes on this machine, but at least 1 and at most 16."""
    subset: str = ""
    """For `huggingface`: the name of the subset (the hub's "configuration") of a data set that has several subsets."""
    split: str = "train"
    """For `huggingface` and label_file: the name of the training split."""
    eval_split: str = ""
    """For `huggingface` and label_file: the name of the held-out split; empty: the first of test, validation, valid and
    val that has labels."""
    image_column: str = ""
    """For `huggingface`: the column of images; empty: the only column of images."""
    label_column: str = ""
    """For `huggingface`: the column of labels, or `none` to ignore labels; empty: the only column of class labels, or
    no labels if there is no such column. A label is a text, a whole number, true or false. An image whose label is
    missing, empty, NaN or -1 is unlabeled. A split in which only some images are unlabeled is refused. In a column of
    lists, an image has any number of labels."""


@dataclass
class DataConfig(SourceConfig):
    """The data set that a run reads."""

    length: int = bounded(0, ge=0)
    """For `webdataset`: the number of images per epoch, because a stream has no length."""
    shuffle_buffer: int = bounded(1000, ge=1)
    """For `webdataset`: number of encoded images (such as JPEG) that each loader process holds in memory, to shuffle
    their order."""
    weights: list[float] = bounded([], gt=0, le=100, example="'data.weights=[1,3]'")
    """For `folder` and `video`: how often an epoch draws each image of root and of each of more_roots. With [1,3] an
    epoch draws each image of the second folder three times, with different views each time. With [1,0.5] it draws half
    of the images of the second folder, a new random half in each epoch. Empty: an epoch draws each image once."""
    allow_pipe: bool = False
    """For `webdataset`: allow `root` to be pipe:COMMAND, which runs COMMAND in a shell."""
    on_bad_image: str = bounded("raise", choices=("raise", "replace"))
    """Unreadable training images: raise (the run ends and names the image), or replace (each is replaced by another
    image, the same one in every epoch; bad_images.csv lists the unreadable ones, and the kNN accuracy in training
    leaves them out)."""
    max_bad: float = bounded(0.01, ge=0, lt=1, example="data.max_bad=0.01")
    """For on_bad_image=replace, and for moco.pack: the command ends if more than this fraction of the images is
    unreadable."""


def _inherited_fields_optional(schema: type[Schema]) -> type[Schema]:
    """Let every inherited field of a schema also be null, and make null its default.

    The type checker still sees the types of the parent class.
    """
    for each in fields(schema):  # type: ignore[arg-type] # the parent is a dataclass
        kind: Any = each.type
        schema.__annotations__.setdefault(each.name, kind | None)
        setattr(schema, each.name, field(default=None, metadata=each.metadata))
    return schema


@dataclass
@_inherited_fields_optional
class SubjectDataConfig(SourceConfig):
    """The images that a command uses and, if it needs them, their labels. A null field has the run's value.

    If name or root is set to another value than the run's, the null fields have the defaults of `DataConfig` instead,
    except name, channels, dtype, bits and preview. If the resulting value of bits or workers is null, null has the
    meaning that the field's description gives. A checkpoint outside of a run directory provides no paths: set root
    (except for digits) and, where they are needed, label_file, eval_root and more_roots.
    """

    hold_out: float = bounded(0.0, ge=0, lt=1)
    """For evaluations with labels, on data without a held-out split: the fraction of each class to hold out; 0: refuse
    such data. Copies of an image are all held out or all used for training; the same applies to the frames of a video.
    Data whose labels the encoder was trained with cannot be split in this way. moco.choose, moco.convert, moco.embed,
    moco.report and moco.search refuse this field."""

    def overrides(self) -> dict[str, Any]:
        """Return all fields that are not null, except hold_out."""
        values = {each.name: getattr(self, each.name) for each in fields(SourceConfig)}
        return {name: value for name, value in values.items() if value is not None}


def is_remote(name: str, root: str) -> bool:
    """Return whether data.root names the tar files of `webdataset` (even on this machine) or a data set on a hub."""
    return name == "webdataset" or (name == "huggingface" and not Path(root).expanduser().is_dir())


def refuse_hold_out(data: SubjectDataConfig) -> None:
    """Raise ConfigError if data.hold_out is set, for a command that ignores it."""
    require(data.hold_out == 0, f"data.hold_out={data.hold_out} has no effect in this command: remove it")


def check_normalization(
    group: str, mean: Sequence[float], std: Sequence[float], channels: int, dtype: str, whose: str, compute: str
) -> None:
    """Raise ConfigError if mean or std do not fit the channels and the type of images.

    Args:
        group: the configuration group of mean and std, for the error.
        mean, std: mean and standard deviation of each channel.
        channels: the number of channels.
        dtype: data.dtype of the images.
        whose: where the number of channels comes from, for the error.
        compute: the command that computes mean and std, for the error.
    """
    for name, values in (("mean", mean), ("std", std)):
        field_name = f"{group}.{name}={list(values)}"
        require(
            len(values) == channels,
            f"{field_name} must hold one number for each of {whose}: {compute} computes them",
        )
        scale = "; divide values for 0 ... 255 by 255" if dtype == "uint8" else f"; {compute} computes them"
        require(
            dtype == "float32" or all(0 <= value <= 1 for value in values),
            f"{field_name} must be numbers within 0 ... 1, as pixels are{scale}",
        )


def check_data_fields(data: DataConfig) -> None:
    """Raise ConfigError if fields of a data set contradict each other."""
    require(
        data.bits is None or data.dtype == "uint8",
        f"data.bits={data.bits} converts images to 8 bits, but data.dtype={data.dtype} keeps all bits: "
        "remove data.bits",
    )
    require(
        len(data.preview) in (0, 1, 3) and all(band < data.channels for band in data.preview),
        f"data.preview={data.preview} must be one or three channels in 0 ... {data.channels - 1} (data.channels)",
    )
    error = f"data.label_separator={data.label_separator!r} separates the labels in data.label_file: set both or none"
    require(bool(data.label_file) or not data.label_separator, error)
    if data.name == "digits":
        _check_digits(data)
    if data.name in OF_MOCO:  # a data set of a plug-in can use every field
        default = DataConfig()
        for name, users in USERS.items():
            value = getattr(data, name)
            problem = f"data.{name}={value} works with data.name={' or '.join(users)} only, not with {data.name}"
            require(data.name in users or value == getattr(default, name), f"{problem}: remove it")
    _check_roots(data)
    if data.label_file:
        problem = f"data.label_file={data.label_file!r}"
        require(data.labels == "none", f"{problem} replaces data.labels={data.labels}: set only one of them")
        error = f"{problem} replaces data.eval_root={data.eval_root!r}: leave that empty, and add a column named split"
        require(not data.eval_root, error)


def _check_digits(data: DataConfig) -> None:
    """Raise ConfigError for a folder or labels, which the digits, a part of scikit-learn, would ignore."""
    no_effect = "has no effect with data.name=digits, which is a part of scikit-learn: remove it. For a folder of "
    no_effect += "images, add data=folder, or in moco.train experiment=moco_v2_small"
    require(data.root == DataConfig.root, f"data.root={data.root} {no_effect}")
    require(data.labels == DataConfig.labels, f"data.labels={data.labels} {no_effect}")


def _check_roots(data: DataConfig) -> None:
    """Raise ConfigError if data.more_roots or data.weights do not fit the other fields."""
    folders = 1 + len(data.more_roots)
    for name, values in (("more_roots", data.more_roots), ("weights", data.weights)):
        error = f"data.label_file={data.label_file!r} works with one folder: remove data.{name}={values}"
        require(not (data.label_file and values), error)
    fix = f"set {folders} numbers" if data.more_roots else "set data.more_roots"
    error = f"data.weights={data.weights} must hold one number for data.root and one for each folder of "
    error += f"data.more_roots={data.more_roots}: {fix}"
    require(len(data.weights) in (0, folders), error)
