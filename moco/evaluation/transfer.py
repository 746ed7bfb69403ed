"""`python -m moco.transfer`: several encoders on many labeled data sets, all by one protocol.

Legend: M images, D feature dimension, L classes.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.config import ConfigError, require
from moco.config.base import HUB
from moco.config.subject import SubjectConfig
from moco.config.transfer import TransferConfig
from moco.digest import digest
from moco.distributed import is_rank_zero, on_rank_zero
from moco.evaluation.features import extract
from moco.evaluation.few_shot import Episodes, draw_episodes, episode_accuracies
from moco.evaluation.logistic_regression import STRENGTHS, choose_and_fit
from moco.evaluation.metrics import Metrics, compute_metrics, mean_interval, rank_classes
from moco.evaluation.subject import Subject, open_subject, weights_digest
from moco.evaluation.subsets import naming_field
from moco.evaluation.svm import COSTS, FOLDS, evaluate_svm
from moco.evaluation.task import monitored
from moco.evaluation.transfer_data import MEASURES, Part, Splits, check_names, is_fixed, open_set
from moco.evaluation.transfer_results import FOLDER, SetResults, read_results, result_file, show, write_results
from moco.interop.encoder_file import build
from moco.runs.results import prepare, record
from moco.runtime.console import log, log_next, progress_bar
from moco.runtime.device import compute_context
from moco.runtime.next_command import command
from moco.runtime.output_directory import lock_directory

OWN = ("pretrained", "untrained")  # entries of `encoders` that stand for the encoder of run or checkpoint
# The fields on which the results of a mode depend, besides the encoders and the data.
SETTINGS = {"linear": ("validation", "hold_out", "seed"), "few_shot": ("ways", "shots", "queries", "episodes", "seed")}
NOTES = {
    "linear": "logistic regression on frozen features, its strength chosen on validation images; mAP: a linear SVM per "
    "class; in parentheses or after ±: the 95 % interval due to the number of test images",
    "few_shot": "nearest mean of {shots} labeled images per class, {queries} queries per class; mean of {episodes} "
    "episodes ± half of its 95 % interval",
}
DEFAULTS = TransferConfig(sets=["data"], encoders=["pretrained", "untrained"])  # those of configs/transfer.yaml


@dataclass(frozen=True, eq=False)
class Candidate:
    """An encoder to evaluate."""

    name: str  # its entry in `encoders`
    subject: Subject
    seed: int | None  # of initial weights; None: the file's weights
    digest: str  # of the weights and the preparation of images


def evaluate_transfer(config: TransferConfig) -> list[SetResults]:
    """Evaluate each encoder on each data set, and print and record one table.

    Results that an earlier call recorded with the same settings, images and weights are not computed again.

    Returns:
        The results of each data set, the same on every rank.

    Raises:
        ConfigError, FileNotFoundError, ValueError: for an unknown data set, data or an encoder that cannot be used.
    """
    check_names(config.sets)
    with compute_context(config) as device, ExitStack() as locks:
        candidates = open_candidates(config)
        output = candidates[0].subject.output
        prepare(output)
        on_rank_zero(lambda: bool(locks.enter_context(lock_directory(output / FOLDER, "output"))))
        found = [_evaluate_set(name, config, candidates, device) for name in config.sets]
        _report(config, found, output)
    return found


def open_candidates(config: TransferConfig) -> list[Candidate]:
    """Read the encoders of `encoders`, in this order.

    Raises:
        ConfigError: for an encoder that cannot be read, or takes images of other channels than the first.
        FileNotFoundError, ValueError: for the encoder of run or checkpoint; see `open_subject`.
    """
    own = open_subject(config)
    found = []
    for name in config.encoders:
        subject, seed = own, None
        if name == "untrained":
            seed = int(own.file.config.get("seed", 0))
        elif name != "pretrained":
            subject = _open_other(name, config)
        about: dict[str, Any] = {"weights": weights_digest(subject.file, "backbone"), "look": asdict(subject.transform)}
        if seed is not None:
            about["weights"] = [subject.file.backbone, subject.file.options, subject.file.channels, seed]
        found.append(Candidate(name, subject, seed, digest(about)))
        same = subject.file.channels == own.file.channels
        require(same, f"encoders={name} takes images of {subject.file.channels} channels, not {own.file.channels}")
    return found


def _open_other(name: str, config: TransferConfig) -> Subject:
    is_run = not name.startswith(HUB) and Path(name).is_dir()
    other = SubjectConfig(run=name if is_run else "", checkpoint="" if is_run else name, images=config.images)
    try:
        return open_subject(other)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"encoders={name}: {error}") from error


def _evaluate_set(
    name: str, config: TransferConfig, candidates: Sequence[Candidate], device: torch.device
) -> SetResults:
    """Evaluate the encoders that have no fitting result on one data set; write the file after each of them."""
    output = candidates[0].subject.output
    file, settings = (
        result_file(output, name, config.mode),
        {each: getattr(config, each) for each in SETTINGS[config.mode]},
    )
    # The images of a name never change; for others the digest is needed, so they are opened first.
    splits = None if is_fixed(name) else open_set(name, config, candidates[0].subject)
    wanted = SetResults(name, config.mode, settings | {"images": splits.digest() if splits else name})
    found, problem = on_rank_zero(lambda: read_results(file, wanted))
    digests = {each.name: each.digest for each in candidates}
    missing = found.lacking(digests)
    for each in missing:
        if each in found.encoders:
            log(f"{name}: {each} has other weights, or another preparation of images, than in {file}: evaluated again")
    if problem:
        log(problem)
    if len(missing) < len(candidates):
        log(f"{name}: {len(candidates) - len(missing)} of {len(candidates)} encoders are already in {file}")
    if not missing:
        return found
    splits = splits or open_set(name, config, candidates[0].subject)
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    sizes = {part: len(images.source) if images else 0 for part, images in parts.items()}
    found.about = {"measure": splits.measure, "classes": splits.classes} | sizes
    counted = ", ".join(f"{count:,} {part}" for part, count in sizes.items() if count)
    log(f"{name}: {splits.classes} classes; images: {counted}")
    measure = {"linear": _linear, "few_shot": _few_shot}[config.mode](name, splits, config)
    for candidate in candidates:
        if candidate.name in missing:
            result = measure(_Features(candidate, config, device, f"{name}, {candidate.name}"))
            found.encoders[candidate.name] = {"digest": candidate.digest} | result
            on_rank_zero(lambda: _write(file, found, candidate, output))  # noqa: B023 # called at once
    return found


@dataclass(frozen=True, eq=False)
class _Features:
    """Computes the features of one encoder."""

    candidate: Candidate
    config: TransferConfig
    device: torch.device
    title: str

    def __call__(self, *parts: Part) -> list[Tensor]:
        """Return the features (M, D) of each part, on every rank."""
        subject, config = self.candidate.subject, self.config
        backbone = build(subject.file, self.candidate.seed).backbone.to(self.device)
        found = []
        for part in parts:
            with monitored(backbone, len(part.source), f"{self.title}: {len(part.source):,} images") as network:
                rest = self.device, config.images_at_once, config.data.workers
                found.append(extract(network, part.source, subject.transform, *rest))
        return found


Measure = Callable[[_Features], dict[str, Any]]  # the features of an encoder -> its result


def _linear(name: str, splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of a linear classifier, whose regularization is chosen without test images. Collective."""
    if splits.measure == "voc_map":
        return _svm(splits, config)
    train, validation = splits.with_validation(config)
    truth = splits.test.labels

    def metrics_of(scores: Tensor, labels: NDArray[np.int64]) -> Metrics:
        return compute_metrics(rank_classes(scores), labels, splits.classes)

    def measure(features: _Features) -> dict[str, Any]:
        x, held, queries = features(train, validation, splits.test)
        labels, held_labels = (part.labels for part in (train, validation))
        with progress_bar(f"{features.title}: choosing the strength", quiet=not is_rank_zero()) as progress:
            classifier, choice = choose_and_fit(
                ((x, labels), (held, held_labels)),
                splits.classes,
                lambda scores: _value(metrics_of(scores, held_labels), splits.measure),
                STRENGTHS,
                progress,
            )
        metrics = metrics_of(classifier(queries), truth)
        if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
            log(
                f"{features.title}: the strength {choice.strength:g} is at the end of the range that the protocol tries"
            )
        figures = metrics.to_json()
        del figures["confusion"]  # of 100 classes and many sets
        result: dict[str, Any] = {"value": _value(metrics, splits.measure), "figures": figures}
        if splits.measure == "top1":
            result["interval95"] = list(metrics.interval())
        else:
            result["half_width95"] = class_mean_half_width(metrics.per_class, np.bincount(truth))
        validated = {"strength": choice.strength, "validation": list(choice.scores), "validation_count": len(held)}
        return result | {"chosen": validated}

    return measure


