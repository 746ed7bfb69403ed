"""The measures of `moco.transfer` on one data set: a linear classifier, few-shot episodes, fine-tuning.

Legend: M images, D feature dimension, L classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.config import require
from moco.config.transfer import TransferConfig, finetune_config
from moco.evaluation import task as evaluation
from moco.evaluation.features import Inference, extract
from moco.evaluation.few_shot import Episodes, draw_episodes, episode_accuracies
from moco.evaluation.finetune import set_up, train_and_measure
from moco.evaluation.logistic_regression import STRENGTHS, choose_and_fit
from moco.evaluation.metrics import Z95, Metrics, compute_metrics, mean_interval, rank_classes
from moco.evaluation.subject import Subject
from moco.evaluation.subsets import naming_field
from moco.evaluation.svm import COSTS, FOLDS, evaluate_svm
from moco.evaluation.transfer_data import Part, Splits
from moco.interop.encoder_file import build
from moco.runtime.console import log, progress_bar
from moco.runtime.precision import PRECISIONS


@dataclass(frozen=True, eq=False)
class Candidate:
    """An encoder to evaluate."""

    name: str  # its entry in `encoders`
    subject: Subject
    seed: int | None  # of initial weights; None: the file's weights
    digest: str  # of the weights and the preparation of images


@dataclass(frozen=True, eq=False)
class EvaluatedEncoder:
    """An encoder during its evaluation on one data set."""

    candidate: Candidate
    config: TransferConfig
    device: torch.device
    title: str  # data set and encoder, for the log

    def features(self, *parts: Part) -> list[Tensor]:
        """Return the features (M, D) of each part, on every rank."""
        subject, config = self.candidate.subject, self.config
        backbone = build(subject.file, self.candidate.seed).backbone.to(self.device)
        inference = Inference(self.device, config.images_at_once, config.data.workers, PRECISIONS[config.precision])
        found = []
        for part in parts:
            title, count = f"{self.title}: {len(part.source):,} images", len(part.source)
            with evaluation.monitored(backbone, count, title) as network:
                found.append(extract(network, part.source, subject.transform, inference))
        return found


Measure = Callable[[EvaluatedEncoder], dict[str, Any]]  # returns the result: "value", its interval, "figures", ...


def _linear(name: str, splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of a linear classifier, whose regularization is chosen without test images. Collective."""
    if splits.measure == "voc_map":
        return _svm(splits, config)
    train, validation = splits.with_validation(config)
    truth = splits.test.labels

    def metrics_of(scores: Tensor, labels: NDArray[np.int64]) -> Metrics:
        return compute_metrics(rank_classes(scores), labels, splits.classes)

    def measure(encoder: EvaluatedEncoder) -> dict[str, Any]:
        x, held, queries = encoder.features(train, validation, splits.test)
        labels, held_labels = (part.labels for part in (train, validation))
        with progress_bar(f"{encoder.title}: choosing the L2 penalty") as progress:
            classifier, choice = choose_and_fit(
                ((x, labels), (held, held_labels)),
                splits.classes,
                lambda scores: _value(metrics_of(scores, held_labels), splits.measure),
                STRENGTHS,
                progress,
            )
        metrics = metrics_of(classifier(queries), truth)
        if choice.strength in (STRENGTHS[0], STRENGTHS[-1]):
            log(f"{encoder.title}: the L2 penalty {choice.strength:g} is at the end of the protocol's range")
        validated = {"strength": choice.strength, "validation": list(choice.scores), "validation_count": len(held)}
        return _result([metrics], splits.measure, truth) | {"chosen": validated}

    return measure


def _result(metrics: Sequence[Metrics], measure: str, truth: NDArray[np.int64]) -> dict[str, Any]:
    """Return the result of one or several seeds.

    With one seed, the interval is due to the finite number of test images; with several, to the choice of seeds.
    """
    value, half = mean_interval([_value(each, measure) for each in metrics])
    if len(metrics) > 1:
        figures = evaluation.summarize_seeds(metrics) | {"count": len(truth)}
        return {"value": value, "half_width95": half, "figures": figures}
    figures = metrics[0].to_json()
    del figures["confusion"]  # too large: there can be many data sets of many classes
    if measure == "top1":
        return {"value": value, "interval95": list(metrics[0].interval()), "figures": figures}
    half = class_mean_half_width(metrics[0].per_class, np.bincount(truth))
    return {"value": value, "half_width95": half, "figures": figures}


