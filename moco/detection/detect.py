"""`python -m moco.detect`: train a detector on each encoder with each seed, evaluate, save."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moco.config import OptimConfig, require
from moco.config.detect import DetectConfig
from moco.data.labels import first_names
from moco.data.plan import Plan
from moco.data.walk import size_and_time
from moco.detection.images import BoxedImage, BoxedImages, check_images
from moco.detection.measure import AveragePrecision, evaluate, metrics_library
from moco.detection.network import DetectorSettings, build_detector
from moco.detection.opening import open_boxed
from moco.detection.predictions import write_predictions
from moco.detection.sampling import DetectorLoss
from moco.detection.saved import Detector, save_detector
from moco.detection.training import TrainSettings, predict, recompute_statistics, train
from moco.detection.views import ViewSettings
from moco.digest import digest
from moco.distributed import broadcast_module, on_rank_zero, wrap_ddp
from moco.evaluation.encoders import folder_name, normalization, open_encoders
from moco.evaluation.finetuning import plan_of
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
from moco.optim.optimizers import build_optimizer
from moco.runs.results import prepare, record
from moco.runtime.console import log, percent, progress_bar, table
from moco.runtime.device import many_shapes
from moco.runtime.precision import PRECISIONS
from moco.runtime.preemption import PreemptionHandler

# Fields not listed under "changed" in results.json: "protocol" states them, or they do not affect the result of a seed.
_NOT_LISTED = {"encoders", "seeds", "steps", "detector"}
SHOWN = 6  # held-out images in predictions.png


@dataclass(frozen=True, eq=False)
class Detection:
    """What all encoders and seeds share: the configuration, the encoder files and the images."""

    config: DetectConfig
    own: EncoderFile  # the encoder given by the field run or checkpoint
    files: dict[str, EncoderFile]  # the file of each entry of the field `encoders`
    output: Path
    train: BoxedImages
    held_out: BoxedImages
    shared: int  # number of held-out images that are training images, too
    seen: bool  # whether an encoder was trained on held-out images
    supervision: Supervision

    def plan(self, seed: int) -> Plan:
        return plan_of(len(self.train), self.config.batch_size, 1, self.config.steps, seed)

    def training(self, name: str) -> TrainSettings:
        """Return the settings for an encoder, whose file may state mean and standard deviation of the pixels."""
        config = self.config
        mean, std = normalization(self.files[name], config.mean, config.std)
        sizes = (tuple(config.sizes), config.eval_size, config.max_size, config.flip_p)
        views = ViewSettings(*sizes, mean, std, config.masks)
        schedule = Schedule(config.lr, config.steps, config.schedule, config.warmup, tuple(config.milestones))
        return TrainSettings(views, schedule, PRECISIONS[config.precision], config.boxes.workers)


@dataclass(frozen=True)
class Detected:
    """The results of one encoder."""

    encoder: str  # the entry of `encoders`
    results: list[AveragePrecision]  # one per seed
    saved: Path

    def mean(self, figure: str) -> tuple[float, float | None]:
        """Return the mean over seeds, and half of Student's 95 % interval, which is None for a single seed."""
        return mean_interval([each.figures[figure] for each in self.results])


def evaluate_detect(config: DetectConfig, preemption: PreemptionHandler | None = None) -> list[Detected]:
    """Train and evaluate a detector on each configured encoder with each seed; the same result on every rank.

    If `preemption` is None, this function itself catches the signals that stop a run.

    Raises:
        ConfigError, ImageError, FileNotFoundError, ValueError: for an unsuitable encoder or data set.
        NonFiniteLoss: if the training diverges.
        Preempted: if a signal or `config.stop_after` stopped the training before its end.
    """
    with supervised(config, preemption) as supervision, many_shapes():
        run = _set_up(config, supervision)
        prepare(run.output)
        with progress_log("step", len(config.encoders) * config.seeds * config.steps) as on_step:
            found = [_detect(run, name, on_step) for name in config.encoders]
        data = _data(run)
        entries = [_entry(run, each, data) for each in found]
        _show(run, found)  # before writing: the results stay visible if writing fails
        path = on_rank_zero(lambda: record(run.output, entries, run.own.step))
        log(f"written: {path}")
        for each in found:
            log(f"saved: {each.saved}/detector.safetensors and predictions.png (of the last seed)")
        log_next_training(config, "detect", config.seeds, run.output)
    return found


