"""The encoder that a command judges, what it is compared with, and the labeled data it is subject on."""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import ConfigError, DataConfig, RunWarning, require
from moco.config.subject import SubjectConfig
from moco.data.keyed import HOLD_OUT, permutation
from moco.data.opening import open_sources
from moco.data.sources import Source, Sources
from moco.digest import digest
from moco.distributed import is_rank_zero
from moco.evaluation.features import extract, pixels
from moco.interop.encoder_file import EncoderFile, build, read_encoder
from moco.models.encoder import Encoder
from moco.runs import checkpoint

IMAGENET: dict[str, Any] = {"size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class EvalTransform:
    """The one view of a picture that evaluation shows: shorter side to `resize`, central `size`, normalized."""

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Subject:
    """What to judge."""

    file: EncoderFile
    output: Path
    look: EvalTransform

    @property
    def step(self) -> int:
        return self.file.step


def open_subject(config: SubjectConfig) -> Subject:
    """Reads the encoder's file that the configuration names and says how to show it pictures.

    Raises:
        ConfigError: for a run without a checkpoint, or a view that cannot be.
        FileNotFoundError, ForeignFileError, CheckpointError: see `read_encoder`.
    """
    if config.run:
        run = Path(config.run)
        found = checkpoint.list_checkpoints(run / "checkpoints")
        require(run.is_dir(), f"run={config.run} does not exist: name the directory of a run, e.g. run=runs/digits")
        require(bool(found), f"run={config.run} holds no checkpoint: train it first, python -m moco.train run={run}")
        file = _newest_readable(found, config)
    else:
        folder = Path(config.checkpoint).is_dir()
        require(not folder, f"checkpoint={config.checkpoint} is a folder: say run={config.checkpoint}, or name a file")
        file = read_encoder(Path(config.checkpoint), config.weights, config.backbone, config.options or None)
    shown: dict[str, Any] = (
        IMAGENET | file.images | {name: value for name, value in asdict(config.images).items() if value is not None}
    )
    look = EvalTransform(shown["size"], shown["resize"], tuple(shown["mean"]), tuple(shown["std"]))
    require(
        look.resize == 0 or look.resize >= look.size,
        f"images.size={look.size} exceeds images.resize={look.resize}: set both",
    )
    build(file)  # what does not fit is told before any picture is looked for
    beside = Path(config.checkpoint).parent  # every encoder.safetensors of ours has a directory of its own
    by_name = Path("runs") / Path(config.checkpoint).name.split(".")[0]
    own = beside if config.checkpoint and file.config and file.layout == "safetensors" else by_name
    return Subject(file, Path(config.output or config.run or own), look)


def _newest_readable(paths: list[Path], config: SubjectConfig) -> EncoderFile:
    """The run's newest checkpoint; an unreadable one is an error here, for a figure is of one checkpoint."""
    try:
        return read_encoder(paths[0], config.weights)
    except ValueError as error:
        rest = f": take an older one, checkpoint={paths[1]}" if len(paths) > 1 else ""
        raise ConfigError(f"{error}{rest}") from error


def encoders(subject: Subject, compare: list[str], device: torch.device) -> Iterator[tuple[str, Encoder]]:
    """The encoder ("pretrained") and, where asked for, the same network "untrained", in eval mode on the device.

    Untrained is a run's network with its first random weights, also where the run then began with `init_from`.
    """
    seed = subject.file.config.get("seed", 0)  # of the run: its own first weights
    for name in ["pretrained", *(each for each in compare if each == "untrained")]:
        yield name, build(subject.file, None if name == "pretrained" else seed).to(device)


def open_labeled(config: SubjectConfig, subject: Subject) -> tuple[Source, Source]:
    """The labeled training split and the held-out split.

    Raises:
        ConfigError: if the data is not said, has no labels, one class only, no held-out split, or if a held-out class
            has no training picture.
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """
    sources = open_data(config, subject)
    bank, held_out = sources.bank, sources.held_out
    name = data_config(config, subject).name
    require(
        bank is not None and bank.labels is not None,
        f"data.name={name} has no labels to judge by: "
        + ("set data.labels=folder, with one folder a class" if name == "folder" else "choose a labeled data set"),
    )
    assert bank is not None
    assert bank.labels is not None
    if config.data.hold_out > 0:
        require(
            held_out is None,
            f"data.hold_out={config.data.hold_out}, but data.name={name} has a held-out split: leave data.hold_out out",
        )
        _tell_what_was_seen(config, subject)
        bank, held_out = _split(bank, config.data.hold_out)
    require(
        held_out is not None and held_out.labels is not None,
        f"data.name={name} has no held-out split: set data.eval_root=DIR to other pictures of the same classes, or "
        "data.hold_out=0.2 to hold out a fifth of each class",
    )
    assert held_out is not None
    assert bank.labels is not None
    assert held_out.labels is not None
    present = set(np.unique(bank.labels).tolist())
    require(len(present) >= 2, "the training split has one class only: two are needed to tell apart")
    lacking = [bank.classes[label] for label in np.unique(held_out.labels) if label not in present]
    require(not lacking, f"the training split has no picture of {', '.join(lacking[:5])}, which the held-out split has")
    return bank, held_out


def open_data(config: SubjectConfig, subject: Subject) -> Sources:
    """The data set, labeled or not.

    Raises:
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """
    data = data_config(config, subject)
    try:
        return open_sources(data, bank_size=0)
    except FileNotFoundError as error:
        said = {name: path for name, path in _paths(data).items() if getattr(config.data, name) is None}
        if not said:
            raise
        each = " and ".join(f"data.{name}={path}" for name, path in said.items())
        fixes = " ".join(f"data.{name}=DIR" for name in said)
        why = ", which was trained in another working directory" * (not all(map(os.path.isabs, said.values())))
        raise FileNotFoundError(f"{error} ({each} is what the run says{why}: set {fixes})") from error


def data_config(config: SubjectConfig, subject: Subject) -> DataConfig:
    """The run's data with what the configuration says otherwise; of another data set the defaults."""
    told = config.data.overrides()
    of_run = subject.file.config.get("data", {})
    require(
        "name" in told or bool(of_run),
        f"{subject.file.source} does not say its data: choose data=cifar10, data=folder data.root=DIR ... yourself",
    )
    # Another data set, or other pictures in a folder: nothing else of the run's data fits.
    same = told.get("name", of_run.get("name")) == of_run.get("name") and told.get("root", of_run.get("root")) == (
        of_run.get("root")
    )
    known = {each.name for each in fields(DataConfig)}
    kept = {name: value for name, value in of_run.items() if name in known and (same or name == "name")}
    return DataConfig(**(kept | told))


def _paths(data: DataConfig) -> dict[str, str]:
    """The paths that the configuration of a data set holds, by field."""
    return {name: path for name, path in (("root", data.root), ("eval_root", data.eval_root)) if path}


def data_written(config: SubjectConfig, subject: Subject) -> dict[str, Any]:
    """`data_config` as it goes into a file, whose paths hold in every working directory."""
    data = data_config(config, subject)
    return asdict(data) | {name: str(Path(path).expanduser().absolute()) for name, path in _paths(data).items()}


def about(
    subject: Subject, config: SubjectConfig, train: Source, held_out: Source, features: str = "backbone"
) -> dict[str, Any]:
    """What a figure is of, for its entry in results.json: encoder, weights, data, splits, view.

    Args:
        subject, config: what was subject.
        train, held_out: the splits.
        features: backbone or projection: whose weights "sha256" is of.
    """
    file = subject.file
    return {
        "source": str(Path(file.source).expanduser().absolute()),
        "layout": file.layout,
        "weights": config.weights,
        "backbone": file.backbone,
        "options": dict(file.options),
        "step": file.step,
        "sha256": weights_digest(file, features),
        "data": data_written(config, subject)
        | {
            "hold_out": config.data.hold_out,
            "held_out_seen": config.data.hold_out > 0 and _trained_on_it(config, subject),  # without its labels
            "training": len(train),
            "held_out": len(held_out),
            "classes": list(train.classes),
        },
        "look": {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(subject.look).items()
        },
    }


def weights_digest(file: EncoderFile, features: str) -> str:
    """Of the weights that the features come from, in whatever file and order they lie."""
    used = dict(file.weights) | {f"head.{key}": value for key, value in file.head_weights.items()}
    kept = sorted(key for key in used if features == "projection" or key in file.weights)
    kept = [key for key in kept if not key.endswith("num_batches_tracked")]
    return digest({key: used[key] for key in kept} | {"backbone": file.backbone, "options": dict(file.options)})


def _trained_on_it(config: SubjectConfig, subject: Subject) -> bool:
    """Whether the run's training pictures are those that are subject on: data.hold_out then parts what was seen."""
    of_run, data = subject.file.config.get("data", {}), data_config(config, subject)
    same_root = Path(of_run.get("root", "")).expanduser().resolve() == Path(data.root).expanduser().resolve()
    return bool(of_run.get("name") == data.name and same_root)


def _tell_what_was_seen(config: SubjectConfig, subject: Subject) -> None:
    if not _trained_on_it(config, subject):
        return
    held = f"data.hold_out={config.data.hold_out} holds out pictures that the encoder was trained on"
    if subject.file.config.get("method", {}).get("labels", False):
        raise ConfigError(f"{held}, and these labels trained it: give data.eval_root=DIR, other pictures")
    if is_rank_zero():
        warnings.warn(
            f"{held}, without their labels: data.eval_root=DIR, other pictures, tells more", RunWarning, stacklevel=2
        )


def _split(source: Source, part: float) -> tuple[Source, Source]:
    """A labeled source without and with that part of each class, at least one picture of it: always the same ones."""
    assert source.labels is not None
    order = permutation(0, 0, len(source), HOLD_OUT)
    held = []
    for label in np.unique(source.labels):
        of_class = order[source.labels[order] == label]
        require(len(of_class) >= 2, f"data.hold_out={part}: class {source.classes[label]} has one picture only")
        held.append(of_class[: min(len(of_class) - 1, max(1, round(part * len(of_class))))])
    rows = np.sort(np.concatenate(held))
    return source.subset(np.setdiff1d(order, rows)), source.subset(rows)


def features_of(
    network: nn.Module | Callable[[Tensor], Tensor],
    source: Source,
    subject: Subject,
    config: SubjectConfig,
    device: torch.device,
) -> Tensor:
    """Features (M, D) of a source in its order, on every rank; of raw pixels where the network is `pixels`."""
    look = subject.look
    raw = network is pixels
    return extract(
        network,
        source,
        look.size,
        look.resize,
        (0.0,) * 3 if raw else look.mean,
        (1.0,) * 3 if raw else look.std,
        device,
        config.images_at_once,
        data_config(config, subject).workers,
    )