def _value(metrics: Metrics, measure: str) -> float:
    value = metrics.top1 if measure == "top1" else metrics.balanced
    assert value is not None
    return value


def class_mean_half_width(per_class: Sequence[float | None], counts: NDArray[np.int64]) -> float:
    """Return half of the 95 % interval, in percent, of the mean of accuracies of classes with these numbers of images.

    Each class is a binomial of its own. Two right and two wrong images are added to each (Agresti and Coull, 1998), so
    that a class without errors does not count as certain.
    """
    known = [(share / 100, int(count)) for share, count in zip(per_class, counts, strict=True) if share is not None]
    adjusted = [((share * count + 2) / (count + 4), count + 4) for share, count in known]
    variance = sum(share * (1 - share) / count for share, count in adjusted) / len(adjusted) ** 2
    return 100 * 1.959963984540054 * math.sqrt(variance)


def _svm(splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of a linear SVM per class, trained on training and validation images."""
    parts = [part for part in (splits.train, splits.validation) if part is not None]
    labels = np.concatenate([part.labels for part in parts])

    def measure(features: _Features) -> dict[str, Any]:
        *training, queries = features(*parts, splits.test)
        with progress_bar(f"{features.title}: SVM per class", quiet=not is_rank_zero()) as progress:
            test = queries, splits.test.labels
            found = evaluate_svm((torch.cat(training), labels), test, config.seed, progress=progress)
        figures = {"mAP": found.mean, "per_class_ap": found.per_class, "count": len(queries)}
        return {"value": found.mean, "figures": figures, "chosen": {"costs": found.costs, "of": COSTS, "folds": FOLDS}}

    return measure


def _few_shot(name: str, splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of few-shot episodes on test images."""
    require(
        splits.measure != "voc_map",
        f"sets={name} has images with several labels, and mode=few_shot needs one class per image: remove it from sets",
    )
    labels = splits.test.labels
    episodes = Episodes(config.ways, config.shots, config.queries, config.episodes, config.seed)

    def measure(features: _Features) -> dict[str, Any]:
        with naming_field("sets", name):
            next(draw_episodes(labels, episodes))  # refuses before the features are computed
            (x,) = features(splits.test)
            with progress_bar(f"{features.title}: episodes", quiet=not is_rank_zero()) as progress:
                found = episode_accuracies(x, labels, episodes, progress)
        mean, half = mean_interval(found)
        figures = {"top1": mean, "std": float(np.std(found)), "draws": len(found), "count": len(labels)}
        return {"value": mean, "half_width95": half, "figures": figures}

    return measure


def _write(file: Path, found: SetResults, candidate: Candidate, output: Path) -> None:
    """Write the data set's file, and add the result to results.json, which the report shows. For rank 0."""
    write_results(file, found)
    encoder, result = candidate.subject.file, found.encoders[candidate.name]
    entry = {
        "command": "transfer",
        "protocol": f"{found.mode}, {found.name}",
        "encoder": candidate.name,
        **{name: getattr(encoder, name) for name in ("layout", "backbone", "options", "step")},
        "source": str(Path(encoder.source).expanduser().absolute()),
        "sha256": weights_digest(encoder, "backbone"),
        "look": asdict(candidate.subject.transform),
        "data": {"name": found.name, "held_out": found.about["test"], "training": found.about["training"]},
        "settings": found.settings,
        "figures": result["figures"],
    }
    record(output, [entry], encoder.step)


def _report(config: TransferConfig, found: Sequence[SetResults], output: Path) -> None:
    """Print the table, the written files and the next command."""
    title = {"linear": "transfer", "few_shot": f"transfer, {config.ways}-way {config.shots}-shot"}[config.mode]
    note = NOTES[config.mode].format(**vars(config))
    show(title, found, config.encoders, MEASURES, note)
    log(f"written: {output / FOLDER}/{config.mode}_*.json and {output / 'results.json'}")
    fields = {"sets": config.sets, "encoders": config.encoders, "root": config.root}
    shown = {name: value for name, value in fields.items() if value != getattr(DEFAULTS, name)}
    if config.mode == "linear" and all(each.about["measure"] != "voc_map" for each in found):
        log_next(
            command("moco.transfer", config, mode="few_shot", **shown), "classify by a few labeled images per class"
        )
    elif config.mode == "few_shot":
        log_next(command("moco.transfer", config, **shown), "logistic regression on the same data")
