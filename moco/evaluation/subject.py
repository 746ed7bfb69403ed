"""The subject of an evaluation: an encoder, the preparation of its images, and its labeled data."""

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moco.config import ConfigError, DataConfig, RunWarning, require
from moco.config.base import HUB
from moco.config.data import FOLDERS, check_normalization, is_remote
from moco.config.quoting import override
from moco.config.recommended import crop_advice, resize_for
from moco.config.subject import EncoderConfig, SubjectConfig
from moco.data.duplicates import split_groups
from moco.data.keyed import HOLD_OUT
from moco.data.labels import first_names
from moco.data.opening import classes_without_images, open_sources
from moco.data.pixel_format import RGB
from moco.data.recorded import recorded_data
from moco.data.sources import Source, Sources, refuse_output_inside
from moco.data.unreadable import find_unreadable, reasons_of_all_ranks
from moco.digest import digest
from moco.distributed import is_rank_zero, rank, world_size
from moco.evaluation.features import EvalTransform
from moco.evaluation.seen import count_seen, held_out_seen, log_labels, paths_of, refuse_or_warn, roots, shares_images
from moco.evaluation.subsets import naming_field, split_each_class
from moco.interop.encoder_file import EncoderFile, build, read_encoder
from moco.interop.hub import local_file
from moco.interop.image_size import fit_to_size
from moco.models.encoder import Encoder
from moco.plugins import naming_plugins
from moco.runs import checkpoint
from moco.runs.directory import folder_message, in_run_directory, no_checkpoint_message, no_directory_message
from moco.runtime.console import log, progress_bar
from moco.runtime.next_command import stats_command

