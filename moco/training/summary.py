"""What a pretraining run says when it opens and when it closes, and the picture of its views."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import make_grid, save_image

import moco
from moco.analysis.doctor import Doctor
from moco.builder import Method
from moco.config import RunWarning, TrainConfig
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Sources
from moco.data.unreadable import OnUnreadable, UnreadableImages
from moco.data.view import View
from moco.distributed import world_size
from moco.evaluation.knn_classifier import Accuracy, knn_title
from moco.files import WriteError, atomic_write, cause
from moco.runs.metrics import MetricsLogger
from moco.runtime.console import Display, duration, summary_panel


def announce(
    display: Display,
    config: TrainConfig,
    method: Method,
    sources: Sources,
    plan: Plan,
    device: torch.device,
    peak_lr: float,
    start: int,
    precision: str,
) -> None:
    """The opening lines: what is about to be trained, on what."""
    parameters = sum(p.numel() for p in method.encoder.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    what = f"{config.model.backbone} ({parameters / 1e6:.2f} M parameters)"
    display.log(
        f"moco {moco.__version__} · {what} on {config.data.name} ({plan.length:,} images) · {world_size()} x {where}"
    )
    negatives = f"queue {method.queue.size}" if method.queue is not None else "no queue"
    display.log(
        f"{plan.epochs} epochs of {plan.steps_per_epoch} steps · batch {config.batch_size} · {negatives} · "
        f"temperature {config.method.temperature} · lr {peak_lr:.3g} · {precision} · into {config.run}"
    )
    if start == plan.total_steps:
        return
    if config.method.labels:
        display.log("method.labels=true: the encoder learns from the classes of the training images")
    if start:
        display.log(f"resuming {config.run} at step {start} of {plan.total_steps}")
    if sources.bank is not None and not config.evaluate.labels_per_class and config.evaluate.k > len(sources.bank):
        display.log(
            f"evaluate.k={config.evaluate.k} exceeds the {len(sources.bank)} reference images: all of them vote"
        )
    if config.evaluate.every_epochs and sources.held_out is None:
        display.log("no labels, so no live kNN accuracy: the data source has no labeled held-out part")


def show_views(
    metrics_log: MetricsLogger,
    path: Path,
    sources: Sources,
    plan: Plan,
    views: Sequence[View],
    device: torch.device,
    on_unreadable: OnUnreadable | None = None,
) -> None:
    """views.png and TensorBoard's first picture: what the model sees, the two views of eight images.

    They help a person to look, and training needs neither: where the file cannot be written a warning says so.
    """
    small = Plan(plan.length, min(8, plan.batch_size), 1, plan.seed)
    batch = next(batches(sources.train, small, views, device, workers=0, on_unreadable=on_unreadable))
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (views[0].mean, views[0].std))
    rows = [(view * std + mean).clamp(0, 1) for view in batch.views]
    enlarge = -(-64 // views[0].size)  # small images would be stamps on a screen
    pictures = torch.cat(rows).repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(pictures, nrow=len(batch.index), pad_value=1.0)
    metrics_log.log_image("views", grid)
    file = path / "views.png"
    try:
        with atomic_write(file) as temporary:
            save_image(grid, temporary, format="png")
    except WriteError as error:
        warnings.warn(
            f"{file} cannot be written ({cause(error)}); training goes on without it", RunWarning, stacklevel=2
        )


def summarize(
    display: Display,
    config: TrainConfig,
    method: Method,
    plan: Plan,
    history: list[dict[str, Any]],
    seconds: float,
    already_done: bool,
    bad: UnreadableImages | None = None,
    skipped: int = 0,
    speed: tuple[str, str] | None = None,
    doctor: Doctor | None = None,
) -> None:
    """The closing panel: what happened, where the files are, what to run next."""
    how = type(method).__name__ + (" and labels" if config.method.labels else "")
    rows = [
        (
            "trained",
            f"{config.model.backbone} with {how} on {config.data.name} ({plan.length:,} images), "
            f"{plan.epochs} epochs, {plan.total_steps:,} steps",
        ),
        ("time", duration(seconds)),
    ]
    if speed is not None:
        rows.append(speed)
    if skipped:
        rows.append(("skipped", f"{skipped} steps whose loss or gradient was not finite: {config.run}/nonfinite/"))
    if bad is not None:
        rows.append(
            (
                "bad pictures",
                f"{len(bad.found):,} could not be read and were replaced: {bad.file}" if bad.found else "none",
            )
        )
    if history:
        first, last = history[0], history[-1]
        rows.append(("accuracy", knn_title(config.evaluate)))
        if "raw_pixels" in first:
            rows.append(("  raw pixels", str(Accuracy(*first["raw_pixels"]))))
        rows.append(("  initialized" if config.init_from else "  untrained", str(Accuracy(*first["knn"]))))
        rows.append(("  pretrained", f"{Accuracy(*last['knn'])}  ({last['knn'][0] - first['knn'][0]:+.1f})"))
    if doctor is not None:
        rows += [("doctor", str(each)) for each in doctor.found]
    files = Path(config.run)
    rows += [
        ("encoder", f"{files / 'encoder.safetensors'} (the backbone's weights; README says how to load them)"),
        ("files", f"{files}/: config.yaml, metrics.jsonl, checkpoints/, views.png, TensorBoard events"),
        ("next", f"python -m moco.linear run={files}" if history else f"tensorboard --logdir {files}"),
        ("", f"python -m moco.report run={files}"),
    ]
    if config.data.name not in ("folder", "shards", "huggingface", "webdataset"):
        rows.append(("", "python -m moco.train experiment=moco_v2_folder data.root=YOUR_IMAGES run=runs/mine"))
    summary_panel("already finished" if already_done else "done", rows)