def _set_up(config: DetectConfig, supervision: Supervision) -> Detection:
    """Open the encoders and the images, and read the headers of all images."""
    metrics_library()  # before the training, which needs it at the end
    with supervision.watchdog.paused():  # a file may be downloaded
        own = open_encoder(config)
        files = open_encoders(own, config.encoders, "moco.detect")
    train_split, held_out = on_rank_zero(lambda: open_boxed(config.boxes, config.masks))
    require(
        len(train_split) >= config.batch_size,
        f"batch_size={config.batch_size} exceeds the {len(train_split)} training images with boxes: lower it",
    )
    for each in (train_split, held_out):
        on_rank_zero(lambda: check_images(each, config.boxes.workers, supervision.heartbeat))  # noqa: B023 # called at once
    for name, file in files.items():
        log(f"{name}: {file.source}: {file.backbone} ({file.layout}{file.trained})")
        # Report an unsuitable encoder or unsuitable anchor_sizes now, before any training.
        build_detector(file, _form(config), len(train_split.classes), seed=0, untrained=False)
    objects = int(train_split.count().sum())
    log(f"{len(train_split):,} images with {objects:,} objects for training, {len(held_out):,} images held out")
    count = len(train_split.classes)
    log(f"{count} class{'es' * (count > 1)}: {first_names(train_split.classes)}")
    lacking = [
        name
        for name, ours, theirs in zip(train_split.classes, train_split.count(), held_out.count(), strict=True)
        if theirs and not ours
    ]
    if lacking:
        log(f"classes without a box in the training images, which the detector cannot learn: {first_names(lacking)}")
    paths = [[each.path for each in split.images] for split in (train_split, held_out)]
    shared = count_shared(*paths)
    seen = warn_of_seen(paths[1], files.values())
    return Detection(config, own, files, output_of(config, own), train_split, held_out, shared, seen, supervision)


def _form(config: DetectConfig) -> DetectorSettings:
    sizes = tuple(config.anchor_sizes or ())
    return DetectorSettings(config.detector, config.norm, config.bn, config.width, sizes)


def _detect(run: Detection, name: str, on_step: LogStep) -> Detected:
    """Train and evaluate one encoder with all seeds; save the network of the last seed and predictions.png."""
    results, config, settings = [], run.config, run.training(name)
    for seed in range(config.seed, config.seed + config.seeds):
        training = _training(run, name, seed)
        network = _train(run, training, on_step)
        with progress_bar("evaluating", run.supervision.heartbeat) as progress:
            results.append(evaluate(network, run.held_out, settings.views, settings.workers, progress))
        figures = ", ".join(f"{key} {percent(value)}" for key, value in results[-1].figures.items())
        log(f"{name}, seed {seed}: {figures} %")
    on_rank_zero(lambda: _save(run, name, network, training.folder))
    return Detected(name, results, training.folder)


def _training(run: Detection, name: str, seed: int) -> ResumableTraining:
    config, identity = run.config, digest(_identity(run, name, seed))
    folder = run.output / "detect" / f"{folder_name(name)}_{config.detector}_{config.steps}steps"
    return ResumableTraining(folder, name, seed, identity, config.steps, config.batch_size)


def _train(run: Detection, training: ResumableTraining, on_step: LogStep) -> nn.Module:
    config, classes, device = run.config, len(run.train.classes), run.supervision.device
    name, seed, untrained = training.encoder, training.seed, training.encoder == "untrained"
    network = build_detector(run.files[name], _form(config), classes, seed=seed, untrained=untrained).to(device)
    broadcast_module(network)
    loss = DetectorLoss(network, config.anchor_samples, config.box_samples)
    optimizer, settings = _optimizer(config, network), run.training(name)
    forward = wrap_ddp(loss, device)
    train_resumably(
        run.supervision,
        training,
        network,
        optimizer,
        lambda start, after: train(forward, optimizer, run.train, run.plan(seed), settings, start, after),
        on_step,
    )
    if config.precise_bn:
        heartbeat = run.supervision.heartbeat
        recompute_statistics(loss, run.train, run.plan(seed), settings, config.precise_bn, heartbeat)
    return network


def _optimizer(config: DetectConfig, network: nn.Module) -> Optimizer:
    optim = OptimConfig(name="sgd", exclude=["norm"], momentum=config.momentum, weight_decay=config.weight_decay)
    optimizer = build_optimizer(network, optim)
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    return optimizer


