"""`python -m moco.linear`: the linear probe of an encoder and of its baselines, all by one protocol.

Legend: M images, D feature dimension, L classes.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import ConfigError, OptimConfig, RunWarning, require
from moco.config.data import FOLDERS
from moco.config.linear import LinearConfig
from moco.data.keyed import VALIDATION
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Source
from moco.digest import digest
from moco.distributed import on_rank_zero, rank, world_size
from moco.evaluation import task as evaluation
from moco.evaluation.average_precision import AveragePrecision, average_precision
from moco.evaluation.cache import cached
from moco.evaluation.features import pixels, stream
from moco.evaluation.layers import OUTPUT, LayerFeatures
from moco.evaluation.linear_probe import LinearHead, fitting_batch, new_head, save_head, train_head
from moco.evaluation.metrics import Metrics, compute_metrics, rank_classes
from moco.evaluation.subject import encoders, is_other_data, labels_of, targets_of, weights_digest
from moco.evaluation.subsets import SubsetError, split_each_class
from moco.evaluation.sweep import Choice, LabeledFeatures, Recipe, choose, retrain
from moco.evaluation.task import Result, Task, training_view
from moco.files import atomic_write, resolved
from moco.models.encoder import Encoder
from moco.optim.schedules import scaled_lr
from moco.runs.comparison import label
from moco.runs.results import prepare
from moco.runtime.console import log, log_next, percent, progress_bar
from moco.runtime.device import float64_device
from moco.runtime.next_command import command
from moco.runtime.precision import PRECISIONS

_CHUNK = 4096  # rows at once through a head
_MOST_CLASSES = 100  # with more classes, no image of the confusion matrix is written
_MOST_CLASSES_WITH_COUNTS = 30  # with more classes, the cells of that image are too small for their counts


@dataclass(frozen=True, eq=False)
class Probe:
    """The trained heads of one encoder."""

    metrics: list[Any]  # one per seed, see `Result`
    heads: list[LinearHead]  # one per seed
    chosen: list[dict[str, Any]]  # per seed: layer, lr, weight_decay; for a sweep also the validation accuracy
    settings: dict[str, Any]  # the batch size that was used and, for the official protocols, the peak learning rate
    problem: str = ""  # why the result says little about the encoder; "" without a problem


def evaluate_linear(config: LinearConfig) -> None:
    """Run the linear probe of an encoder and its baselines. Errors: see `open_task`."""
    with evaluation.open_task(config) as task:
        file = task.subject.file
        prepare(task.subject.output)
        log(
            f"{config.protocol}: {file.source} ({file.backbone}{file.trained}) on {task.data.name}, "
            f"{len(task.train):,} training and {len(task.held_out):,} held-out images of {len(task.train.classes)} "
            f"classes, {task.device.type}, {world_size()} process{'es' * (world_size() > 1)}"
        )
        probe = _sweep if config.kind == "sweep" else _official
        networks = encoders(task.subject, config.compare, task.device)
        probes = {name: probe(task, name, encoder) for name, encoder in networks}
        if "pixels" in config.compare:
            probes["pixels"] = _sweep(task, "pixels", None)
        found = [Result(name, each.metrics, _details(config, each)) for name, each in probes.items()]
        head = task.subject.output / f"{_file_name(task)}.safetensors"
        found[0].details["saved"] = str(head.absolute())  # of the entry "pretrained"
        # Before writing: the results stay visible if writing fails.
        _show(config, found, evaluation.frames_note(task.held_out))
        for each in probes.values():
            if each.problem:
                log(each.problem)
        path = evaluation.record_results(task, "linear", config.protocol, found)
        files = on_rank_zero(lambda: [path, *_save_files(task, probes["pretrained"])])
        log(f"written to {task.subject.output}: {', '.join(each.name for each in files)}")
        _log_next(task)


def _sweep(task: Task[LinearConfig], name: str, encoder: Encoder | None) -> Probe:
    """Train many heads on fixed features, and evaluate on the held-out split.

    The setting is chosen by the accuracy on a part of the training split. A head with this setting is then trained on
    the full training split.
    """
    config, labels = task.config, targets_of(task.train)
    try:  # before features are computed: `choose` makes the same split
        split_each_class(labels, config.sweep.validation, config.seed, VALIDATION, task.groups)
    except SubsetError as error:
        raise ConfigError(f"{error}, or set protocol=moco_v2, which needs no validation images") from error
    if encoder is None:
        network, columns = None, {"pixels": slice(0, len(task.subject.transform.mean) * task.subject.transform.size**2)}
    else:
        network = _layers(task, encoder.get_submodule("backbone"))
        columns = network.columns
    train = _features(task, network, task.train, f"{name}: features of the training images")
    data = LabeledFeatures(train, columns, labels, len(task.train.classes), float64_device(task.device), task.groups)
    seeds = range(config.seed, config.seed + config.seeds)
    choices, heads = zip(*(_choose_and_retrain(task, name, data, seed) for seed in seeds), strict=True)
    test = _features(task, network, task.held_out, f"{name}: features of the held-out images")
    batch_size = min(config.batch_size, len(labels) - choices[0].count)
    if name == "pretrained":
        _log_lowered(config, batch_size, f"{len(labels) - choices[0].count} images remain for training")
    metrics = [
        _evaluated(task, head, test[:, columns[choice.setting.layer]])
        for head, choice in zip(heads, choices, strict=True)
    ]
    validated = "validation_top1" if labels.ndim == 1 else "validation_mAP"
    chosen = [asdict(one.setting) | {validated: one.accuracy, "validation_count": one.count} for one in choices]
    return Probe(metrics, list(heads), chosen, {"batch_size": batch_size})


def _choose_and_retrain(
    task: Task[LinearConfig], name: str, data: LabeledFeatures, seed: int
) -> tuple[Choice, LinearHead]:
    config, sweep = task.config, task.config.sweep
    recipe = Recipe(config.epochs, config.batch_size, config.momentum, sweep.normalize, seed)
    heads_per_layer = len(sweep.lrs) * len(sweep.weight_decays)
    with progress_bar(f"{name}: {heads_per_layer} heads per layer, epochs") as bar:
        choice = choose(data, sweep.lrs, sweep.weight_decays, sweep.validation, recipe, bar)
    if len(sweep.lrs) > 1 and choice.setting.lr == max(sweep.lrs):
        of_seed = f", seed {seed}" * (config.seeds > 1)
        best = f"the best learning rate, {choice.setting.lr:g}, is the highest of sweep.lrs"
        log(f"{name}{of_seed}: {best}: try higher ones too")
    weight, bias = retrain(data, choice.setting, recipe)
    return choice, LinearHead(weight, bias, _about_head(task, choice.setting.layer, unit=sweep.normalize == "l2"))


def _official(task: Task[LinearConfig], name: str, encoder: Encoder) -> Probe:
    """Follow main_lincls.py: augmented images and a fixed setting, so no validation images are needed."""
    config, official = task.config, task.config.official
    backbone = encoder.get_submodule("backbone")
    network, view = _layers(task, backbone), training_view(task.subject.transform, "augment", config.augment)
    batch_size = fitting_batch(config.batch_size, len(task.train))
    even = batch_size // world_size() * world_size()
    require(
        batch_size == even,
        f"batch_size={batch_size}, lowered because the training split has {len(task.train)} images, must be a multiple "
        f"of the {world_size()} processes: use fewer processes{f', or set batch_size={even}' if even else ''}",
    )
    lr = scaled_lr(official.lr, batch_size, official.base_batch)
    shared = {name: getattr(official, name) for name in ("schedule", "milestones", "gamma", "weight_decay")}
    optim = OptimConfig(lr=lr, per_epoch=True, momentum=config.momentum, **shared)
    if name == "pretrained":
        _log_lowered(config, batch_size, f"the training split has {len(task.train)} images")
    if official.schedule == "step" and any(each >= config.epochs for each in official.milestones):
        problem = f"official.milestones={official.milestones} has values that are not below epochs={config.epochs}"
        fix = "so the learning rate is not lowered there: reduce or remove them"
        warnings.warn(f"{problem}, {fix}", RunWarning, stacklevel=2)
    labels = torch.from_numpy(targets_of(task.train)).to(task.device)
    heads: list[LinearHead] = []
    for seed in range(config.seed, config.seed + config.seeds):
        plan = Plan(len(task.train), batch_size, config.epochs, seed, rank(), world_size())
        head = new_head(network.width, len(task.train.classes), official.head_std, seed).to(task.device)
        views = batches(task.train, plan, [view], task.device, task.data.workers)
        with evaluation.progress_log(f"{name}: epoch", config.epochs) as log_epoch:
            given = backbone, head, views, labels, plan, optim, lambda line: log_epoch(lambda: line)
            epochs = train_head(*given, PRECISIONS[config.precision])
        heads.append(LinearHead(head.weight.detach(), head.bias.detach(), _about_head(task, OUTPUT, unit=False)))
    test = _features(task, network, task.held_out, f"{name}: features of the held-out images")
    metrics = [_evaluated(task, head, test) for head in heads]
    chosen = {"layer": OUTPUT, "lr": optim.lr, "weight_decay": official.weight_decay}
    settings = {"batch_size": batch_size, "peak_lr": optim.lr}
    problem = _problem(name, official.lr, [loss for loss, _ in epochs], metrics[-1])
    return Probe(metrics, heads, [chosen] * len(heads), settings, problem)


def _problem(encoder: str, lr: float, losses: Sequence[float], metrics: Metrics | AveragePrecision) -> str:
    """Return a sentence if training failed: the loss rose, or the accuracy is that of a guess; "" otherwise."""
    classes, first, last = len(metrics.per_class), losses[0], losses[-1]
    chance, loss_of_guess = 100 / classes, math.log(classes)
    found = ""
    if not isinstance(metrics, AveragePrecision) and metrics.interval()[0] <= chance:
        found = f"top-1 is {metrics.top1:.1f} %, and a guess has {chance:.1f} %"
    if found and abs(last - loss_of_guess) < 0.05 * loss_of_guess:  # the scores of all classes are still similar
        found += f"; the training loss, {last:.3g}, is that of a guess too"
        fix = "a higher official.lr, or more epochs, or "
    elif last > first:
        found, fix = f"the training loss rose from {first:.3g} to {last:.3g}", "a lower official.lr, or "
    elif not found:
        return ""
    elif last > loss_of_guess:
        found += f"; the training loss is {last:.3g}, above that of a guess, {loss_of_guess:.3g}"
        fix = "a lower official.lr, or "
    else:
        found, fix = f"{found}, although the training loss fell to {last:.3g}", ""
    unsuitable = f"official.lr={lr:g} is unsuitable and " * bool(fix)
    advice = f"set {fix}protocol=sweep, which chooses the learning rate"
    return f"{encoder}: {found}, so {unsuitable}the result says little about this encoder; {advice}"


def _log_lowered(config: LinearConfig, batch_size: int, reason: str) -> None:
    if batch_size < config.batch_size:
        log(f"batch_size={config.batch_size} is lowered to {batch_size}: {reason}")


def _layers(task: Task[LinearConfig], backbone: nn.Module) -> LayerFeatures:
    try:
        return LayerFeatures(backbone, task.config.sweep.layers, task.subject.transform.size)
    except ValueError as error:
        raise ConfigError(f"sweep.layers: {error}") from error


def _features(task: Task[LinearConfig], network: LayerFeatures | None, source: Source, description: str) -> Tensor:
    """Return the features (M, D) of the network's layers, or without a network the raw pixels."""
    if network is None:
        return task.features(pixels, source)
    if task.config.sweep.cache == "memory":
        return task.features(network, source, description)
    transform = task.subject.transform
    # The names of the parts stay as they are: they are part of the key of existing files.
    parts = {"weights": network.backbone.state_dict(), "look": asdict(transform), "layers": network.layers}
    parts |= {"precision": task.config.precision} if task.config.precision != "fp32" else {}
    parts |= {"network": task.subject.file.backbone, "pictures": on_rank_zero(lambda: source.content_digest())}
    folder = task.subject.output / "features"
    with evaluation.monitored(network, len(source), description) as forward:

        def compute(rows: Sequence[int]) -> Iterator[Tensor]:
            return stream(forward, source, rows, transform, task.inference)

        try:
            return cached(folder, digest(parts)[:24], len(source), network.width, compute)
        except OSError as error:
            raise ConfigError(f"output: {folder} cannot be written to ({error.strerror}): set output=DIR") from error


