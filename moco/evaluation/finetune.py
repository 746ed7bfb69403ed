"""`python -m moco.finetune`: train each encoder with each seed on the labeled images, evaluate, save."""

import hashlib
import json
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moco.config import ConfigError, OptimConfig, RunWarning, require
from moco.config.finetune import FinetuneConfig, fraction_of
from moco.data.keyed import VALIDATION
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.recorded import fields_to_repeat
from moco.data.sources import Source
from moco.data.view import View
from moco.digest import digest
from moco.distributed import broadcast_module, on_rank_zero, wrap_ddp
from moco.evaluation import subsets
from moco.evaluation import task as evaluation
from moco.evaluation.finetuning import TrainSettings, build_finetune_optimizer, classifier, mixing, plan_of, train
from moco.evaluation.metrics import Metrics, compute_metrics, mean_interval, rank_classes
from moco.evaluation.resumable import ResumableTraining, Supervision, supervised, train_resumably
from moco.evaluation.steps import LogStep, OnStep
from moco.evaluation.subject import Subject, data_with_absolute_paths, images_digest, labels_of, weights_digest
from moco.evaluation.task import Result, Task, training_view
from moco.interop.encoder_file import EncoderFile, build, save_encoder
from moco.interop.weights import save_weights
from moco.plugins import naming_plugins
from moco.runs.directory import in_run_directory
from moco.runs.results import prepare
from moco.runtime.console import log, log_next, percent
from moco.runtime.next_command import command
from moco.runtime.precision import PRECISIONS
from moco.runtime.preemption import PreemptionHandler

# Fields not listed under "changed" in results.json: "protocol" states them, or they do not affect the result of a seed.
_NOT_LISTED = {"encoders", "seeds", "fraction", "labels_per_class", "subset_list", "validation"}
DEFAULT_VIEW: dict[str, Any] = {"crop_scale": [0.08, 1.0], "flip_p": 0.5}  # for files without a run's augmentation


@dataclass(frozen=True, eq=False)
class Finetuning:
    """What the runs of all encoders and seeds share."""

    task: Task[FinetuneConfig]  # its held-out split may be a validation part of the training split
    file: EncoderFile  # the subject's file, with drop-path if it is configured
    view: View
    title: str = ""  # of the encoder, in the log; empty: its entry in `encoders`

    @cached_property
    def images(self) -> str:
        """The digest of the training images and their labels. Collective."""
        return on_rank_zero(lambda: images_digest(self.task.train))

    def plan(self, images: int, seed: int) -> Plan:
        config = self.task.config
        return plan_of(images, config.batch_size, config.epochs, config.min_steps, seed)


def evaluate_finetune(config: FinetuneConfig, preemption: PreemptionHandler | None = None) -> list[Result]:
    """Fine-tune each configured encoder end to end with each seed, and evaluate it on the held-out split.

    Returns a result per encoder, the same on every rank. If `preemption` is None, this function catches the signals
    itself. Errors: see `open_task`; `Preempted` if a signal or `config.stop_after` stopped the command before its end.
    """
    with supervised(config, preemption) as supervision, ExitStack() as stack:
        with supervision.watchdog.paused():  # images may be downloaded
            run = set_up(stack.enter_context(evaluation.open_task(config)))
        task = run.task
        plan = _log_plan(run)
        prepare(task.subject.output)
        settings = _settings(run, plan)  # read now: a list of images may be edited during training
        with evaluation.progress_log("step", len(config.encoders) * config.seeds * plan.total_steps) as on_step:
            found = [_finetune(run, name, settings, supervision, on_step) for name in config.encoders]
        _show(task, plan, found)  # before writing: the results stay visible if writing fails
        with supervision.watchdog.paused():
            path = evaluation.record_results(task, "finetune", protocol(config)[0], found, seed=config.seed)
        _log_files(task, found, path)
    return found