def _identity(run: Detection, name: str, seed: int) -> dict[str, Any]:
    """Return all that the training of one encoder and seed depends on, for comparison with a saved state."""
    settings = _settings(run.config)
    for each in ("seeds", "encoders", "eval_size", "precise_bn"):
        del settings[each]
    views = run.training(name).views
    settings |= {"mean": list(views.mean), "std": list(views.std), "classes": list(run.train.classes)}
    images = [[each.path, *size_and_time(each.path), *_about(each)] for each in run.train.images]
    weights = weights_digest(run.files[name], "backbone")
    untrained = name == "untrained"
    return {"settings": settings, "untrained": untrained, "seed": seed, "images": images, "weights": weights}


def _about(image: BoxedImage) -> list[Any]:
    """Return the size and the objects of an image."""
    return [image.width, image.height, image.boxes.tolist(), image.labels.tolist(), list(image.segmentations)]


def _save(run: Detection, name: str, network: nn.Module, folder: Path) -> None:
    """Write detector.safetensors, and predictions.png of some held-out images."""
    folder.mkdir(parents=True, exist_ok=True)
    file, views = run.files[name], run.training(name).views
    detector = Detector(network, run.train.classes, views)
    save_detector(folder / "detector.safetensors", detector, _form(run.config), file.backbone, file.options)
    rows = range(0, len(run.held_out), max(1, len(run.held_out) // SHOWN))[:SHOWN]
    found = predict(network, run.held_out, rows, views, 0)
    images = [run.held_out.images[row] for row in rows]
    write_predictions(folder / "predictions.png", zip(images, found, strict=True), run.train.classes)


def _settings(config: DetectConfig) -> dict[str, Any]:
    """Return `own_settings` without the fields of the data and the normalization."""
    return {name: value for name, value in own_settings(config).items() if name not in ("boxes", "mean", "std")}


def _data(run: Detection) -> dict[str, Any]:
    """Return the data of an entry for results.json."""
    boxes = asdict(run.config.boxes) | {"root": str(Path(run.config.boxes.root).absolute())}
    images = [
        [[*_file(each.path), *_about(each), each.ignored.tolist()] for each in split.images]
        for split in (run.train, run.held_out)
    ]
    counts = {"training": len(run.train), "held_out": len(run.held_out), "classes": list(run.train.classes)}
    counts |= {"held_out_in_training": run.shared, "held_out_seen": run.seen}
    counts |= {"training_boxes_left_out": run.train.dropped, "held_out_boxes_left_out": run.held_out.dropped}
    return boxes | counts | {"sha256": digest(images)}


def _file(path: str) -> tuple[Any, ...]:
    return Path(path).name, *size_and_time(path)


def _entry(run: Detection, found: Detected, data: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of one encoder for results.json."""
    config, file, views = run.config, run.files[found.encoder], run.training(found.encoder).views
    settings = _settings(config) | {name: getattr(config, name) for name in ("seed", "mean", "std")}
    figures: dict[str, float | None] = {}
    for name in found.results[0].figures:
        figures[name], figures[f"{name}_half_width95"] = found.mean(name)
    return {
        "command": "detect",
        "protocol": f"{config.detector}, {config.steps} steps",
        **describe_start(config, found.encoder, config.seed),
        **describe_encoder(file),
        "data": data,
        "look": {"mean": list(views.mean), "std": list(views.std)},
        "settings": settings,
        "changed": changed_settings(config, "detect", settings.keys() - _NOT_LISTED),
        "figures": figures,
        "per_seed": [each.to_json() for each in found.results],
        "saved": str(found.saved.absolute()),
    }


def _show(run: Detection, found: list[Detected]) -> None:
    """Print the closing table."""
    config = run.config
    names = list(found[0].results[0].figures)
    rows = []
    for each in found:
        seeds = ", ".join(percent(one.figures["AP"]) for one in each.results)
        rows.append([each.encoder, *(percent(*each.mean(name)) for name in names), seeds])
    note = interval_note(config.seeds, "one seed, so without an interval")
    caption = f"AP: {note}; {len(run.held_out):,} held-out images, {len(run.train.classes)} classes"
    columns = ["encoder", *(f"{name.replace('_', ' ')} %" for name in names), "AP of each seed"]
    table(f"detection, {config.detector}, {config.steps:,} steps", columns, rows, caption)
    for each in found:
        if max(one.figures["AP50"] for one in each.results) < 1:
            log(f"{each.encoder}: almost no object is found: raise steps or lr, or fit anchor_sizes to the objects")
