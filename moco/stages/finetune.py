"""Fine-tuning from a configuration to a table: pick the labelled pictures, train each encoder and seed, judge, save."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from moco.config import ConfigError, RunWarning, require
from moco.config.finetune import DEFAULT_FRACTION, FinetuneConfig
from moco.config.judge import JudgeConfig
from moco.data.keyed import VALIDATION
from moco.data.loader import Plan, batches
from moco.data.sources import Source, subset
from moco.data.view import View
from moco.distributed import broadcast_module, is_main, on_main, process_group
from moco.engine.display import duration
from moco.evaluation import subsets
from moco.evaluation.finetune import classifier, mixing, optimizer_of, plan_of, train
from moco.evaluation.metrics import Figures, HeldOut, figures, mean_interval
from moco.interop.encoder_file import EncoderFile, build, save_encoder
from moco.stages import results
from moco.stages.judged import Judged, data_config, features_of, open_judged, open_labelled
from moco.stages.setup import PRECISIONS, data_parallel, pick_device

FOREIGN: dict[str, Any] = {"crop_scale": [0.08, 1.0], "flip_p": 0.5}  # of a file that says no augmentation

OnStep = Callable[[str, float], None]


@dataclass(frozen=True)
class Task:
    """What every encoder and seed share."""

    config: FinetuneConfig
    judged: Judged
    file: EncoderFile  # the judged one, with drop-path where it is asked for
    labelled: Source
    held_out: Source
    view: View
    device: torch.device


@dataclass(frozen=True)
class Outcome:
    """What became of one encoder over all seeds."""

    encoder: str
    figures: list[Figures]  # one a seed
    saved: Path  # where the last seed's network is

    def top1(self) -> tuple[float, float | None]:
        return mean_interval([each.top1 for each in self.figures])

    def top5(self) -> float | None:
        values = [each.top5 for each in self.figures if each.top5 is not None]
        return float(np.mean(values)) if values else None


def run_finetune(config: FinetuneConfig) -> list[Outcome]:
    """See `moco.finetune.finetune`."""
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group(device):
        task = _open(config, device)
        plan = _announce(task)
        with _bar(len(config.encoders) * config.seeds * plan.total_steps) as on_step:
            outcomes = [_finetune(task, name, on_step) for name in config.encoders]
        file = on_main(lambda: results.record(task.judged.output, _entries(task, plan, outcomes), task.judged.step))
        _summarise(task, plan, outcomes, file)
    return outcomes


def _open(config: FinetuneConfig, device: torch.device) -> Task:
    judged = open_judged(config)
    file = judged.file
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
    view = view_of(config, judged)
    labelled, held_out = open_labelled(config, judged)
    if config.validation:
        assert labelled.labels is not None
        rows = subsets.part_of_each_class(labelled.labels, config.validation, 0, VALIDATION)
        rest = np.setdiff1d(np.arange(len(labelled)), rows)
        labelled, held_out = subset(labelled, rest), subset(labelled, rows)
    return Task(config, judged, file, labelled, held_out, view, device)


def view_of(config: FinetuneConfig, judged: Judged) -> View:
    """The training view: the run's first, or crops and a flip, at the size and colours of the judged pictures.

    Raises:
        ConfigError: for a field of `view` that is none, or a value that cannot be.
    """
    known = {each.name for each in fields(View)}
    of_run = {name: value for name, value in judged.file.config.get("augment", {}).items() if name in known}
    look = {"size": judged.look.size, "mean": judged.look.mean, "std": judged.look.std}
    for name in config.view:
        free = ", ".join(sorted(known - set(look)))
        require(name not in look, f"view.{name} would differ from what is judged: set images.{name} instead")
        require(name in known, f"view.{name} is no field of a view: there are {free}")
    told = (of_run or FOREIGN) | config.view | look
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    try:
        return View(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"view.{error}") from error


def pick(config: FinetuneConfig, labelled: Source, seed: int) -> NDArray[np.int64]:
    """Rows of the pictures whose labels are used.

    Raises:
        FileNotFoundError: if the list is not there.
        SubsetError: see `moco.evaluation.subsets`.
        ConfigError: if a class has no picture.
    """
    labels = labelled.labels
    assert labels is not None
    if config.labels_per_class:
        return subsets.so_many_of_each_class(labels, config.labels_per_class, seed)
    if not config.subset_list:
        return subsets.part_of_each_class(labels, config.fraction or DEFAULT_FRACTION, seed)
    file = Path(config.subset_list)
    if not file.is_file():
        raise FileNotFoundError(f"subset_list={file} does not exist")
    try:
        wanted = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        rows = subsets.listed([labelled.name(row) for row in range(len(labelled))], wanted)
    except subsets.SubsetError as error:
        raise subsets.SubsetError(f"subset_list={file}: {error}") from error
    except UnicodeDecodeError as error:
        raise subsets.SubsetError(f"subset_list={file} is no text") from error
    lacking = [labelled.classes[label] for label in np.setdiff1d(labels, labels[rows])]
    require(not lacking, f"subset_list={file} lists no picture of {', '.join(lacking[:5])}: each class needs one")
    return rows


def protocol(config: FinetuneConfig) -> tuple[str, str]:
    """What the labels are, for a person and for a folder's name."""
    if config.labels_per_class:
        said, short = f"{config.labels_per_class} labels a class", f"{config.labels_per_class}perclass"
    elif config.subset_list:
        said, short = f"labels of {Path(config.subset_list).name}", Path(config.subset_list).stem
    else:
        part = 100 * (config.fraction or DEFAULT_FRACTION)
        said, short = f"{part:g} % of labels", f"{part:g}percent"
    return (f"{said}, validation", f"{short}_validation") if config.validation else (said, short)


