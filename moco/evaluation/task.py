"""The common parts of the evaluation commands: the opened task, an encoder's result, results.json and the table."""

import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from moco.config import ConfigError, DataConfig, ResumableConfig, RunWarning, config_dir, require
from moco.config.subject import EncoderConfig, SubjectConfig
from moco.data.duplicates import copies_message, count_copies
from moco.data.opening import with_tuples
from moco.data.sources import Source
from moco.data.video import video_of
from moco.data.view import View
from moco.distributed import is_rank_zero, on_rank_zero, world_size
from moco.evaluation.average_precision import AveragePrecision
from moco.evaluation.features import EvalTransform, Inference, Network, extract, pixels
from moco.evaluation.metrics import mean_interval, mean_known
from moco.evaluation.seen import held_out_seen
from moco.evaluation.steps import LogStep
from moco.evaluation.subject import (
    Subject,
    data_config,
    data_with_absolute_paths,
    groups_of,
    images_digest,
    open_labeled,
    open_subject,
    weights_digest,
)
from moco.interop.encoder_file import EncoderFile
from moco.runs import results
from moco.runs.comparison import BASELINES
from moco.runtime.console import duration, log, log_next, percent, progress_bar, table
from moco.runtime.device import compute_context
from moco.runtime.next_command import changed_fields, command
from moco.runtime.precision import PRECISIONS

Config = TypeVar("Config", bound=SubjectConfig)


