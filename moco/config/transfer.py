"""The configuration of `python -m moco.transfer`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from moco.config.base import ResumableConfig, bounded, check_bounds, refuse_on_mps, require
from moco.config.data import SubjectDataConfig
from moco.config.finetune import FinetuneConfig, check_finetune
from moco.config.subject import SubjectConfig, check_subject
from moco.config.types import type_error


@dataclass
class TransferConfig(SubjectConfig):
    """Evaluate encoders on many labeled data sets by linear classification, few-shot episodes or fine-tuning."""

    sets: list[str] = bounded([], min_length=1, unique=True, path=True, example="'sets=[pets,dtd,IMAGES]'")
    """Data sets to evaluate on. An entry is (1) a name from docs/howto/transfer.md, such as pets, cifar10 or voc07, or
    (2) the word data, for the data set of the fields data.*, or (3) the path of a folder, which contains either class
    folders, or train/ and one or both of test/ and val/, with class folders in each."""
    root: str = bounded("data", path=True, min_length=1)
    """The folder that holds the named data sets, or into which they are downloaded, as torchvision lays them out."""
    download: bool = False
    """Download the named data sets that are not in root."""
    encoders: list[str] = bounded([], path=True, min_length=1, unique=True, example="'encoders=[pretrained,untrained]'")
    """Encoders to compare, on the same images and splits: pretrained (the encoder of run or checkpoint), untrained (the
    same network with random weights), or the path of a run, or of a file that `checkpoint` accepts."""
    mode: str = bounded("linear", choices=("linear", "few_shot", "finetune"))
    """linear: logistic regression on frozen features, or a linear SVM per class if images have several labels.
    few_shot: classify test images by the nearest class mean of a few labeled images, in many random episodes. finetune:
    train encoder and classifier end to end on all training images, as moco.finetune does."""
    validation: float = bounded(0.2, gt=0, lt=1)
    """For data without a validation split: the fraction of the training images of each class on which the strength of
    the regularization is chosen. The classifier is then trained on all training images."""
    hold_out: float = bounded(0.2, gt=0, lt=1)
    """For a folder without train/ and test/ (or val/): the fraction of each class that is held out for testing."""
    ways: int = bounded(5, ge=2, le=1000)
    """For few_shot: classes per episode."""
    shots: int = bounded(5, ge=1)
    """For few_shot: labeled images per class."""
    queries: int = bounded(15, ge=1)
    """For few_shot: images per class to classify."""
    episodes: int = bounded(600, ge=2, le=100_000)
    """For few_shot: number of episodes; the mean of their accuracies is reported."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """For finetune: fields of docs/config/finetune.md, such as finetune.lr=0.01. A field without a value in
    configs/transfer.yaml needs a plus, such as +finetune.seeds=3. Two kinds of fields cannot be set here: fields that
    moco.transfer has too (such as seed), and fields for the choice of encoders and images, for saving the training
    state, for logging and for stopping."""


def check_transfer(config: TransferConfig, processes: int = 1) -> None:
    """Raise ConfigError for a configuration that is invalid with this number of processes."""
    check_subject(config)
    refuse_on_mps(config, "this command")
    finetune_config(config, processes)
    error = "data.hold_out has no effect without the entry 'data' in sets: add it, or set hold_out for folders"
    require("data" in config.sets or config.data.hold_out == 0, error)


# Fields of moco.finetune that moco.transfer sets itself.
_SET_BY_TRANSFER = ("encoders", "fraction", "labels_per_class", "subset_list", "validation")


def finetune_config(config: TransferConfig, processes: int = 1) -> FinetuneConfig:
    """Return the configuration of moco.finetune for mode=finetune: all labels, and the fields of `config.finetune`.

    Its data set is a placeholder: the caller passes the images to the training directly.

    Raises:
        ConfigError: for a field that moco.finetune does not have, a field that moco.transfer sets, or an invalid value.
    """
    shared = {each.name for each in fields(SubjectConfig)}
    unused = {each.name for each in fields(ResumableConfig)}
    free = [each.name for each in fields(FinetuneConfig) if each.name not in {*shared, *unused, *_SET_BY_TRANSFER}]
    for name in config.finetune:
        require(name in free, f"finetune.{name} cannot be set: use the fields {', '.join(free)} of moco.finetune")
    types = {each.name: each.type for each in fields(FinetuneConfig)}
    error = type_error("finetune", config.finetune, types, exact=True)
    require(not error, error)
    data = SubjectDataConfig(name="folder", root=config.root, workers=config.data.workers)
    common = {name: getattr(config, name) for name in shared}
    made = FinetuneConfig(**common, encoders=["pretrained"], fraction=1.0, **config.finetune)
    made = replace(made, data=data)
    check_bounds(made, "finetune.")
    check_finetune(made, processes)
    return made