def _plan(task: Task, pictures: int, seed: int) -> Plan:
    return plan_of(pictures, task.config.batch_size, task.config.epochs, task.config.min_steps, seed)


def _announce(task: Task) -> Plan:
    config, file, say = task.config, task.judged.file, results.say
    pictures = len(pick(config, task.labelled, config.seed))
    plan = _plan(task, pictures, config.seed)
    say(f"{file.source}: {file.backbone} ({file.layout}, step {file.step})")
    classes = len(task.labelled.classes)
    judged_on = "pictures of the training split" if config.validation else "held-out pictures"
    say(f"{protocol(config)[0]}: {pictures:,} of {len(task.labelled):,} pictures of {classes} classes")
    say(f"judged on {len(task.held_out):,} {judged_on}, with {config.seeds} seed{'s' * (config.seeds > 1)} an encoder")
    if plan.batch_size < config.batch_size:
        say(f"batch_size={config.batch_size} is lowered to {plan.batch_size}: there are {pictures} labelled pictures")
    if plan.epochs > config.epochs:
        say(f"epochs={config.epochs} is raised to {plan.epochs}: min_steps={config.min_steps} asks for so many steps")
    say(f"{plan.total_steps:,} steps: {plan.epochs} epochs of {plan.steps_per_epoch} with {plan.batch_size} pictures")
    return plan


def _finetune(task: Task, name: str, on_step: OnStep) -> Outcome:
    """One encoder over all seeds; the last one's network is saved."""
    found = []
    for seed in range(task.config.seed, task.config.seed + task.config.seeds):
        network, plan = _trained(task, name, seed, on_step)
        judge = HeldOut(
            lambda network=network: features_of(network, task.held_out, task.judged, task.config, task.device),
            np.asarray(task.held_out.labels),
        )
        found.append(figures(*judge.open()))
        results.say(f"{name}, seed {seed}: {results.percent(found[-1].top1)} %")
    folder = task.judged.output / "finetune" / f"{name}_{protocol(task.config)[1]}"
    steps = plan.total_steps + (task.judged.step if name == "pretrained" else 0)
    on_main(lambda: _save(task, network, folder, steps))
    return Outcome(name, found, folder)