@dataclass(frozen=True, eq=False)
class Task(Generic[Config]):
    """The common state of all encoders and repeats of one evaluation."""

    config: Config
    subject: Subject
    train: Source
    held_out: Source
    device: torch.device

    @cached_property
    def data(self) -> DataConfig:
        return data_config(self.config, self.subject)

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """For each training image, the index of the first image of its group, (M,); see `split_groups`. Collective."""
        return groups_of(self.train)

    @cached_property
    def copies(self) -> int:
        """The number of held-out images with the same content as a training image. Collective."""
        return count_copies(self.train, self.held_out)

    @property
    def inference(self) -> Inference:
        """How this command computes features."""
        return Inference(self.device, self.config.images_at_once, self.data.workers, PRECISIONS[self.config.precision])

    def features(
        self, network: Network, source: Source, description: str = "", heartbeat: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Compute the features (M, D) of the M images of a source, in its order, on every rank.

        The network `pixels` gets images that are not normalized. With a description, a progress bar is shown, and
        non-finite features raise ConfigError; see `monitored`. `heartbeat` is called before each batch.
        """
        transform = self.subject.transform.unnormalized() if network is pixels else self.subject.transform
        with monitored(network, len(source), description) if description else nullcontext(network) as forward:
            return extract(forward, source, transform, self.inference, heartbeat)


@contextmanager
def open_task(config: Config) -> Iterator[Task[Config]]:
    """Set up device, threads and process group, open the encoder and its labeled data, and yield them as a task.

    Raises:
        ConfigError, FileNotFoundError, ValueError: for an invalid configuration, or an unsuitable encoder or data set;
            see `open_subject` and `open_labeled`.
    """
    with compute_context(config) as device:
        subject = open_subject(config)
        task = Task(config, subject, *open_labeled(config, subject), device)
        if task.copies and is_rank_zero():
            warnings.warn(copies_message(task.copies, len(task.held_out)), RunWarning, stacklevel=2)
        yield task


def training_view(
    transform: EvalTransform, field: str, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> View:
    """Return the recipe for the views of labeled training images. Its size, mean and std are those of the evaluation.

    Args:
        transform: the preparation of the images in the evaluation.
        field: the configuration's field that defines the view, for errors: "view" or "augment".
        given: the value of that field.
        defaults: the values of fields that `given` lacks.

    Raises:
        ConfigError: for an unknown field of the view, or an invalid value.
    """
    fixed = {name: getattr(transform, name) for name in ("size", "mean", "std")}
    free = sorted({each.name for each in fields(View)} - fixed.keys())
    for name in given:
        require(name not in fixed, f"{field}.{name} must equal that of the evaluation: set images.{name} instead")
        require(name in free, f"{field}.{name} is not a field of a view: use one of {', '.join(free)}")
    try:
        return View(**with_tuples({**(defaults or {}), **given, **fixed}))
    except ConfigError:  # about steps of plug-ins
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{field}.{error}") from error


@contextmanager
def progress_log(description: str, total: int) -> Iterator[LogStep]:
    """Yield a function to call after each of `total` steps or epochs; its argument is a function that returns a line.

    The yielded function advances a progress bar. It logs the first line, the last line and, between them, a line
    whenever 30 seconds have passed, each with the time left. It calls its argument only to log, because the argument
    may have to wait for the device. For a step that an earlier command has finished, pass None: it is not logged.
    """
    start = last = time.monotonic()
    done = taken = 0
    with progress_bar(description) as bar:

        def on_step(line: Callable[[], str] | None) -> None:
            nonlocal last, done, taken
            done += 1
            taken += line is not None
            bar(done, total)
            if line is not None and (taken == 1 or done == total or time.monotonic() - last > 30):
                last = time.monotonic()
                left = duration((last - start) / taken * (total - done))
                log(f"{description} {done}/{total} · {line()} · left {left}")

        yield on_step


@contextmanager
def monitored(network: Network, count: int, description: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function that calls the network and advances a progress bar over this rank's share of `count` images.

    The network must be in eval mode. The function raises ConfigError if a feature is not finite.
    """
    done, share = 0, -(-count // world_size())
    with progress_bar(description) as progress:

        def forward(images: Tensor) -> Tensor:
            nonlocal done
            features: Tensor = network(images)
            if not features.isfinite().all():
                raise ConfigError(
                    f"{description}: the features hold NaN or infinity: training diverged, use an older checkpoint=FILE"
                )
            done = min(share, done + len(images))
            progress(done, share)
            return features

        yield forward


@dataclass(frozen=True, eq=False)
class Result:
    """The metrics of one encoder."""

    encoder: str  # pretrained, untrained or pixels
    metrics: list[Any]  # one per seed or draw of labels: `Metrics`, or `AveragePrecision` of images with several labels
    details: dict[str, Any]  # the command's own keys of the results.json entry; "figures" among them

    @property
    def several_labels(self) -> bool:
        """Whether an image can have several labels. Then the metrics are average precisions."""
        return isinstance(self.metrics[0], AveragePrecision)

    @property
    def top1(self) -> float:
        return mean_interval([each.top1 for each in self.metrics])[0]

    @property
    def top5(self) -> float | None:
        return mean_known([each.top5 for each in self.metrics])

    def accuracy(self) -> str:
        """Format top1 for a table, with a 95 % interval: Student's over several seeds, or Wilson's for one seed."""
        return percent(*mean_interval([each.top1 for each in self.metrics]), self.metrics[0].interval())

    def cells(self) -> dict[str, str]:
        """Return the cells of this result's row in a table, by the titles of the columns."""
        if self.several_labels:
            return {"mAP %": percent(*mean_interval([each.mean for each in self.metrics]))}
        return {"top-1 %": self.accuracy(), "top-5 %": percent(self.top5)}


def summarize_seeds(metrics: Sequence[Any]) -> dict[str, Any]:
    """Return the means of `Result.metrics` over seeds and half the width of their 95 % interval, for results.json."""
    if isinstance(metrics[0], AveragePrecision):
        mean, half = mean_interval([each.mean for each in metrics])
        per_class = [mean_known(each) for each in zip(*(each.per_class for each in metrics), strict=True)]
        return {"mAP": mean, "mAP_half_width95": half, "per_class_ap": per_class}
    mean, half = mean_interval([each.top1 for each in metrics])
    return {"top1": mean, "top1_half_width95": half, "top5": mean_known([each.top5 for each in metrics])}


def frames_note(source: Source) -> str:
    """Return a note for a caption if the images are frames of videos: why the intervals are too narrow. Else ""."""
    narrow = "; frames of one video resemble each other, so the true interval is wider"
    return narrow * bool(len(source) and video_of(source.name(0)))


def interval_note(seeds: int, single: str = "with Wilson's 95 % interval") -> str:
    """Return the meaning of the interval of a result over several seeds; for one seed, return `single`."""
    few = "; with fewer than 3 seeds the interval means little: set seeds=3 or more" * (seeds < 3)
    student = f"mean of {seeds} seeds ± half of Student's 95 % interval{few}"
    return student if seeds > 1 else single


def own_settings(config: ResumableConfig) -> dict[str, Any]:
    """Return the fields of a command that it does not share with other commands, and the precision."""
    shared = {each.name for base in (SubjectConfig, ResumableConfig) for each in fields(base)} - {"precision"}
    return {name: value for name, value in asdict(config).items() if name not in shared}


def changed_settings(config: EncoderConfig, file: str, names: Iterable[str]) -> dict[str, Any]:
    """Return the values of the fields in `names` that differ from configs/FILE.yaml, by dotted names, as overrides."""
    values = asdict(config)
    usual = merged(asdict(type(config)()), yaml_fields(file))
    return dict(changed_fields({name: value for name, value in values.items() if name in names}, usual))


def log_next_training(config: EncoderConfig, name: str, seeds: int, output: Path) -> None:
    """Print the command to run after moco.NAME: the same command with three seeds if it had fewer, else TensorBoard."""
    if seeds < 3:
        shared = {each.name for each in fields(EncoderConfig)}
        changed = changed_settings(config, name, asdict(config).keys() - shared)
        three = command(f"moco.{name}", config, **changed | {"seeds": 3})
        log_next(three, "three seeds, for intervals; finished ones are kept")
    else:
        log_next(shlex.join(["tensorboard", "--logdir", str(output)]), "losses of the trainings")


def changed_images(config: SubjectConfig) -> dict[str, Any]:
    """Return the fields of `images` that are set, as overrides. Other fields come from the encoder's run or file."""
    return {f"images.{name}": value for name, value in asdict(config.images).items() if value is not None}


def yaml_fields(file: str) -> dict[str, Any]:
    """Return the fields of configs/FILE.yaml, and of the files in the same folder that its defaults list names.

    Return {} if there is no such file.
    """
    path = Path(config_dir(), f"{file}.yaml")
    if not path.is_file():
        return {}
    own: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    folder = file.rpartition("/")[0]
    names = [each for each in own.pop("defaults", []) if isinstance(each, str) and each != "_self_"]
    return reduce(merged, [*(yaml_fields(f"{folder}/{each}") for each in names), own], {})


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested fields in which those of `own` replace those of `base`."""
    both = {
        name: merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in own.items()
    }
    return {**base, **both}


def record_results(
    task: Task[Any],
    command: str,
    protocol: str,
    found: Sequence[Result],
    features: str = "backbone",
    seed: int | None = None,
) -> Path:
    """Add one entry per encoder to results.json on rank 0 and return its path; every rank must call it.

    `seed` is the seed of the initial weights of the encoder "untrained"; None: the seed of the encoder's run.
    """
    shared = {"command": command, "protocol": protocol} | describe(task, features)
    images, seed = changed_images(task.config), task.subject.file.seed if seed is None else seed
    entries = [
        shared
        | describe_start(task.config, each.encoder, seed)
        | each.details
        | {"changed": each.details.get("changed", {}) | images}
        for each in found
    ]
    return on_rank_zero(lambda: results.record(task.subject.output, entries, task.subject.file.step))


def describe_encoder(file: EncoderFile, features: str = "backbone") -> dict[str, Any]:
    """Return the keys of a results.json entry that identify the encoder.

    `features` is "backbone" or "projection". "sha256" covers the weights that compute these features.
    """
    source = str(Path(file.source).expanduser().absolute())
    known = {name: getattr(file, name) for name in ("layout", "backbone", "options", "channels", "step")}
    known |= {"source": source, "sha256": weights_digest(file, features)}
    known |= {"trained_with_labels": True} if file.used_labels else {}
    if features == "projection":
        known["backbone_sha256"] = weights_digest(file, "backbone")
        # The weights of an untrained network are not in the file: the shapes identify its head.
        known["projection"] = [list(each.shape) for each in file.head_weights.values()]
    return known


def describe_start(config: EncoderConfig, encoder: str, seed: int) -> dict[str, Any]:
    """Return the keys of a results.json entry that state with which weights an evaluation starts.

    `encoder` is "pretrained", "untrained", "pixels" or the path of another encoder. `seed` is the seed of the initial
    weights of the encoder "untrained".
    """
    own = encoder in ("pretrained", *BASELINES)
    known = {"encoder": encoder, "weights": config.weights if own else EncoderConfig.weights}
    return known | ({"initial_seed": seed} if encoder == "untrained" else {})


def describe(task: Task[Any], features: str) -> dict[str, Any]:
    """Return the part of a results.json entry on the encoder, the data and the preparation of images. Collective."""
    subject, config = task.subject, task.config
    data = data_with_absolute_paths(config, subject) | {
        "training": len(task.train),
        "held_out": len(task.held_out),
        "classes": list(task.train.classes),
        "sha256": on_rank_zero(lambda: images_digest(task.train, task.held_out)),
        "hold_out": config.data.hold_out,
        # If true, the encoder can have seen held-out images, but without labels: `open_labeled` refuses the other case.
        "held_out_seen": held_out_seen(task.data, config.data.hold_out, subject.file, task.held_out),
        "held_out_in_training": task.copies,
    }
    return describe_encoder(subject.file, features) | {"data": data, "look": asdict(subject.transform)}


def count_shared(training: Sequence[str], held_out: Sequence[str]) -> int:
    """Return how many of the held-out image files are training images, too; warn if the number is not 0."""
    known = set(map(os.path.realpath, training))
    count = sum(os.path.realpath(path) in known for path in held_out)
    if count and is_rank_zero():
        problem = f"{count:,} of the {len(held_out):,} held-out images are training images, too"
        fix = "the results are not those of unseen images; remove these images from one of the two sets"
        warnings.warn(f"{problem}: {fix}", RunWarning, stacklevel=2)
    return count


def show_results(title: str, found: Sequence[Result], extra: Mapping[str, Sequence[str]], caption: str) -> None:
    """Print the closing table: encoder, the columns of the results, and a column for each item of `extra`."""
    added = zip(*extra.values(), strict=True)
    rows = [[each.encoder, *each.cells().values(), *more] for each, more in zip(found, added, strict=True)]
    baselines = found[0].metrics[0].baselines(found[0].encoder)
    table(title, ["encoder", *found[0].cells(), *extra], rows, f"{caption}\n{baselines}")
