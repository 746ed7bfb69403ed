"""Fine-tuning from a configuration to a table: pick the labeled pictures, train each encoder and seed, judge, save."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from moco.config import ConfigError, RunWarning, require
from moco.config.finetune import FinetuneConfig, fraction_of
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Source
from moco.data.view import View
from moco.distributed import broadcast_module, is_rank_zero, on_rank_zero, wrap_ddp
from moco.evaluation import subsets
from moco.evaluation.finetune_report import Outcome, Task, common, entries, protocol, summarize
from moco.evaluation.finetuning import classifier, mixing, optimizer_of, plan_of, train
from moco.evaluation.metrics import HeldOut, figures
from moco.evaluation.subject import Subject, data_config, data_written, features_of, open_labeled, open_subject
from moco.evaluation.sweep import validation_rows
from moco.interop.encoder_file import build, save_encoder
from moco.interop.weights import save_weights
from moco.runs import results
from moco.runtime import console
from moco.runtime.console import Terminal, duration
from moco.runtime.device import compute_context
from moco.runtime.precision import PRECISIONS

FOREIGN: dict[str, Any] = {"crop_scale": [0.08, 1.0], "flip_p": 0.5}  # of a file that says no augmentation

OnStep = Callable[[str, float], None]


def evaluate_finetune(config: FinetuneConfig) -> list[Outcome]:
    """See `moco.finetune.finetune`."""
    with compute_context(config) as device:
        task = _open(config, device)
        plan = _announce(task)
        results.prepare(task.subject.output)
        shared = common(task, plan)  # before the work: a list of pictures may be edited meanwhile
        with _bar(len(config.encoders) * config.seeds * plan.total_steps) as on_step:
            outcomes = [_finetune(task, name, on_step) for name in config.encoders]
        file = on_rank_zero(lambda: results.record(task.subject.output, entries(shared, outcomes), task.subject.step))
        summarize(task, plan, outcomes, file)
    return outcomes


def _open(config: FinetuneConfig, device: torch.device) -> Task:
    subject = open_subject(config)
    file = subject.file
    told = {name: getattr(config, name) for name in ("layer_decay", "drop_path") if getattr(config, name) is not None}
    if told and not hasattr(build(file).get_submodule("backbone"), "group_matcher"):  # timm's list of the layers
        each = " ".join(f"{name}={value}" for name, value in told.items())
        raise ConfigError(
            f"{each} needs a vision transformer or a timm network, which {file.backbone} is not: leave it"
        )
    if config.drop_path is not None:
        file = replace(file, options=file.options | {"drop_path_rate": config.drop_path})
    if config.bn == "frozen" and "untrained" in config.encoders:
        warnings.warn(
            "bn=frozen leaves the untrained encoder with statistics that no picture ever moved, as if it had no BN: "
            "compare with bn=sync",
            RunWarning,
            stacklevel=2,
        )
    view = view_of(config, subject)
    labeled, held_out = open_labeled(config, subject)
    if config.validation:
        labeled, held_out = _parted(labeled, config.validation)
    return Task(config, subject, file, labeled, held_out, view, device)


def _parted(labeled: Source, validation: float) -> tuple[Source, Source]:
    """What is left to label, and the part of each class to judge on."""
    labels = labeled.labels
    assert labels is not None
    single = [labeled.classes[label] for label in np.flatnonzero(np.bincount(labels) == 1)]
    require(
        not single,
        f"validation={validation} needs two pictures of each class, and the training split has one of "
        f"{', '.join(single[:5])}: add pictures, or leave validation=0",
    )
    rest, rows = validation_rows(labels, validation, 0)
    return labeled.subset(rest), labeled.subset(rows)


def view_of(config: FinetuneConfig, subject: Subject) -> View:
    """The training view: the run's first, or crops and a flip, at the size and colors of the subject pictures.

    Raises:
        ConfigError: for a field of `view` that is none, or a value that cannot be.
    """
    known = {each.name for each in fields(View)}
    of_run = {name: value for name, value in subject.file.config.get("augment", {}).items() if name in known}
    look = {"size": subject.look.size, "mean": subject.look.mean, "std": subject.look.std}
    for name in config.view:
        free = ", ".join(sorted(known - set(look)))
        require(name not in look, f"view.{name} would differ from what is subject: set images.{name} instead")
        require(name in known, f"view.{name} is no field of a view: there are {free}")
    told = (of_run or FOREIGN) | config.view | look
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    try:
        return View(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"view.{error}") from error


def pick(config: FinetuneConfig, labeled: Source, seed: int) -> NDArray[np.int64]:
    """Rows of the pictures whose labels are used.

    Raises:
        FileNotFoundError: if the list is not there.
        SubsetError: see `moco.evaluation.subsets`.
        ConfigError: if a class has no picture.
    """
    labels = labeled.labels
    assert labels is not None
    if config.labels_per_class:
        return subsets.per_class(labels, config.labels_per_class, seed)
    if fraction := fraction_of(config):
        return subsets.part_of_each_class(labels, fraction, seed)
    file = Path(config.subset_list)
    if not file.is_file():
        raise FileNotFoundError(f"subset_list={file} does not exist")
    try:
        wanted = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        rows = subsets.listed([labeled.name(row) for row in range(len(labeled))], wanted)
    except subsets.SubsetError as error:
        raise subsets.SubsetError(f"subset_list={file}: {error}") from error
    except UnicodeDecodeError as error:
        raise subsets.SubsetError(f"subset_list={file} is no text") from error
    lacking = [labeled.classes[label] for label in np.setdiff1d(labels, labels[rows])]
    require(not lacking, f"subset_list={file} lists no picture of {', '.join(lacking[:5])}: each class needs one")
    return rows


def _plan(task: Task, pictures: int, seed: int) -> Plan:
    return plan_of(pictures, task.config.batch_size, task.config.epochs, task.config.min_steps, seed)


def _announce(task: Task) -> Plan:
    config, file, log = task.config, task.subject.file, console.log
    pictures = len(pick(config, task.labeled, config.seed))
    plan = _plan(task, pictures, config.seed)
    log(f"{file.source}: {file.backbone} ({file.layout}, step {file.step})")
    classes = len(task.labeled.classes)
    judged_on = "pictures of the training split" if config.validation else "held-out pictures"
    log(f"{protocol(config)[0]}: {pictures:,} of {len(task.labeled):,} pictures of {classes} classes")
    log(f"subject on {len(task.held_out):,} {judged_on}, with {config.seeds} seed{'s' * (config.seeds > 1)} an encoder")
    if plan.batch_size < config.batch_size:
        log(f"batch_size={config.batch_size} is lowered to {plan.batch_size}: there are {pictures} labeled pictures")
    if plan.epochs > config.epochs:
        log(f"epochs={config.epochs} is raised to {plan.epochs}: min_steps={config.min_steps} asks for so many steps")
    log(f"{plan.total_steps:,} steps: {plan.epochs} epochs of {plan.steps_per_epoch} with {plan.batch_size} pictures")
    return plan


def _finetune(task: Task, name: str, on_step: OnStep) -> Outcome:
    """One encoder over all seeds; the last one's network is saved."""
    found = []
    for seed in range(task.config.seed, task.config.seed + task.config.seeds):
        network, plan = _trained(task, name, seed, on_step)
        judge = HeldOut(
            lambda network=network: features_of(network, task.held_out, task.subject, task.config, task.device),
            np.asarray(task.held_out.labels),
        )
        found.append(figures(*judge.open()))
        console.log(f"{name}, seed {seed}: {console.percent(found[-1].top1)} %")
    folder = task.subject.output / "finetune" / f"{name}_{protocol(task.config)[1]}"
    steps = plan.total_steps + (task.subject.step if name == "pretrained" else 0)
    on_rank_zero(lambda: _save(task, network, folder, steps))
    return Outcome(name, found, folder)