def _value(metrics: Metrics, measure: str) -> float:
    value = metrics.top1 if measure == "top1" else metrics.balanced
    assert value is not None
    return value


def class_mean_half_width(per_class: Sequence[float | None], counts: NDArray[np.int64]) -> float:
    """Return half of the 95 % interval, in percent, of the mean of the accuracies of all classes.

    `counts` are the numbers of images of the classes. The accuracies are independent binomial proportions. Two right
    and two wrong images are added to each class (Agresti and Coull, 1998), so that a class without errors does not
    count as certain.
    """
    known = [(share / 100, int(count)) for share, count in zip(per_class, counts, strict=True) if share is not None]
    adjusted = [((share * count + 2) / (count + 4), count + 4) for share, count in known]
    variance = sum(share * (1 - share) / count for share, count in adjusted) / len(adjusted) ** 2
    return 100 * Z95 * math.sqrt(variance)


def _svm(splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of a linear SVM per class, trained on training and validation images."""
    parts = [part for part in (splits.train, splits.validation) if part is not None]
    labels = np.concatenate([part.labels for part in parts])

    def measure(encoder: EvaluatedEncoder) -> dict[str, Any]:
        *training, queries = encoder.features(*parts, splits.test)
        with progress_bar(f"{encoder.title}: SVM per class") as progress:
            test = queries, splits.test.labels
            found = evaluate_svm((torch.cat(training), labels), test, config.seed, progress=progress)
        figures = {"mAP": found.mean, "per_class_ap": found.per_class, "count": len(queries)}
        return {"value": found.mean, "figures": figures, "chosen": {"costs": found.costs, "of": COSTS, "folds": FOLDS}}

    return measure


def _few_shot(name: str, splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of few-shot episodes on test images."""
    _refuse_several_labels(name, splits, config)
    labels = splits.test.labels
    episodes = Episodes(config.ways, config.shots, config.queries, config.episodes, config.seed)

    def measure(encoder: EvaluatedEncoder) -> dict[str, Any]:
        with naming_field("sets", name):
            next(draw_episodes(labels, episodes))  # raises its error before the features are computed
            (x,) = encoder.features(splits.test)
            with progress_bar(f"{encoder.title}: episodes") as progress:
                found = episode_accuracies(x, labels, episodes, progress)
        mean, half = mean_interval(found)
        figures = {"top1": mean, "top1_half_width95": half, "episodes": len(found), "count": len(labels)}
        return {"value": mean, "half_width95": half, "figures": figures}

    return measure


def _finetune(name: str, splits: Splits, config: TransferConfig) -> Measure:
    """Return the measure of an encoder that is trained with a classifier on training and validation images."""
    _refuse_several_labels(name, splits, config)
    labeled, test = splits.labeled(), splits.test.source

    def measure(encoder: EvaluatedEncoder) -> dict[str, Any]:
        subject, device = encoder.candidate.subject, encoder.device
        task = evaluation.Task(finetune_config(config), subject, labeled, test, device)
        with naming_field("finetune", config.finetune):
            run = replace(set_up(task), title=encoder.candidate.name)
        first = "pretrained" if encoder.candidate.seed is None else "untrained"
        seeds, steps = task.config.seeds, run.plan(len(labeled), config.seed).total_steps
        with evaluation.progress_log(encoder.title, seeds * steps) as on_step:
            metrics, _, plan = train_and_measure(run, first, on_step)
        used = {"steps": plan.total_steps, "epochs": plan.epochs, "batch_size": plan.batch_size, "images": plan.length}
        return _result(metrics, splits.measure, splits.test.labels) | {"training": used}

    return measure


def _refuse_several_labels(name: str, splits: Splits, config: TransferConfig) -> None:
    require(
        splits.measure != "voc_map",
        f"sets={name} has images with several labels, and mode={config.mode} needs one class per image: remove {name} "
        "from sets",
    )


# For each mode, the function that returns its measure, given the entry of `sets`, its splits and the configuration.
# These functions are collective.
MODES: dict[str, Callable[[str, Splits, TransferConfig], Measure]] = {
    "linear": _linear,
    "few_shot": _few_shot,
    "finetune": _finetune,
}