def _evaluated(task: Task[LinearConfig], head: LinearHead, features: Tensor) -> Metrics | AveragePrecision:
    """Return the metrics on the held-out images.

    The features (M, D) need not fit into memory. If images have one class each, the scores (M, L) need not fit either.
    """
    trained, truth = task.train.multi_labels, task.held_out.multi_labels
    device = float64_device(task.device)
    if trained is not None and truth is not None:
        scores = torch.cat([head(part.to(device)).cpu() for part in features.split(_CHUNK)])
        return average_precision(scores, truth, trained)
    ranked = torch.cat([rank_classes(head(part.to(device))) for part in features.split(_CHUNK)])
    return compute_metrics(ranked, labels_of(task.held_out), len(task.train.classes))


def _about_head(task: Task[LinearConfig], layer: str, unit: bool) -> dict[str, Any]:
    """Return the metadata of a classifier's file."""
    file, transform = task.subject.file, asdict(task.subject.transform)
    about = {"layer": layer, "unit": unit, "classes": list(task.train.classes), "protocol": task.config.protocol}
    about |= {"settings": _settings(task.config), "changed": changed_settings(task.config)}
    about |= {"data": {name: getattr(task.data, name) for name in ("name", "root", "eval_root")}}
    about |= {"encoder": str(Path(file.source).absolute()), "backbone": file.backbone, "options": dict(file.options)}
    return about | {"sha256": weights_digest(file, "backbone"), "step": file.step, "look": transform}


