"""`python -m moco.segment`: train a segmentation network on each encoder with each seed, evaluate, save."""

import warnings
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import OptimConfig, RunWarning, require
from moco.config.segment import SegmentConfig
from moco.data.labels import first_names
from moco.data.plan import Plan
from moco.data.walk import size_and_time
from moco.digest import digest
from moco.distributed import broadcast_module, is_rank_zero, on_rank_zero, wrap_ddp
from moco.evaluation.encoders import folder_name, normalization, open_encoders
from moco.evaluation.finetuning import build_finetune_optimizer, plan_of
from moco.evaluation.metrics import mean_interval
from moco.evaluation.resumable import ResumableTraining, Supervision, supervised, train_resumably
from moco.evaluation.seen import warn_of_seen
from moco.evaluation.steps import LogStep, Schedule
from moco.evaluation.subject import open_encoder, output_of, weights_digest
from moco.evaluation.task import (
    changed_settings,
    count_shared,
    describe_encoder,
    describe_start,
    interval_note,
    log_next_training,
    own_settings,
    progress_log,
)
from moco.interop.encoder_file import EncoderFile
from moco.runs.results import prepare, record
from moco.runtime.console import log, percent, progress_bar, table
from moco.runtime.precision import PRECISIONS
from moco.runtime.preemption import PreemptionHandler
from moco.segmentation.crop import CropSettings
from moco.segmentation.masks import IGNORED, MaskedImages, count_classes, open_masked
from moco.segmentation.measure import Overlap
from moco.segmentation.network import SegmentationNetwork, build_network, with_output_stride
from moco.segmentation.predictions import write_predictions
from moco.segmentation.saved import Segmenter, save_segmenter
from moco.segmentation.training import TrainSettings, evaluate, predict, train

# Fields not listed under "changed" in results.json: "protocol" states them, or they do not affect the result of a seed.
_NOT_LISTED = {"encoders", "seeds", "steps", "head", "frozen"}
SHOWN = 6  # held-out images in predictions.png


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What all encoders and seeds share: the configuration, the encoder files and the images."""

    config: SegmentConfig
    own: EncoderFile  # the encoder that the field run or checkpoint names
    given: dict[str, EncoderFile]  # the file of each entry of the field `encoders`
    output: Path
    train: MaskedImages
    held_out: MaskedImages
    pixels: list[list[int]]  # number of pixels of each class, for each split
    shared: int  # number of held-out images that are training images, too
    seen: bool  # whether an encoder was trained on held-out images
    supervision: Supervision

    @cached_property
    def files(self) -> dict[str, EncoderFile]:
        """The encoders with `output_stride`, which leaves their weights as they are."""
        return {name: with_output_stride(file, self.config.output_stride) for name, file in self.given.items()}

    def plan(self, seed: int) -> Plan:
        return plan_of(len(self.train), self.config.batch_size, 1, self.config.steps, seed)

    def training(self, name: str) -> TrainSettings:
        """Return the settings for an encoder, whose file may state mean and standard deviation of the pixels."""
        config = self.config
        crops = CropSettings(
            config.crop, config.scale, config.flip_p, *normalization(self.files[name], config.mean, config.std)
        )
        schedule = Schedule(config.lr, config.steps, config.schedule, config.warmup)
        return TrainSettings(crops, schedule, PRECISIONS[config.precision], config.masks.workers)


@dataclass(frozen=True)
class Segmented:
    """The results of one encoder."""

    encoder: str  # the entry of `encoders`
    overlaps: list[Overlap]  # one per seed
    saved: Path

    @property
    def mean(self) -> tuple[float, float | None]:
        """The mean mIoU over seeds, and half of Student's 95 % interval, which is None for a single seed."""
        return mean_interval([each.mean for each in self.overlaps])


def evaluate_segment(config: SegmentConfig, preemption: PreemptionHandler | None = None) -> list[Segmented]:
    """Train and evaluate a network on each configured encoder with each seed; the same result on every rank.

    If `preemption` is None, this function itself catches the signals that stop a run.

    Raises:
        ConfigError, ImageError, FileNotFoundError, ValueError: for an unsuitable encoder or data set.
        NonFiniteLoss: if the training diverges.
        Preempted: if a signal or `config.stop_after` stopped the training before its end.
    """
    with supervised(config, preemption) as supervision:
        run = _set_up(config, supervision)
        prepare(run.output)
        with progress_log("step", len(config.encoders) * config.seeds * config.steps) as on_step:
            found = [_segment(run, name, on_step) for name in config.encoders]
        data = _data(run)
        entries = [_entry(run, each, data) for each in found]
        _show(run, found)  # before writing: the results stay visible if writing fails
        path = on_rank_zero(lambda: record(run.output, entries, run.own.step))
        log(f"written: {path}")
        for each in found:
            log(f"saved: {each.saved}/network.safetensors and predictions.png (of the last seed)")
        log_next_training(config, "segment", config.seeds, run.output)
    return found