def set_up(task: Task[FinetuneConfig]) -> Finetuning:
    """Choose the training view and the validation part, and refuse options that the network lacks. Collective."""
    config, file = task.config, task.subject.file
    options = {name: getattr(config, name) for name in ("layer_decay", "drop_path")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not hasattr(build(file).get_submodule("backbone"), "group_matcher"):  # timm's networks have it
        each = " ".join(f"{name}={value}" for name, value in options.items())
        fix = f"remove {' and '.join(options)}"
        raise ConfigError(f"{each} needs a vision transformer or a timm network; {file.backbone} is neither: {fix}")
    if config.drop_path is not None:
        file = replace(file, options=file.options | {"drop_path_rate": config.drop_path})
    if config.bn == "frozen" and "untrained" in config.encoders:
        problem = "bn=frozen keeps the initial statistics of the untrained encoder, as if it had no batch normalization"
        warnings.warn(f"{problem}: compare with bn=sync", RunWarning, stacklevel=2)
    view = view_of(config, task.subject)
    if config.validation:
        labels = labels_of(task.train)
        with subsets.naming_field("validation", config.validation):
            rest, held = subsets.split_each_class(labels, config.validation, 0, VALIDATION, task.groups)
        task = replace(task, train=task.train.subset(rest), held_out=task.train.subset(held))
    return Finetuning(task, file, view)


def view_of(config: FinetuneConfig, subject: Subject) -> View:
    """Return the training view: the first one of the encoder's run, or else `DEFAULT_VIEW`, with the changes in `view`.

    Its size, mean and std are those of the evaluation.

    Raises:
        ConfigError: for an unknown field of `view`, or an invalid value.
    """
    known = {each.name for each in fields(View)}
    of_run = {name: value for name, value in subject.file.config.get("augment", {}).items() if name in known}
    with naming_plugins(subject.file.source, subject.file.config):
        return training_view(subject.transform, "view", config.view, of_run or DEFAULT_VIEW)


def pick(config: FinetuneConfig, labeled: Source, seed: int) -> NDArray[np.int64]:
    """Return the rows of the images whose labels are used.

    Raises:
        FileNotFoundError: if the list does not exist.
        ConfigError: if the selection is not possible, or a class has no image.
    """
    labels = labels_of(labeled)
    if config.labels_per_class:
        with subsets.naming_field("labels_per_class", config.labels_per_class):
            return subsets.per_class(labels, config.labels_per_class, seed)
    if fraction := fraction_of(config):
        return subsets.part_of_each_class(labels, fraction, seed)
    file = Path(config.subset_list)
    if not file.is_file():
        raise FileNotFoundError(f"subset_list={file} {'is no file' if file.exists() else 'does not exist'}")
    try:
        wanted = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"subset_list={file} is not a text file") from error
    with subsets.naming_field("subset_list", file):
        rows = subsets.listed([labeled.name(row) for row in range(len(labeled))], wanted)
    lacking = [labeled.classes[label] for label in np.setdiff1d(labels, labels[rows])]
    require(not lacking, f"subset_list={file} lists no image of {', '.join(lacking[:5])}: each class needs one")
    return rows


def _log_plan(run: Finetuning) -> Plan:
    task, config, file = run.task, run.task.config, run.task.subject.file
    images = len(pick(config, task.train, config.seed))
    plan = run.plan(images, config.seed)
    log(f"{file.source}: {file.backbone} ({file.layout}{file.trained})")
    classes = len(task.train.classes)
    split = "images of the training split" if config.validation else "held-out images"
    log(f"{_title(config)}: {images:,} of {len(task.train):,} images of {classes} classes")
    log(f"evaluated on {len(task.held_out):,} {split}, {config.seeds} seed{'s' * (config.seeds > 1)} per encoder")
    if plan.batch_size < config.batch_size:
        log(f"batch_size={config.batch_size} is lowered to {plan.batch_size}: there are {images} labeled images")
    if plan.epochs > config.epochs:
        raised = f"epochs={config.epochs} is raised to {plan.epochs} to reach min_steps={config.min_steps}"
        log(f"{raised}; lower min_steps for fewer epochs")
    sizes = f"steps per epoch: {plan.steps_per_epoch}, images per step: {plan.batch_size}"
    log(f"{plan.total_steps:,} steps: {plan.epochs} epochs, {sizes}")
    return plan