def _trained(task: Task, name: str, seed: int, on_step: OnStep) -> tuple[nn.Sequential, Plan]:
    config = task.config
    picked = task.labeled.subset(pick(config, task.labeled, seed))
    plan = _plan(task, len(picked), seed)
    backbone = build(task.file, seed if name == "untrained" else None).get_submodule("backbone")
    classes = len(task.labeled.classes)
    network = classifier(backbone, classes, config.bn, seed).to(task.device)
    broadcast_module(network)
    optimizer = optimizer_of(
        network,
        config.optimizer,
        config.momentum,
        config.nesterov,
        config.betas,
        config.weight_decay,
        config.exclude,
        config.head_lr_factor,
        config.layer_decay,
    )
    train(
        wrap_ddp(network, task.device),
        optimizer,
        batches(picked, plan, [task.view], task.device, data_config(config, task.subject).workers),
        torch.from_numpy(np.asarray(picked.labels)).to(task.device),
        plan,
        config.lr,
        config.warmup,
        mixing(config.mixup, config.cutmix, classes),
        config.label_smoothing,
        PRECISIONS[config.precision],
        lambda _, loss: on_step(f"{name}, seed {seed}", loss),
    )
    return network, plan


def _save(task: Task, network: nn.Sequential, folder: Path, step: int) -> None:
    """The encoder as the other commands read it, and the classifier on it with its classes' names."""
    file, look, of_run = task.subject.file, task.subject.look, task.subject.file.config
    augment = {name: getattr(look, name) for name in ("size", "mean", "std")} | {"eval_resize": look.resize}
    config = of_run | {
        "model": of_run.get("model", {}) | {"backbone": file.backbone, "options": file.options},
        "augment": of_run.get("augment", {}) | augment,
        "data": data_written(task.config, task.subject),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / "encoder.safetensors", network.get_submodule("backbone"), config, step)
    head = network.get_submodule("head").state_dict()
    save_weights(folder / "head.safetensors", head, {"classes": json.dumps(task.labeled.classes)})


@contextmanager
def _bar(total: int) -> Iterator[OnStep]:
    """A bar over all steps of all encoders and seeds; without a terminal a line every half minute. Rank 0 only."""
    terminal = Terminal(quiet=not is_rank_zero(), highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = said = time.monotonic()
    done = 0
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def on_step(what: str, loss: float) -> None:
            nonlocal said, done
            done += 1
            line = f"{what}: loss {loss:.3f}"
            bar.update(task, completed=done, description=line)
            if not terminal.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                left = duration((said - began) / done * (total - done))
                console.log(f"step {done}/{total} · {line} · left {left}")

        yield on_step
