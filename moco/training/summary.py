"""The lines that a pretraining run prints at its start and its end, and the image of its views."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

import moco
from moco.config import RunWarning
from moco.data.base import Source
from moco.data.loader import batches
from moco.data.opening import opening_lines
from moco.data.pixel_format import PixelFormat, per_channel, preview
from moco.data.plan import Plan
from moco.data.unreadable import OnUnreadable
from moco.data.view import View
from moco.distributed import is_rank_zero
from moco.evaluation.knn_classifier import Accuracy
from moco.files import WriteError, atomic_write, cause
from moco.runs.metrics import MetricsLogger
from moco.runtime.console import duration, log_next, summary_panel
from moco.runtime.device import describe_devices
from moco.runtime.next_command import command, computing_as, named_images, next_commands
from moco.training.live_evaluation import BASELINES, baselines

if TYPE_CHECKING:
    from moco.training.trainer import Trainer


def announce(trainer: "Trainer") -> None:
    """Print the network, data, device and settings of the run before its first step."""
    config, plan, sources, log = trainer.config, trainer.plan, trainer.sources, trainer.display.log
    method = trainer.method
    parameters = sum(p.numel() for p in method.encoder.parameters())
    log(
        f"moco {moco.__version__} · {config.model.backbone} ({parameters / 1e6:.2f} M parameters) on "
        f"{config.data.name} ({plan.length:,} images) · {describe_devices(trainer.device)}"
    )
    if trainer.start < plan.total_steps and is_rank_zero():
        for line in opening_lines(sources):
            log(line)
        if plan.draws:
            parts = [f"{draws:,} of {images:,} images" for images, draws in plan.draws]
            log(f"an epoch draws {' + '.join(parts)} = {plan.samples_per_epoch:,} samples (data.weights)")
    negatives = f"queue {method.queue.size}" if method.queue is not None else "no queue"
    log(
        f"epochs {plan.epochs}, steps per epoch {plan.steps_per_epoch} · batch {config.batch_size} · {negatives} · "
        f"temperature {config.method.temperature} · lr {trainer.peak_lr:.3g} · {trainer.precision} "
        f"({trainer.precision_reason}) · into {config.run}"
    )
    if trainer.start < plan.total_steps:
        if config.method.labels:
            log("method.labels=true: the encoder learns from the classes of the training images")
        if trainer.start:
            log(f"resuming {config.run} at step {trainer.start} of {plan.total_steps}")
        elif method.queue is not None and method.queue.start == "random" and not method.queue.filled():
            log("the queue starts with random keys: at first, the loss is lower and the contrast accuracy higher")
        if sources.bank is not None and not config.evaluate.labels_per_class and config.evaluate.k > len(sources.bank):
            log(f"evaluate.k={config.evaluate.k} exceeds the {len(sources.bank)} reference images: all of them vote")
        if config.evaluate.every_epochs and trainer.live.measure == "retrieval":
            multi_label = sources.train.multi_labels is not None
            why = "images with several labels each" if multi_label else "no labeled held-out images"
            log(f"{why}: evaluating how often two crops of an image find each other")
    for note in trainer.notes:
        log(note)


def show_views(
    metrics_log: MetricsLogger,
    path: Path,
    source: Source,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    on_unreadable: OnUnreadable | None = None,
) -> None:
    """Write the views of up to eight images to views.png and the loggers; warn if the file cannot be written."""
    small = Plan(plan.length, min(8, plan.batch_size), 1, plan.seed)
    batch = next(batches(source, small, views, device, workers=0, on_unreadable=on_unreadable))
    mean, std = (per_channel(each, device) for each in (views[0].mean, views[0].std))
    size = batch.views[0].shape[2:]  # of the full views; small ones are enlarged
    same_size = (view if view.shape[2:] == size else F.interpolate(view, size) for view in batch.views)
    rows = [_shown(view * std + mean, source.pixel_format) for view in same_size]
    enlarge = -(-64 // views[0].size)  # to at least 64 pixels
    images = torch.cat(rows).repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(images, nrow=len(batch.index), pad_value=1.0)
    metrics_log.log_image("views", grid)
    file = path / "views.png"
    try:
        with atomic_write(file) as temporary:
            save_image(grid, temporary, format="png")
    except WriteError as error:
        message = f"{file} cannot be written ({cause(error)}); training continues without it"
        warnings.warn(message, RunWarning, stacklevel=2)


def _shown(views: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Return views (n, C, S, S) as they are shown, (n, 3, S, S) in 0 ... 1."""
    if pixel_format.is_8bit_gray_or_rgb:
        return views.clamp(0, 1).expand(-1, 3, -1, -1)
    return torch.stack([preview(each, pixel_format.preview) for each in views.cpu()]) / 255


