"""A linear probe from a configuration to a table: open, judge each encoder by one protocol, keep and show."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import ConfigError, OptimConfig, RunWarning, require
from moco.config.linear import LinearConfig
from moco.data.plan import Plan
from moco.data.sources import Source
from moco.data.view import View
from moco.distributed import is_rank_zero, on_rank_zero, rank, world_size
from moco.evaluation.cache import cached, key_of
from moco.evaluation.features import pixels, stream
from moco.evaluation.layers import LayerFeatures
from moco.evaluation.linear_probe import LinearHead, fitting_batch, new_head, train_head
from moco.evaluation.linear_report import Outcome, Task, about_head, keep, say_next, show
from moco.evaluation.metrics import HeldOut, figures
from moco.evaluation.subject import encoders, features_of, open_labeled, open_subject
from moco.evaluation.sweep import Choice, Recipe, choose, retrain
from moco.models.encoder import Encoder
from moco.optim.schedules import lr_factor, scaled_lr
from moco.runs.results import prepare
from moco.runtime.console import log, progress_bar
from moco.runtime.device import compute_context

_CHUNK = 4096  # rows at once through a head


def evaluate_linear(config: LinearConfig) -> None:
    """See `moco.linear.linear`."""
    with compute_context(config) as device:
        subject = open_subject(config)
        train, held_out = open_labeled(config, subject)
        prepare(subject.output)
        task = Task(config, subject, train, held_out, device)
        log(
            f"{config.protocol}: {subject.file.source} ({subject.file.backbone}, step {subject.step}) on "
            f"{task.data_name}, {len(train):,} training and {len(held_out):,} held-out pictures of "
            f"{len(train.classes)} classes, {device.type}, {world_size()} process{'es' * (world_size() > 1)}"
        )
        judge = _sweep if config.kind == "sweep" else _official
        outcomes = [judge(task, name, encoder) for name, encoder in encoders(subject, config.compare, device)]
        if "pixels" in config.compare:
            outcomes.append(_sweep(task, "pixels", None))
        show(task, outcomes)  # first: what was found stays on the terminal, whatever becomes of the files
        files = on_rank_zero(lambda: keep(task, outcomes))
        log(f"written to {subject.output}: {', '.join(path.name for path in files)}")
        say_next(task)


# ---- the two protocols ----


def _sweep(task: Task, name: str, encoder: Encoder | None) -> Outcome:
    """Fixed features, many heads, the best on a part of the training split; the held-out split is opened last."""
    config, labels = task.config, _labels(task.train)
    sweep, classes = config.sweep, len(task.train.classes)
    single = [task.train.classes[label] for label in np.flatnonzero(np.bincount(labels) == 1)]
    require(
        not single,
        f"class {', '.join(single[:5])} has one training picture only, and a choice needs two, one to learn from and "
        "one to choose by: add pictures, or set protocol=moco_v2, which chooses nothing",
    )
    if encoder is None:
        network, columns = None, {"pixels": slice(0, 3 * task.subject.look.size**2)}
    else:
        network = _layers(task, encoder.get_submodule("backbone"))
        columns = network.columns
    features = _features(task, network, task.train, f"{name}: features of the training pictures")
    held_out = HeldOut(
        lambda: _features(task, network, task.held_out, f"{name}: features of the held-out pictures"),
        _labels(task.held_out),
    )
    chosen: list[Choice] = []
    heads: list[LinearHead] = []
    for seed in task.seeds():
        recipe = Recipe(config.epochs, config.batch_size, config.momentum, sweep.normalize, seed)
        with progress_bar(
            f"{name}: {len(sweep.lrs) * len(sweep.weight_decays)} heads a layer, epochs", not is_rank_zero()
        ) as bar:
            choice = choose(
                features,
                columns,
                labels,
                classes,
                sweep.lrs,
                sweep.weight_decays,
                sweep.validation,
                recipe,
                task.device,
                bar,
            )
        chosen.append(choice)
        _warn_at_the_edge(task, name, choice)
        weight, bias = retrain(features, columns, labels, classes, choice.setting, recipe, task.device)
        about = about_head(task, choice.setting.layer, unit=sweep.normalize == "l2")
        heads.append(LinearHead(weight, bias, about))
    test, truth = held_out.open()
    batch = min(config.batch_size, len(labels) - chosen[0].count)
    if batch < config.batch_size and name == "pretrained":
        log(f"batch_size={config.batch_size} was lowered to {batch}, the pictures that are left to train on")
    return Outcome(
        name,
        [
            figures(_scores(head, test, columns[choice.setting.layer], task.device), truth)
            for head, choice in zip(heads, chosen, strict=True)
        ],
        heads,
        [asdict(each.setting) | {"validation_top1": each.accuracy, "validation_count": each.count} for each in chosen],
        {"batch_size": batch},
    )


def _official(task: Task, name: str, encoder: Encoder) -> Outcome:
    """main_lincls.py: one learning rate, augmented pictures, nothing chosen."""
    config, official, device = task.config, task.config.official, task.device
    backbone = encoder.get_submodule("backbone")
    view, batch = _training_view(task), fitting_batch(config.batch_size, len(task.train))
    require(
        batch % world_size() == 0,
        f"batch_size={batch}, lowered as the training split has {len(task.train)} pictures, must be a multiple of the "
        f"{world_size()} processes: use fewer, or set batch_size yourself",
    )
    if batch < config.batch_size and name == "pretrained":
        log(f"batch_size={config.batch_size} is lowered to {batch}: the training split has {len(task.train)} pictures")
    peak = scaled_lr(official.lr, batch, official.base_batch)
    if official.schedule == "step" and any(each >= config.epochs for each in official.milestones):
        warnings.warn(
            f"official.milestones={official.milestones} are not all reached within epochs={config.epochs}: the "
            "learning rate stays high; move them too",
            RunWarning,
            stacklevel=2,
        )
    network = _layers(task, backbone)
    held_out = HeldOut(
        lambda: _features(task, network, task.held_out, f"{name}: held-out pictures"), _labels(task.held_out)
    )
    schedule = OptimConfig(
        schedule=official.schedule, milestones=list(official.milestones), gamma=official.gamma, per_epoch=True
    )
    heads: list[LinearHead] = []
    for seed in task.seeds():
        plan = Plan(len(task.train), batch, config.epochs, seed, rank(), world_size())
        head = new_head(network.width, len(task.train.classes), official.head_std, seed).to(device)

        def lr_at(step: int, plan: Plan = plan) -> float:
            return peak * lr_factor(step, plan.steps_per_epoch, plan.epochs, schedule)

        with _epochs(name, config.epochs) as on_epoch:
            train_head(
                backbone,
                head,
                task.train,
                plan,
                view,
                lr_at,
                config.momentum,
                official.weight_decay,
                device,
                task.workers,
                on_epoch,
            )
        heads.append(LinearHead(head.weight.detach(), head.bias.detach(), about_head(task, "output", unit=False)))
    test, truth = held_out.open()
    everything = slice(0, test.shape[1])
    chosen = {"layer": "output", "lr": peak, "weight_decay": official.weight_decay}
    return Outcome(
        name,
        [figures(_scores(head, test, everything, device), truth) for head in heads],
        heads,
        [chosen] * len(heads),
        {"batch_size": batch, "peak_lr": peak},
    )


# ---- their parts ----


def _layers(task: Task, backbone: nn.Module) -> LayerFeatures:
    layers = task.config.sweep.layers if task.config.kind == "sweep" else ["output"]
    try:
        return LayerFeatures(backbone, layers, task.subject.look.size)
    except ValueError as error:
        raise ConfigError(f"sweep.layers: {error}") from error


def _features(task: Task, network: LayerFeatures | None, source: Source, what: str) -> Tensor:
    """Features of a source, (M, D): of the layers, or where there is no network of the raw pixels."""
    if network is None:
        return features_of(pixels, source, task.subject, task.config, task.device)
    with progress_bar(what, quiet=not is_rank_zero()) as bar:
        done, share = 0, -(-len(source) // world_size())

        def counted(images: Tensor) -> Tensor:
            nonlocal done
            out: Tensor = network(images)
            if not out.isfinite().all():
                raise FloatingPointError(f"{what}: the encoder gives features that are not finite: it is broken")
            done += len(images)
            bar(done, share)
            return out

        if task.config.sweep.cache == "memory":
            return features_of(counted, source, task.subject, task.config, task.device)
        return _on_disk(task, network, counted, source)


def _on_disk(task: Task, network: LayerFeatures, counted: Callable[[Tensor], Tensor], source: Source) -> Tensor:
    look = task.subject.look
    parts = {"weights": network.backbone.state_dict(), "look": asdict(look), "layers": network.layers}
    key = key_of(
        parts | {"network": task.subject.file.backbone, "pictures": on_rank_zero(lambda: source.content_digest())}
    )
    folder = task.subject.output / "features"

    def compute(rows: Any) -> Iterator[Tensor]:
        return stream(
            counted,
            source,
            rows,
            look.size,
            look.resize,
            look.mean,
            look.std,
            task.device,
            task.config.images_at_once,
            task.workers,
        )

    try:
        return cached(folder, key, len(source), network.width, compute)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written to ({error.strerror}): set output=DIR") from error


def _scores(head: LinearHead, features: Tensor, columns: slice, device: torch.device) -> Tensor:
    """(M, L)."""
    return torch.cat([head(part[:, columns].to(device)) for part in features.split(_CHUNK)])


def _training_view(task: Task) -> View:
    look = task.subject.look
    told: dict[str, Any] = {
        name: tuple(each) if isinstance(each, list) else each for name, each in task.config.augment.items()
    }
    try:
        return View(**(told | {"size": look.size, "mean": look.mean, "std": look.std}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"augment: {str(error).removeprefix('View.__init__() ')}") from error


def _labels(source: Source) -> Any:
    assert source.labels is not None  # open_labeled saw to it
    return source.labels


@contextmanager
def _epochs(name: str, epochs: int) -> Iterator[Callable[[int, float, float], None]]:
    """A bar over the epochs, and now and then a line of how training goes."""
    last = time.monotonic()
    with progress_bar(f"{name}: epochs", quiet=not is_rank_zero()) as bar:

        def on_epoch(done: int, loss: float, accuracy: float) -> None:
            nonlocal last
            bar(done, epochs)
            if done in (1, epochs) or time.monotonic() - last > 30:
                last = time.monotonic()
                log(f"{name}: epoch {done}/{epochs} · loss {loss:.3f} · training accuracy {accuracy:.1f} %")

        yield on_epoch


def _warn_at_the_edge(task: Task, name: str, choice: Choice) -> None:
    lrs = task.config.sweep.lrs
    if len(lrs) > 1 and choice.setting.lr == max(lrs):
        log(f"{name}: the best learning rate, {choice.setting.lr:g}, is the highest of sweep.lrs: try higher ones too")
