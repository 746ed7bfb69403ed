"""The configuration of `python -m moco.transfer`."""

from dataclasses import dataclass

from moco.config.base import bounded, require
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class TransferConfig(SubjectConfig):
    """Evaluate encoders on many labeled data sets by one protocol: logistic regression or few-shot episodes."""

    sets: list[str] = bounded([], min_length=1, unique=True, path=True, example="'sets=[pets,dtd,IMAGES]'")
    """Data sets: a name of docs/howto/transfer.md, such as pets, cifar10 or voc07; the path of a folder with class
    folders, or with train/, test/ and perhaps val/, each with class folders; or data, the data set of data.*."""
    root: str = bounded("data", path=True, min_length=1)
    """The folder that holds the named data sets, or into which they are downloaded, as torchvision lays them out."""
    download: bool = False
    """Download the named data sets that are not in root."""
    encoders: list[str] = bounded([], path=True, min_length=1, unique=True, example="'encoders=[pretrained,untrained]'")
    """Encoders to compare, on the same images and splits: pretrained (that of run or checkpoint), untrained (the same
    network with initial weights), and others, each by the path of a run or of a file that `checkpoint` accepts."""
    mode: str = bounded("linear", choices=("linear", "few_shot"))
    """linear: logistic regression on frozen features, or a linear SVM per class if images have several labels.
    few_shot: classify test images by the nearest class mean of a few labeled ones, in many random episodes."""
    validation: float = bounded(0.2, gt=0, lt=1)
    """For data without a validation split: the fraction of the training images of each class on which the strength of
    the regularization is chosen. The classifier is then trained on all training images."""
    hold_out: float = bounded(0.2, gt=0, lt=1)
    """For a folder without test/: the fraction of each class that is held out for testing."""
    ways: int = bounded(5, ge=2, le=1000)
    """For few_shot: classes per episode."""
    shots: int = bounded(5, ge=1)
    """For few_shot: labeled images per class."""
    queries: int = bounded(15, ge=1)
    """For few_shot: images per class to classify."""
    episodes: int = bounded(600, ge=2, le=100_000)
    """For few_shot: episodes, whose mean accuracy is reported."""


def check_transfer(config: TransferConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_subject(config)
    error = "data.hold_out has an effect only on the data set data: add it to sets, or set hold_out for folders"
    require("data" in config.sets or config.data.hold_out == 0, error)