def summarize(trainer: "Trainer") -> None:
    """Print the closing panel: the network and data, speed and accuracy, the files, and the next commands."""
    config, plan = trainer.config, trainer.plan
    method = type(trainer.method).__name__ + (" and labels" if config.method.labels else "")
    trained = f"{config.model.backbone} with {method} on {config.data.name} ({plan.length:,} images)"
    rows = [
        ("trained", f"{trained}, {plan.epochs} epoch{'s' * (plan.epochs > 1)}, {plan.total_steps:,} steps"),
        ("time", f"{duration(trainer.schedule.recorded)}, without the start-up"),
        ("computed", f"in {trainer.precision} on {trainer.computed_on}"),
    ]
    if speed := trainer.throughput.summary():
        rows.append(("speed", speed))
    if skipped := trainer.guard.skipped:
        steps = f"{skipped} step{'s' * (skipped > 1)} with a non-finite loss or gradient"
        rows.append(("skipped", f"{steps}, see {config.run}/nonfinite/"))
    if (unreadable := trainer.unreadable) is not None:
        replaced = f"{len(unreadable.found):,}, replaced by other images and listed in {unreadable.file}"
        rows.append(("unreadable images", replaced if unreadable.found else "none"))
    rows += _accuracy_rows(trainer)
    if trainer.doctor is not None:
        rows += [("doctor", str(each)) for each in trainer.doctor.found]
    files, events = Path(config.run), ", TensorBoard events" * ("tensorboard" in config.logger)
    rows += [
        ("encoder", f"{files / 'encoder.safetensors'} (backbone weights; to load them: docs/howto/use.md)"),
        ("files", f"{files}/: config.yaml, metrics.jsonl, checkpoints/, views.png{events}"),
    ]
    summary_panel("already finished" if trainer.start == plan.total_steps else "done", rows)
    data = (config.data.name, config.data.root)
    sources = trainer.sources
    multi_label = sources.train.multi_labels is not None and sources.held_out is not None
    labeled = trainer.live.measure == "knn" or multi_label
    on_bad_image, step = config.data.on_bad_image, plan.total_steps
    for each in next_commands(config.run, *data, labeled, on_bad_image, step=step, compute=config):
        log_next(each)
    log_next(command("moco.report", computing_as(config), run=config.run, **named_images(*data)))
    if config.data.name not in ("folder", "video", "shards", "huggingface", "webdataset"):
        log_next("python -m moco.check_data data.root=YOUR_IMAGES")


def _accuracy_rows(trainer: "Trainer") -> list[tuple[str, str]]:
    history, measure = trainer.live.history, trainer.live.measure
    if not history:
        return []
    rows = [("accuracy" if measure == "knn" else "retrieval", trainer.live.title)]
    before = baselines(history, trainer.config.starts_trained)
    rows += [(f"  {BASELINES[name]}", str(result)) for name, result in before.items()]
    last = Accuracy(*history[-1][measure])
    gain = f"  ({last.mean - list(before.values())[-1].mean:+.1f})" if before else ""
    rows.append(("  pretrained", f"{last}{gain}"))
    if "probe" in history[-1]:
        rows.append(("  linear probe", f"{Accuracy(*history[-1]['probe'])}, trained online"))
    return rows