def _set_up(config: SegmentConfig, supervision: Supervision) -> Segmentation:
    """Open the encoders and the images, and read all masks."""
    with supervision.watchdog.paused():  # a file may be downloaded
        own = open_encoder(config)
        files = open_encoders(own, config.encoders, "moco.segment")
    for file in files.values():  # refuse an encoder that does not support output_stride, before the images are read
        with_output_stride(file, config.output_stride)
    train_split, held_out = open_masked(config.masks)
    require(
        len(train_split) >= config.batch_size,
        f"batch_size={config.batch_size} exceeds the {len(train_split)} images of the training split: lower it",
    )
    arguments = config.masks.workers, supervision.heartbeat
    counts = on_rank_zero(lambda: [count_classes(each, *arguments) for each in (train_split, held_out)])
    train_split, held_out = _with_classes(train_split, held_out, counts, config.masks.ignore)
    for name, file in files.items():
        log(f"{name}: {file.source}: {file.backbone} ({file.layout}{file.trained})")
    log(f"{len(train_split):,} images for training, {len(held_out):,} held out, {len(train_split.classes)} classes")
    pixels = [each.tolist() for each in counts]
    paths = [[image for image, _ in split.pairs] for split in (train_split, held_out)]
    shared, seen = count_shared(*paths), warn_of_seen(paths[1], files.values())
    output = output_of(config, own)
    return Segmentation(config, own, files, output, train_split, held_out, pixels, shared, seen, supervision)


def _with_classes(
    train_split: MaskedImages, held_out: MaskedImages, counts: list[Any], ignore: int
) -> tuple[MaskedImages, MaskedImages]:
    """Name the classes by their numbers if the configuration has no names; log classes without training pixels."""
    pixels = np.stack(counts)[:, :IGNORED]  # (2, 255)
    ignored = int(np.stack(counts)[:, IGNORED].sum())
    for name, each in zip(("training", "held-out"), pixels, strict=True):
        require(bool(each.any()), f"no mask of the {name} split has a pixel with a class: correct the masks")
    highest = int(np.flatnonzero(pixels.sum(axis=0))[-1])
    classes = train_split.classes or tuple(map(str, range(highest + 1)))
    occurring = np.flatnonzero(pixels.sum(axis=0))
    without = f", and {ignored:,} pixels without a class (masks.ignore={ignore})" if ignored else ""
    error = f"the masks have pixels of one class only ({classes[occurring[0]]}){without}"
    require(len(occurring) > 1, f"{error}: segmentation needs two, numbered 0, 1, ...")
    unused = [str(number) for number in range(len(classes)) if number not in occurring and number != ignore]
    if unused and not train_split.classes and is_rank_zero():
        fix = f"correct the masks with the value {highest}, or name the classes, masks.classes=[...]"
        problem = f"the masks have values up to {highest}, but no pixel has the value {first_names(unused)}"
        warnings.warn(f"{problem}: {fix}", RunWarning, stacklevel=2)
    lacking = [name for name, (trained, tested) in zip(classes, pixels.T, strict=False) if tested and not trained]
    if lacking:
        log(f"classes without a pixel in the training masks, which the network cannot learn: {first_names(lacking)}")
    return replace(train_split, classes=classes), replace(held_out, classes=classes)


def _segment(run: Segmentation, name: str, on_step: LogStep) -> Segmented:
    """Train and evaluate one encoder with all seeds; save the network of the last seed and predictions.png."""
    overlaps, config, settings = [], run.config, run.training(name)
    for seed in range(config.seed, config.seed + config.seeds):
        training = _training(run, name, seed)
        network = _train(run, training, on_step)
        with progress_bar("evaluating", run.supervision.heartbeat) as progress:
            overlaps.append(evaluate(network, run.held_out, settings.crops, config.masks.workers, progress))
        log(f"{name}, seed {seed}: mIoU {percent(overlaps[-1].mean)} %")
    on_rank_zero(lambda: _save(run, name, network, training.folder))
    return Segmented(name, overlaps, training.folder)


def _training(run: Segmentation, name: str, seed: int) -> ResumableTraining:
    config, identity = run.config, digest(_identity(run, name, seed))
    protocol = f"{config.head}{'_frozen' * config.frozen}_{config.steps}steps"
    folder = run.output / "segment" / f"{folder_name(name)}_{protocol}"
    return ResumableTraining(folder, name, seed, identity, config.steps, config.batch_size)


def _train(run: Segmentation, training: ResumableTraining, on_step: LogStep) -> SegmentationNetwork:
    config, classes, device = run.config, len(run.train.classes), run.supervision.device
    name, seed, untrained = training.encoder, training.seed, training.encoder == "untrained"
    plan = run.plan(seed)
    network = build_network(
        run.files[name], config.head, classes, seed=seed, untrained=untrained, frozen=config.frozen, bn=config.bn
    ).to(device)
    broadcast_module(network)
    optim = OptimConfig(name="sgd", momentum=config.momentum, weight_decay=config.weight_decay)
    optimizer = build_finetune_optimizer(network, optim, head_lr_factor=config.head_lr_factor)
    forward, settings = wrap_ddp(network, device), run.training(name)
    train_resumably(
        run.supervision,
        training,
        network,
        optimizer,
        lambda start, after: train(forward, optimizer, run.train, plan, settings, start, after),
        on_step,
    )
    return network