def _details(config: LinearConfig, probe: Probe) -> dict[str, Any]:
    """Return the command's own keys of a results.json entry."""
    first, several = probe.metrics[0], len(probe.metrics) > 1
    mean = evaluation.summarize_seeds(probe.metrics) | {"count": first.count}
    return {
        "settings": _settings(config) | probe.settings,
        "changed": changed_settings(config),
        "chosen": probe.chosen,
        "figures": mean if several else first.to_json(),
        **({"problem": probe.problem} if probe.problem else {}),
        "each_seed": [each.to_json() for each in probe.metrics] if several else None,
    }


def _settings(config: LinearConfig) -> dict[str, Any]:
    """Return the fields that protocols of this kind, sweep or official, use."""
    of_kind = ["official", "augment"] if config.kind == "official" else ["sweep"]
    values = asdict(config)
    names = ["kind", "epochs", "batch_size", "momentum", "precision", "seed", "seeds", *of_kind]
    return {name: values[name] for name in names}


def changed_settings(config: LinearConfig) -> dict[str, Any]:
    """Return the settings that differ from the protocol's file in configs/protocol/; {} if it has no file there."""
    protocol = f"protocol/{config.protocol}"
    names = _settings(config) if evaluation.yaml_fields(protocol) else {}
    return evaluation.changed_settings(config, protocol, names)