# The preparation of images for an encoder whose file states none.
IMAGENET: dict[str, Any] = {"size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Subject:
    """The encoder under evaluation."""

    file: EncoderFile
    output: Path  # the directory of the results
    transform: EvalTransform  # the preparation of its images


def open_subject(config: SubjectConfig) -> Subject:
    """Read the encoder file that the configuration names and choose the preparation of its images.

    Raises:
        ConfigError: for an invalid size, mean or std in `images`; see also `open_encoder`.
        FileNotFoundError, ForeignFileError, CheckpointError: see `read_encoder`.
    """
    file = open_encoder(config)
    overrides = {name: value for name, value in asdict(config.images).items() if value is not None}
    images = IMAGENET | file.images | overrides
    transform = EvalTransform(images["size"], images["resize"], tuple(images["mean"]), tuple(images["std"]))
    dtype = config.data.dtype or file.config.get("data", {}).get("dtype", RGB.dtype)
    whose = f"the {file.channels} channels of {file.source}"
    compute = stats_command(_images_of(config, file.channels, dtype))
    check_normalization("images", transform.mean, transform.std, file.channels, dtype, whose, compute)
    fits = transform.resize == 0 or transform.resize >= transform.size
    fix = f"set images.resize={resize_for(transform.size)} too"
    require(fits, f"images.size={transform.size} exceeds images.resize={transform.resize}: {fix}")
    if advice := crop_advice("images.size", transform.size, "images.resize", transform.resize):
        warnings.warn(advice, RunWarning, stacklevel=2)
    # Before any image is searched for, refuse weights that do not fit this size.
    file = fit_to_size(file, transform.size, "images.size")
    if not file.config:  # of another project
        unused = f"; not used: {', '.join(file.unused)}" if file.unused else ""
        whose = "the values of timm for this network" if file.images else "the values of ImageNet"
        values = " ".join(f"images.{name}={_plain(value)}" for name, value in images.items())
        log(f"{file.source} ({file.layout}: {file.backbone}){unused}; prepared as {values} (defaults: {whose})")
    return Subject(file, output_of(config, file), transform)


def _images_of(config: SubjectConfig, channels: int, dtype: str) -> DataConfig:
    """Return the data fields that the command line sets; a placeholder stands for a folder that it does not name."""
    known = {each.name for each in fields(DataConfig)}
    given = {name: value for name, value in config.data.overrides().items() if name in known}
    images = {"name": "folder", "root": "YOUR_IMAGES"} | given | {"channels": channels, "dtype": dtype}
    return DataConfig(**images)


def open_encoder(config: EncoderConfig) -> EncoderFile:
    """Read the encoder file that the configuration names.

    Raises:
        ConfigError: for a run that does not exist, has no checkpoint or whose newest checkpoint cannot be read, or for
            a folder as the checkpoint.
        FileNotFoundError, ForeignFileError, CheckpointError: see `read_encoder`.
    """
    if config.run:
        run = Path(config.run)
        if not run.is_dir():
            weights = f", or {override('checkpoint', run)}" * run.is_file()
            raise ConfigError(f"{no_directory_message(run)}{weights}")
        found = checkpoint.list_checkpoints(run / "checkpoints")
        if not found:
            raise ConfigError(no_checkpoint_message(run))
        try:
            file = read_encoder(found[0], config.weights)
        except ValueError as error:  # no older one is used silently: a result must state its checkpoint
            older = next((each for each in found[1:] if _is_readable(each, config.weights)), None)
            fix = f": use an older one, {override('checkpoint', older)} in place of run" if older else ""
            raise ConfigError(f"{error}{fix or ', and the run has no readable older one'}") from error
        _refuse_other_network(config, file)
        if not (run / "encoder.safetensors").is_file():  # written at the end of a run
            log(f"{run} is not finished: this is its encoder after step {file.step:,}")
        return file
    path = local_file(config.checkpoint, "checkpoint")
    if path.is_dir():
        raise ConfigError(folder_message(path, "checkpoint"))
    file = read_encoder(path, config.weights, config.backbone, config.options or None)
    _refuse_other_network(config, file)
    return file


def _refuse_other_network(config: EncoderConfig, file: EncoderFile) -> None:
    """Refuse a configured backbone or options that differ from those of the file."""
    same = file.backbone == (config.backbone or file.backbone) and config.options.items() <= file.options.items()
    given = " and ".join(f"{name}={value}" for name in ("backbone", "options") if (value := getattr(config, name)))
    has = f"{file.source} ({file.layout}) has backbone={file.backbone} with options={file.options}"
    require(same, f"{has}: remove {given}")


def _is_readable(file: Path, weights: str) -> bool:
    """Return whether `read_encoder` reads a checkpoint."""
    try:
        read_encoder(file, weights)
    except ValueError:
        return False
    return True


def output_of(config: EncoderConfig, file: EncoderFile) -> Path:
    """Return the directory of the results; see `EncoderConfig.output`."""
    beside = Path(file.source).parent  # each encoder.safetensors of this project has a directory of its own
    by_name = Path("runs") / Path(config.checkpoint).name.split(".")[0]
    own = file.config and file.layout == "safetensors" and not config.checkpoint.startswith(HUB)
    return Path(config.output or config.run or (beside if own else by_name))


def _plain(value: Any) -> str:
    """Return a value as text for an override, without spaces."""
    return str(value).replace(" ", "")


def encoders(subject: Subject, compare: list[str], device: torch.device) -> Iterator[tuple[str, Encoder]]:
    """Yield the encoder ("pretrained") and, if `compare` names it, the same network "untrained", both in eval mode.

    The untrained network has the random initial weights of the run's seed, even if the run started from `init_from`.
    """
    yield "pretrained", build(subject.file).to(device)
    if "untrained" in compare:
        yield "untrained", build(subject.file, subject.file.seed).to(device)


def open_labeled(config: SubjectConfig, subject: Subject) -> tuple[Source, Source]:
    """Open the labeled training split and the held-out split.

    Raises:
        ConfigError: if neither the user nor the encoder file names the data; if the data set has no labels, only one
            class or no held-out split; if the training split lacks a class of the held-out split; or if the encoder was
            trained with the labels of held-out images. See also `moco.data.recorded`.
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """
    sources = open_data(config, subject)
    bank, held_out = sources.bank, sources.held_out
    if sources.train.multi_labels is not None:
        bank = sources.train
    name = data_config(config, subject).name
    if bank is None or (bank.labels is None and bank.multi_labels is None):
        fix = (
            "set data.labels=folder (one folder per class) or data.label_file=FILE"
            if name in FOLDERS
            else "choose a labeled data set"
        )
        raise ConfigError(f"data.name={name} has no labels for the evaluation: {fix}")
    part = config.data.hold_out
    if part > 0:
        problem = f"data.hold_out={part}, but data.name={name} has a held-out split"
        require(held_out is None, f"{problem}: remove data.hold_out")
    if part > 0:
        with naming_field("data.hold_out", part):
            rest, held = split_each_class(targets_of(bank), part, 0, HOLD_OUT, groups_of(bank))
        bank, held_out = bank.subset(rest), bank.subset(held)
        if bank.labels is not None and (lacking := classes_without_images(held_out)):
            log(
                f"data.hold_out={part}: no held-out image of {first_names(lacking)}: each of these classes has only "
                "one image, copies of one image, or frames of one video"
            )
    if held_out is None or (held_out.labels is None and held_out.multi_labels is None):
        other = "data.eval_root=DIR to other images of the same classes, or " if name in FOLDERS else ""
        fix = f"set {other}data.hold_out=0.2 to hold out a fifth of each class"
        raise ConfigError(f"data.name={name} has no held-out split: {fix}")
    _check_seen_images(config, subject, held_out)
    log_labels(subject.file)
    if (rows := readable_rows(config, bank, "training")) is not None:
        bank = bank.subset(rows)
    if (rows := readable_rows(config, held_out, "held-out")) is not None:
        held_out = held_out.subset(rows)
    _check_classes(bank, held_out)
    return bank, held_out


def _check_seen_images(config: SubjectConfig, subject: Subject, held_out: Source) -> None:
    """Refuse held-out images if the encoder was trained with their labels; warn if it saw them without labels."""
    data, hold_out, file = data_config(config, subject), config.data.hold_out, subject.file
    if not held_out_seen(data, hold_out, file, held_out):
        return
    if hold_out:
        which = f"data.hold_out={hold_out} holds out images"
    elif data.label_file:
        which = f"data.label_file={data.label_file}, whose split is not that of the run, holds out images"
    else:
        count = count_seen(paths_of(held_out), file)
        which = f"{count:,} of the {len(held_out):,} held-out images are in the folder of images"
    other = "data.root=DIR data.label_file=FILE" if data.label_file else "data.eval_root=DIR"
    refuse_or_warn(f"{which} that the encoder was trained on", file, f"set {other} to other images")


def readable_rows(config: SubjectConfig, source: Source, split: str) -> NDArray[np.int64] | None:
    """Return the rows of the readable images, and log the unreadable ones. Collective.

    With on_bad_image=skip, every image is decoded once. None means all rows: all images are readable, or
    on_bad_image has another value.

    Raises:
        ConfigError: if no image can be read.
    """
    if config.on_bad_image != "skip":
        return None
    rows = range(rank(), len(source), world_size())
    with progress_bar(f"reading the {split} images") as progress:
        reasons = reasons_of_all_ranks(lambda: find_unreadable(source, rows, progress))
    if not reasons:
        return None
    named = first_names([f"{source.name(i)} ({reason})" for i, reason in reasons.items()])
    counted = f"{len(reasons):,} of the {len(source):,} {split} images cannot be read: {named}"
    require(len(reasons) < len(source), f"on_bad_image=skip: {counted}; repair them, or name other images")
    if is_rank_zero():
        log(f"on_bad_image=skip: {counted}")
    return np.setdiff1d(np.arange(len(source)), np.array(list(reasons), np.int64))


def _check_classes(bank: Source, held_out: Source) -> None:
    """Refuse splits whose classes cannot be evaluated; log the labels that are left out of the mAP."""
    if bank.multi_labels is not None and held_out.multi_labels is not None:
        measured = np.asarray(bank.multi_labels.any(axis=0) & held_out.multi_labels.any(axis=0))
        problem = "no label has an image in both the training and the held-out split"
        require(bool(measured.any()), f"{problem}: name splits with common labels")
        if lacking := [name for name, each in zip(bank.classes, measured, strict=True) if not each]:
            log(f"not in the mAP, because a split has no image of them: {first_names(lacking)}")
        return
    present = set(labels_of(bank).tolist())
    require(len(present) >= 2, "the training split has only one class: name data with two or more")
    lacking = [bank.classes[label] for label in np.unique(labels_of(held_out)) if label not in present]
    problem = f"the held-out split has images of {', '.join(lacking[:5])}, and the training split has none"
    require(not lacking, f"{problem}: add some to the training split, or remove these classes from the held-out split")


def groups_of(source: Source) -> NDArray[np.int64]:
    """Return `split_groups` of a source, with a progress bar. Collective."""
    with progress_bar("comparing images") as progress:
        return split_groups(source, progress)


def labels_of(source: Source) -> NDArray[np.int64]:
    """Return the labels (M,) of a source from `open_labeled`.

    Raises:
        ConfigError: if images have several labels each.
    """
    require(
        source.multi_labels is None,
        "the images can have several labels each, and this command needs one class per image: use moco.knn or "
        "moco.linear, or other labels",
    )
    assert source.labels is not None
    return source.labels


def targets_of(source: Source) -> NDArray[np.int64] | NDArray[np.bool_]:
    """Return the labels (M,) of a source from `open_labeled`; of images with several labels, multi_labels (M, L)."""
    return labels_of(source) if source.multi_labels is None else source.multi_labels


def open_data(config: SubjectConfig, subject: Subject) -> Sources:
    """Open the data set, labeled or not.

    Raises:
        ConfigError: see `data_config`.
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """
    data = data_config(config, subject)
    same = data.channels == subject.file.channels
    encoder = f"{subject.file.source} takes images of {subject.file.channels} channels"
    require(same, f"data.channels={data.channels}, but {encoder}: set data.channels={subject.file.channels}")
    try:
        if config.output:
            refuse_output_inside(data, "output", config.output)
        with naming_plugins(subject.file.source, subject.file.config):
            return open_sources(data, bank_size=0, keep_unreadable=config.on_bad_image == "skip")
    except FileNotFoundError as error:
        of_run = {name: path for name, path in _paths(data).items() if getattr(config.data, name) is None}
        if not of_run:
            raise
        each = " and ".join(f"data.{name}={path}" for name, path in of_run.items())
        stand_ins = {"label_file": "FILE", "more_roots": "[DIR]"}
        fixes = " ".join(f"data.{name}={stand_ins.get(name, 'DIR')}" for name in of_run)
        paths = [each for path in of_run.values() for each in (path if isinstance(path, list) else [path])]
        relative = not all(map(os.path.isabs, paths))
        where = " and relative to the current directory" * relative
        raise FileNotFoundError(f"{error} ({each}, taken from the run{where}: set {fixes})") from error


def data_config(config: SubjectConfig, subject: Subject) -> DataConfig:
    """Return the data set. A field has the value that the user has set, else that of the run or file, else its default.

    Raises:
        ConfigError: if neither the user nor the encoder file names the data, or for data.name=webdataset, which is a
            stream; see also `moco.data.recorded`.
    """
    given, source = config.data.overrides(), subject.file.source
    trusted = bool(config.run) or in_run_directory(Path(source))
    recorded = recorded_data(subject.file.config.get("data", {}), given, source, trusted)
    named = "name" in given or bool(recorded)
    require(named, f"{source} does not name its data: set data=cifar10, data=folder data.root=DIR, ...")
    # For another data set, or another folder, only the recorded fields in `always` apply.
    same = _is_same_data(recorded | given, recorded)
    known = {each.name for each in fields(DataConfig)}
    # These fields are the name of the data set and the format of the images, which the encoder requires.
    always = {"name", "channels", "dtype", "bits", "preview"}
    if given.get("dtype", RGB.dtype) != RGB.dtype:
        known -= {"bits"}
    kept = {name: value for name, value in recorded.items() if name in known and (same or name in always)}
    if given.get("label_file"):  # the label file replaces the labels and the split of the run
        kept = {name: value for name, value in kept.items() if name not in ("labels", "eval_root")}
    elif given.get("labels", "none") != "none":
        kept = {name: value for name, value in kept.items() if name not in ("label_file", "label_separator")}
    return DataConfig(**(kept | given))


def _is_same_data(data: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Return whether two data sets have the same name and the same data.root."""
    return bool(data.get("name") == recorded.get("name") and roots(data)[0] == roots(recorded)[0])


def _paths(data: DataConfig) -> dict[str, Any]:
    names = ("root", "more_roots", "eval_root", "label_file")
    return {name: path for name in names if (path := getattr(data, name))}


def data_with_absolute_paths(config: SubjectConfig, subject: Subject) -> dict[str, Any]:
    """Return `data_config` as a dictionary with absolute paths, valid in every working directory.

    A name on a hub stays as it is.
    """
    data = data_config(config, subject)

    def absolute(path: Any) -> Any:
        if isinstance(path, list):
            return [absolute(each) for each in path]
        return str(Path(path).expanduser().absolute())

    paths = {} if is_remote(data.name, data.root) else _paths(data)
    return asdict(data) | {name: absolute(path) for name, path in paths.items()}


def weights_digest(file: EncoderFile, features: str) -> str:
    """Return the SHA-256 of the weights that compute the features, whatever their order and the format of the file."""
    head = file.head_weights if features == "projection" else {}
    used = file.weights | {f"head.{key}": value for key, value in head.items()}
    kept = {key: used[key] for key in sorted(used) if not key.endswith("num_batches_tracked")}
    return digest(kept | {"backbone": file.backbone, "options": dict(file.options)})


def images_digest(*splits: Source) -> str:
    """Return the SHA-256 of the names, the content and the labels of images, to recognize the splits of an evaluation.

    The content of files is recognized by their sizes and times, see `Source.content_digest`.
    """
    return digest([[each.content_digest(), torch.from_numpy(targets_of(each))] for each in splits])


def is_other_data(config: SubjectConfig, subject: Subject) -> bool:
    """Return whether the data set is known not to be the one on which the encoder was trained."""
    recorded = subject.file.config.get("data", {})
    return bool(recorded) and not shares_images(asdict(data_config(config, subject)), recorded)