def _finetune(
    run: Finetuning, name: str, settings: dict[str, Any], supervision: Supervision, on_step: LogStep
) -> Result:
    """Train and evaluate one encoder with all seeds; save the network of the last seed."""
    task = run.task
    metrics, network, plan = train_and_measure(run, name, on_step, supervision)
    folder = _folder(task, name)
    own = evaluation.own_settings(task.config)
    steps = plan.total_steps + (task.subject.file.step if name == "pretrained" else 0)
    on_rank_zero(lambda: _save(task, network, folder, steps))
    details = {
        "settings": settings,
        "changed": evaluation.changed_settings(task.config, "finetune", [*(own.keys() - _NOT_LISTED), "seed"]),
        "labelled": plan.length,
        "figures": evaluation.summarize_seeds(metrics),
        "per_seed": [each.to_json() for each in metrics],
        "saved": str(folder.absolute()),
    }
    return Result(name, metrics, details)


def train_and_measure(
    run: Finetuning, name: str, on_step: LogStep, supervision: Supervision | None = None
) -> tuple[list[Metrics], nn.Sequential, Plan]:
    """Train one encoder, "pretrained" or "untrained", with each seed, and measure it on the held-out split.

    Returns the metrics of all seeds, and the network and the plan of the last seed. For `on_step`, see `LogStep`.
    Without `supervision`, no state is saved.
    """
    task, metrics = run.task, []
    heartbeat = supervision.heartbeat if supervision else lambda: None
    for seed in range(task.config.seed, task.config.seed + task.config.seeds):
        network, plan = _train(run, name, seed, supervision, on_step)
        scores = task.features(network, task.held_out, heartbeat=heartbeat)  # (M, L)
        metrics.append(compute_metrics(rank_classes(scores), labels_of(task.held_out), len(task.train.classes)))
        log(f"{run.title or name}, seed {seed}: {percent(metrics[-1].top1)} %")
    return metrics, network, plan


def _train(
    run: Finetuning, name: str, seed: int, supervision: Supervision | None, on_step: LogStep
) -> tuple[nn.Sequential, Plan]:
    task, config = run.task, run.task.config
    rows = pick(config, task.train, seed)
    picked = task.train.subset(rows)
    plan = run.plan(len(picked), seed)
    backbone = build(run.file, seed if name == "untrained" else None).get_submodule("backbone")
    classes = len(task.train.classes)
    network = classifier(backbone, classes, config.bn, seed).to(task.device)
    broadcast_module(network)
    shared = {name: getattr(config, name) for name in ("momentum", "betas", "weight_decay", "exclude")}
    optim = OptimConfig(name=config.optimizer, **shared)
    mix, precision = mixing(config.mixup, config.cutmix, classes), PRECISIONS[config.precision]
    optimizer = build_finetune_optimizer(network, optim, config.nesterov, config.head_lr_factor, config.layer_decay)
    settings = TrainSettings(config.lr, config.warmup, mix, config.label_smoothing, precision)
    forward, labels = wrap_ddp(network, task.device), torch.from_numpy(labels_of(picked)).to(task.device)

    def steps(start: int, after: OnStep) -> None:
        stream = batches(picked, plan, [run.view], task.device, task.data.workers, start)
        train(forward, optimizer, stream, labels, plan, settings, start, after)

    if supervision is None:
        steps(0, lambda step: on_step(lambda: f"{run.title or name}, seed {seed}: loss {step.loss:.3f}"))
    else:
        with supervision.watchdog.paused():  # reads the size and the time of each image file
            identity = digest(_identity(run, name, seed, plan, rows))
        training = ResumableTraining(_folder(task, name), name, seed, identity, plan.total_steps, plan.batch_size)
        train_resumably(supervision, training, network, optimizer, steps, on_step)
    return network, plan