def _file_name(task: Task[LinearConfig]) -> str:
    """Return the files' name without extension; it contains the data's name if the images are not those of the run."""
    data, recorded = task.data, task.subject.file.config.get("data", {})
    name = "linear" if task.config.protocol == "sweep" else f"linear_{task.config.protocol}"
    if task.config.output or not recorded:
        return name
    if is_other_data(task.config, task.subject):
        return f"{name}_on_{Path(data.root).name if data.name in FOLDERS else data.name}"
    held_out = [resolved(Path(each).expanduser()) for each in (data.eval_root, recorded.get("eval_root")) if each]
    same = not data.eval_root or held_out[1:] == held_out[:1]
    return name if same else f"{name}_on_{Path(data.eval_root).name}"


def _save_files(task: Task[LinearConfig], probe: Probe) -> list[Path]:
    """Write the first seed's head and confusion matrix; on rank 0."""
    protocol, name = task.config.protocol, _file_name(task)
    files = [task.subject.output / f"{name}.safetensors"]
    save_head(files[0], probe.heads[0])
    classes, metrics = task.train.classes, probe.metrics[0]
    if len(classes) <= _MOST_CLASSES and task.train.multi_labels is None:  # no confusion matrix of several labels
        path = task.subject.output / f"confusion_{name}.png"
        title = f"linear, {protocol}: top-1 {metrics.top1:.1f} %"
        draw_confusion(metrics.confusion, classes, title, path)
        files.append(path)
    return files


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> None:
    """Write counts (L, L) as a PNG: rows are true classes, columns predictions; darker: a larger share of the row."""
    from matplotlib.figure import Figure  # here, because its import takes half a second

    count = len(classes)
    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))  # (L, L)
    side = max(5.0, 0.45 * count if count <= _MOST_CLASSES_WITH_COUNTS else 0.16 * count)  # inches
    font = 8 if count <= _MOST_CLASSES_WITH_COUNTS else 6
    figure = Figure(figsize=(side + 1, side + 1), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the root makes a confusion of 1 % visible
    scale = figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    percents = np.array([0, 1, 5, 25, 50, 100])
    scale.set_ticks(np.sqrt(percents / 100).tolist(), labels=[f"{each} %" for each in percents])
    axes.set(title=title, xlabel="prediction", ylabel="true class")
    axes.set_xticks(range(count), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(count), classes, fontsize=font)
    if count <= _MOST_CLASSES_WITH_COUNTS:
        for row, column in zip(*confusion.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.4 else "black"
            number = str(confusion[row, column])
            axes.text(column, row, number, ha="center", va="center", fontsize=font - 1, color=color)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _show(config: LinearConfig, found: list[Result], remark: str) -> None:
    extra: dict[str, list[str]] = {}
    first = [each.details["chosen"][0] for each in found]
    several = found[0].several_labels
    note = f"top-1: {evaluation.interval_note(config.seeds)}"
    if several:
        note = "mAP: the mean over the classes of the average precision"
        note += f"; {evaluation.interval_note(config.seeds)}" * (config.seeds > 1)
    note += "; setting and files are the first seed's" * (config.seeds > 1) + remark
    if config.kind == "sweep":
        extra["validation %"] = [percent(each["validation_mAP" if several else "validation_top1"]) for each in first]
        part = "the training images" if several else "each training class"
        note += (
            f".\nThe setting was chosen on {100 * config.sweep.validation:.0f} % of {part}; a head with "
            "it was then trained on the full training split. The held-out split was used once, at the end."
        )
    else:
        note += ".\nThe result is that of the last epoch. The weights and buffers of the backbone are unchanged."
    extra["setting"] = [
        f"{each['layer']}, " * (each["layer"] not in (OUTPUT, "pixels"))
        + f"lr {each['lr']:g}, wd {each['weight_decay']:g}"
        for each in first
    ]
    changed = changed_settings(config) | evaluation.changed_images(config)
    title = label({"command": "Linear probe", "protocol": config.protocol, "changed": changed})
    evaluation.show_results(title, found, extra, note)


def _log_next(task: Task[LinearConfig]) -> None:
    config = task.config
    fields: dict[str, Any] = {}
    if not config.compare:
        fields["compare"] = ["untrained", "pixels"] if config.kind == "sweep" else ["untrained"]
        if config.protocol != "sweep":
            fields["protocol"] = config.protocol
        fields |= changed_settings(config)
        reason = "baselines show what pretraining gained"
    elif config.kind == "sweep":
        digits = task.data.name == "digits"
        fields["protocol"] = "moco_v2_digits" if digits else "moco_v2"
        reason = f"the published protocol, with augmented images{' (here with views for digits)' * digits}"
    else:
        reason = "chooses learning rate, weight decay and layer on a validation part, in seconds"
    log_next(command("moco.linear", config, **fields), reason)