def _identity(run: Segmentation, name: str, seed: int) -> dict[str, Any]:
    """Return all that the training of one encoder and seed depends on, for comparison with a saved state."""
    settings = _settings(run.config)
    del settings["seeds"], settings["encoders"]
    settings |= {"classes": len(run.train.classes), "ignore": run.config.masks.ignore}
    pairs = [[(path, *size_and_time(path)) for path in pair] for pair in run.train.pairs]
    crops = run.training(name).crops
    settings |= {"mean": list(crops.mean), "std": list(crops.std)}
    weights, untrained = weights_digest(run.files[name], "backbone"), name == "untrained"
    return {"settings": settings, "untrained": untrained, "seed": seed, "pairs": pairs, "weights": weights}


def _save(run: Segmentation, name: str, network: SegmentationNetwork, folder: Path) -> None:
    """Write network.safetensors with the class names, and predictions.png of some held-out images."""
    folder.mkdir(parents=True, exist_ok=True)
    file, crops = run.files[name], run.training(name).crops
    segmenter = Segmenter(network, run.train.classes, crops.mean, crops.std)
    save_segmenter(folder / "network.safetensors", segmenter, run.config.head, file.backbone, file.options)
    rows = range(0, len(run.held_out), max(1, len(run.held_out) // SHOWN))[:SHOWN]
    masks = predict(network, run.held_out, rows, crops, 0)
    shown = ((run.held_out.pairs[row][0], (mask, found)) for row, (found, mask) in zip(rows, masks, strict=True))
    write_predictions(folder / "predictions.png", shown)


def _settings(config: SegmentConfig) -> dict[str, Any]:
    """Return the settings without those of the encoder, the data and the normalization."""
    return {name: value for name, value in own_settings(config).items() if name not in ("masks", "mean", "std")}


def _data(run: Segmentation) -> dict[str, Any]:
    """Return the data of an entry for results.json."""
    masks = asdict(run.config.masks) | {"root": str(Path(run.config.masks.root).absolute())}
    files = [
        [(Path(path).name, *size_and_time(path)) for path, _ in split.pairs] for split in (run.train, run.held_out)
    ]
    counts = {"training": len(run.train), "held_out": len(run.held_out), "classes": list(run.train.classes)}
    counts |= {"held_out_in_training": run.shared, "held_out_seen": run.seen}
    return masks | counts | {"sha256": digest([files, run.pixels])}


def _entry(run: Segmentation, found: Segmented, data: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of one encoder for results.json."""
    config, file, (mean, half) = run.config, run.given[found.encoder], found.mean
    crops = run.training(found.encoder).crops
    settings = _settings(config) | {name: getattr(config, name) for name in ("seed", "mean", "std")}
    accuracy = float(np.mean([each.pixel_accuracy for each in found.overlaps]))
    return {
        "command": "segment",
        "protocol": f"{config.head}{', frozen' * config.frozen}, {config.steps} steps",
        **describe_start(config, found.encoder, config.seed),
        **describe_encoder(file),
        "data": data,
        "look": {"mean": list(crops.mean), "std": list(crops.std)},
        "settings": settings,
        "changed": changed_settings(config, "segment", settings.keys() - _NOT_LISTED),
        "figures": {"mIoU": mean, "mIoU_half_width95": half, "pixel_accuracy": accuracy}
        | ({} if config.seeds > 1 else {"interval95": list(found.overlaps[0].interval())}),
        "per_seed": [each.to_json() for each in found.overlaps],
        "saved": str(found.saved.absolute()),
    }


def _show(run: Segmentation, found: list[Segmented]) -> None:
    """Print the closing table."""
    config, rows = run.config, []
    for each in found:
        mean_iou = percent(*each.mean, each.overlaps[0].interval())
        accuracy = percent(float(np.mean([one.pixel_accuracy for one in each.overlaps])))
        rows.append([each.encoder, mean_iou, accuracy, ", ".join(percent(one.mean) for one in each.overlaps)])
    note = interval_note(config.seeds, "with the 95 % bootstrap interval over the held-out images")
    title = f"segmentation, {config.head}{', frozen encoder' * config.frozen}, {config.steps:,} steps"
    caption = f"mIoU: {note}; {len(run.held_out):,} held-out images, {len(run.train.classes)} classes"
    table(title, ["encoder", "mIoU %", "pixel accuracy %", "each seed"], rows, caption)
    for each in found:
        predicted = np.concatenate([one.predicted for one in each.overlaps]).any(axis=0)  # (L,)
        if np.count_nonzero(predicted) == 1:
            only = run.train.classes[int(predicted.argmax())]
            log(f"{each.encoder}: every pixel is predicted as {only}: raise steps, or lr")