def _identity(run: Finetuning, name: str, seed: int, plan: Plan, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Return all that the training of one encoder and seed depends on, to recognize its saved state. Collective."""
    settings = _settings(run, plan)
    data = data_with_absolute_paths(run.task.config, run.task.subject)
    for each in ("seeds", "encoders", "validation", "subset_list"):
        del settings[each]
    # The digest depends on the order of the keys: keep the order of earlier versions.
    last = ("precision", "view", "seed", "steps", "subset_list_sha256")
    settings |= {each: settings.pop(each) for each in last if each in settings}
    for each in ("workers", "download"):
        del data[each]
    weights, untrained = weights_digest(run.file, "backbone"), name == "untrained"
    images = {"data": data, "sha256": run.images, "rows": torch.from_numpy(rows)}
    return {"settings": settings, "untrained": untrained, "seed": seed, "images": images, "weights": weights}


def _folder(task: Task[FinetuneConfig], encoder: str) -> Path:
    return task.subject.output / "finetune" / f"{encoder}_{protocol(task.config)[1]}"


def _save(task: Task[FinetuneConfig], network: nn.Sequential, folder: Path, step: int) -> None:
    """Write the encoder in the format that other commands read, and the linear head with the names of the classes."""
    file, transform, of_run = task.subject.file, task.subject.transform, task.subject.file.config
    augment = {name: getattr(transform, name) for name in ("size", "mean", "std")} | {"eval_resize": transform.resize}
    config = of_run | {
        "model": of_run.get("model", {}) | {"backbone": file.backbone, "options": file.options},
        "augment": of_run.get("augment", {}) | augment,
        "data": data_with_absolute_paths(task.config, task.subject),
        "finetuned": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / "encoder.safetensors", network.get_submodule("backbone"), config, step)
    head = network.get_submodule("head").state_dict()
    save_weights(folder / "head.safetensors", head, {"classes": json.dumps(task.train.classes)})


def protocol(config: FinetuneConfig) -> tuple[str, str]:
    """Describe the selection of labels: in a text for results.json, and in a short form for a folder's name.

    The text must keep its wording, because results.json files of earlier versions contain it.
    """
    if fraction := fraction_of(config):
        text, short = f"{100 * fraction:g} % of labels", f"{100 * fraction:g}percent"
    elif config.labels_per_class:
        text, short = f"{config.labels_per_class} labels a class", f"{config.labels_per_class}perclass"
    else:  # the prefix distinguishes SimCLR's 1percent.txt from fraction=0.01
        text, short = f"labels of {Path(config.subset_list).name}", f"list_{Path(config.subset_list).stem}"
    return (f"{text}, validation", f"{short}_validation") if config.validation else (text, short)


def _title(config: FinetuneConfig) -> str:
    return protocol(config)[0].replace("labels a class", "labels per class")


def _settings(run: Finetuning, plan: Plan) -> dict[str, Any]:
    """Return all settings that reproduce the results."""
    config = run.task.config
    settings = evaluation.own_settings(config) | {"seed": config.seed}
    settings |= {"batch_size": plan.batch_size, "epochs": plan.epochs, "steps": plan.total_steps}
    settings |= {"view": asdict(run.view), "fraction": fraction_of(config)}
    if config.subset_list:
        file = Path(config.subset_list)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        settings |= {"subset_list": str(file.absolute()), "subset_list_sha256": sha256}
    return settings


def _show(task: Task[FinetuneConfig], plan: Plan, found: list[Result]) -> None:
    """Print the closing table."""
    config = task.config
    evaluation.show_results(
        f"fine-tuned, {_title(config)} ({plan.length:,} images, {plan.total_steps:,} steps)",
        found,
        {"each seed": [", ".join(percent(one.top1) for one in each.metrics) for each in found]},
        f"top-1: {evaluation.interval_note(config.seeds)}; evaluated on {len(task.held_out):,} images"
        + evaluation.frames_note(task.held_out),
    )
    if len(found) == 2 and config.seeds > 1:
        pairs = zip(*(each.metrics for each in found), strict=True)
        gain, half = mean_interval([one.top1 - two.top1 for one, two in pairs])
        names = " minus ".join(each.encoder for each in found)
        log(f"{names}, on the same images for each seed: {gain:+.1f} ± {half:.1f}")


def _log_files(task: Task[FinetuneConfig], found: list[Result], path: Path) -> None:
    """Print the written files and the next command."""
    config = task.config
    log(f"written: {path}")
    for each in found:
        log(f"saved: {_folder(task, each.encoder)}/encoder.safetensors and head.safetensors (of the last seed)")
    # The saved file contains what these fields describe.
    reset: Any = {"run": "", "output": "", "weights": "encoder", "backbone": None, "options": {}, "images": {}}
    encoder = _folder(task, found[0].encoder) / "encoder.safetensors"
    data = {"hold_out": config.data.hold_out} | fields_to_repeat(asdict(task.data), in_run_directory(encoder))
    log_next(command("moco.knn", config, **reset, data=data, checkpoint=str(encoder)))