def _trained(task: Task, name: str, seed: int, on_step: OnStep) -> tuple[nn.Sequential, Plan]:
    config = task.config
    picked = subset(task.labelled, pick(config, task.labelled, seed))
    plan = _plan(task, len(picked), seed)
    backbone = build(task.file, seed if name == "untrained" else None).get_submodule("backbone")
    classes = len(task.labelled.classes)
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
        data_parallel(network, task.device),
        optimizer,
        batches(picked, plan, [task.view], task.device, data_config(config, task.judged).workers),
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
    file, look, of_run = task.judged.file, task.judged.look, task.judged.file.config
    augment = {name: getattr(look, name) for name in ("size", "mean", "std")} | {"eval_resize": look.resize}
    config = of_run | {
        "model": of_run.get("model", {}) | {"backbone": file.backbone, "options": file.options},
        "augment": of_run.get("augment", {}) | augment,
        "data": asdict(data_config(task.config, task.judged)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / "encoder.safetensors", network.get_submodule("backbone"), config, step)
    head = {key: value.contiguous().cpu() for key, value in network.get_submodule("head").state_dict().items()}
    save_file(head, folder / "head.safetensors", {"classes": json.dumps(task.labelled.classes)})


def _entries(task: Task, plan: Plan, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    common = {each.name for each in fields(JudgeConfig)} - {"seed", "weights"}
    settings = {name: value for name, value in asdict(task.config).items() if name not in common}
    made = {"batch_size": plan.batch_size, "epochs": plan.epochs, "steps": plan.total_steps}
    return [
        {
            "command": "finetune",
            "encoder": outcome.encoder,
            "protocol": protocol(task.config)[0],
            "source": task.judged.file.source,
            "step": task.judged.step,
            "data": asdict(data_config(task.config, task.judged)) | {"hold_out": task.config.data.hold_out},
            "images": asdict(task.judged.look),
            "settings": settings | made,
            "labelled": plan.length,
            "figures": {"top1": outcome.top1()[0], "top1_half_width95": outcome.top1()[1], "top5": outcome.top5()},
            "per_seed": [each.plain() for each in outcome.figures],
            "saved": str(outcome.saved),
        }
        for outcome in outcomes
    ]


def _summarise(task: Task, plan: Plan, outcomes: list[Outcome], file: Path) -> None:
    rows = []
    for outcome in outcomes:
        mean, half = outcome.top1()
        low, high = outcome.figures[0].interval()
        shown = results.percent(mean, half) if half is not None else f"{mean:.1f} ({low:.1f} … {high:.1f})"
        seeds = ", ".join(results.percent(each.top1) for each in outcome.figures)
        rows.append([outcome.encoder, shown, results.percent(outcome.top5()), seeds])
    repeats = task.config.seeds
    meaning = f"± half of Student's 95 % interval over {repeats} seeds" if repeats > 1 else "Wilson's 95 % interval"
    results.table(
        f"fine-tuned, {protocol(task.config)[0]} ({plan.length:,} pictures, {plan.total_steps:,} steps)",
        ["encoder", "top-1 %", "top-5 %", "each seed"],
        rows,
        f"{meaning}; judged on {len(task.held_out):,} pictures",
    )
    if len(outcomes) == 2 and repeats > 1:
        gain, half = mean_interval(
            [one.top1 - two.top1 for one, two in zip(*(o.figures for o in outcomes), strict=True)]
        )
        names = " less ".join(outcome.encoder for outcome in outcomes)
        results.say(f"{names}, on the same pictures seed by seed: {gain:+.1f} ± {half:.1f}")
    results.say(f"written: {file}")
    for outcome in outcomes:
        results.say(f"saved: {outcome.saved}/encoder.safetensors and head.safetensors (the last seed)")
    held = f" data.hold_out={task.config.data.hold_out}" if task.config.data.hold_out else ""
    results.say(f"next: python -m moco.knn checkpoint={outcomes[0].saved}/encoder.safetensors{held}")


@contextmanager
def _bar(total: int) -> Iterator[OnStep]:
    """A bar over all steps of all encoders and seeds; without a terminal a line every half minute. Rank 0 only."""
    console = Console(quiet=not is_main(), highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = said = time.monotonic()
    done = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def on_step(what: str, loss: float) -> None:
            nonlocal said, done
            done += 1
            line = f"{what}: loss {loss:.3f}"
            bar.update(task, completed=done, description=line)
            if not console.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                left = duration((said - began) / done * (total - done))
                results.say(f"step {done}/{total} · {line} · left {left}")

        yield on_step
