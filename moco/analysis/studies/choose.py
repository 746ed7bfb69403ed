"""Choosing a checkpoint without labels: rank checkpoints by label-free measures, and compare the ranks with accuracy.

    RankMe (Garrido et al., ICML 2023); alpha-ReQ (Agrawal et al., NeurIPS 2022); Wang & Isola (ICML 2020)

The measures use training images without labels. The measures are compared with two accuracies on held-out images:
few-label kNN and a linear probe. The accuracies do not influence the choice.

Legend: N measured images, D feature dimension.
"""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.analysis import alignment, alpha_req, rank_me, uniformity
from moco.analysis.studies import open_study
from moco.analysis.studies.outputs import (
    VOTE_TEMPERATURE,
    Outputs,
    augmented_views,
    encode,
    note_several_labels,
    plain_features,
)
from moco.config import ConfigError, require
from moco.config.choose import ChooseConfig
from moco.config.quoting import override
from moco.config.subject import SubjectConfig
from moco.data.duplicates import copies_message, count_copies
from moco.data.recorded import fields_to_repeat
from moco.data.sources import SOURCES, Sources, limited
from moco.evaluation.knn_classifier import KnnSettings, knn_accuracy
from moco.evaluation.subject import data_config, open_data, open_subject
from moco.evaluation.subsets import naming_field, per_class
from moco.evaluation.sweep import LabeledFeatures, Recipe, Setting, retrain
from moco.files import resolved, write_json
from moco.interop.encoder_file import EncoderFile, read_encoder
from moco.runs import checkpoint
from moco.runs.directory import in_run_directory, no_checkpoint_message
from moco.runtime.console import log, log_next, progress_bar, table
from moco.runtime.next_command import command, computing_as
from moco.runtime.provenance import provenance

RESULTS = "choose.json"  # not results.json: the output may be a run directory, where results.json holds evaluations
# The batch size is set later, to the number of images.
PROBE = Recipe(epochs=100, batch_size=0, momentum=0.9, normalize="standard", seed=0)
PROBE_SETTING = Setting("output", 0.1, 1e-3)  # for every checkpoint; 100 epochs suffice to fit the few images
EVALUATIONS = {"knn": "few-label kNN", "probe": "linear probe"}
SCORES: dict[str, Callable[[float], float]] = {  # the score of a measure's value; the highest score is best
    "highest": lambda value: value,
    "lowest": lambda value: -value,
    "nearest to 1": lambda value: -abs(value - 1),
}


class Measure(NamedTuple):
    """A measure that needs no labels."""

    title: str
    best: str  # which value is best, a key of SCORES
    compute: Callable[[Outputs], Tensor]


MEASURES = {
    "rank_me": Measure("RankMe, backbone", "highest", lambda out: rank_me(out.features)),
    "rank_me_projection": Measure("RankMe, projection", "highest", lambda out: rank_me(out.projection)),
    "alpha_req": Measure("alpha-ReQ, backbone", "nearest to 1", lambda out: alpha_req(out.features)),
    "uniformity": Measure("uniformity, backbone", "lowest", lambda out: uniformity(out.features)),
    "uniformity_projection": Measure("uniformity, projection", "lowest", lambda out: uniformity(out.projection)),
    "alignment": Measure("alignment, backbone", "lowest", lambda out: alignment(*out.view_features)),
    "sum": Measure(
        "alignment + uniformity, backbone",
        "lowest",
        lambda out: alignment(*out.view_features).double() + uniformity(out.features).double(),
    ),
    "step": Measure("the newest checkpoint", "highest", lambda out: torch.tensor(out.step)),
}


@dataclass(frozen=True)
class Point:
    """A checkpoint with its measures and accuracies."""

    run: str
    file: str
    step: int
    measures: dict[str, float]  # by the names of MEASURES; nan if the features have collapsed
    accuracies: dict[str, float]  # percent, by the names of EVALUATIONS; empty without labels

    def score(self, measure: str) -> float:
        """Return the score of the checkpoint by a measure: the higher the better; nan without a value."""
        return SCORES[MEASURES[measure].best](self.measures[measure])

    def plain(self) -> dict[str, Any]:
        """Return the values for the results file, where null replaces nan."""
        measures = {name: None if np.isnan(value) else value for name, value in self.measures.items()}
        return dict(run=self.run, file=self.file, step=self.step, measures=measures, accuracies=self.accuracies)


@dataclass(frozen=True)
class Agreement:
    """How well a measure and an accuracy agree on the order of checkpoints.

    A correlation is None if it is undefined, see `_correlation`.
    """

    within: float | None  # Spearman's rank correlation within a run, mean over the runs
    across: float | None  # Spearman's rank correlation among the last checkpoints of all runs
    everything: float | None  # Spearman's rank correlation among all checkpoints
    lost_within: float  # percentage points lost by choosing within a run by the measure, mean over the runs
    lost_across: float  # percentage points lost by choosing among the last checkpoints of all runs
    lost_everything: float  # percentage points lost by choosing among all checkpoints


def choose(config: ChooseConfig) -> list[Point]:
    """Measure all checkpoints of the runs, write the results and print each measure's choice.

    Returns:
        The checkpoints, run by run, the oldest first.

    Raises:
        ConfigError: if a pattern matches no run, a run has no checkpoint, a single run has fewer than three, the runs
            have different data, or the data set has fewer than two images.
        FileNotFoundError, ValueError: see `moco.evaluation.subject.open_data`.
    """
    files = {run: _checkpoints(run) for run in _runs(config.runs)}
    _refuse_too_few_checkpoints(files)
    output, device = open_study(config.output, config)
    subject = SubjectConfig(run=_refuse_different_data(files, config), data=config.data)
    opened = open_subject(subject)
    sources = open_data(subject, opened)
    images = limited(sources.train, config.images)
    require(len(images) >= 2, f"data.root has {len(images)} training image to measure: name a folder with 2 or more")
    bank, held_out = sources.bank, sources.held_out
    if config.labels:
        note_several_labels(sources.train)
    if config.labels and bank is not None and held_out is not None and (copies := count_copies(bank, held_out)):
        log(copies_message(copies, len(held_out)))
    points, total = [], sum(map(len, files.values()))
    with progress_bar("measuring checkpoints") as progress:
        for run, paths in files.items():
            views = augmented_views(images, read_encoder(paths[0]), device)  # the same for all checkpoints of a run
            for path in paths:
                file = read_encoder(path)
                outputs = encode(file, images, views, device)
                accuracies = _accuracies(outputs, file, sources, config) if config.labels else {}
                measures = {name: _value(measure, outputs) for name, measure in MEASURES.items()}
                points.append(Point(run, str(path), file.step, measures, accuracies))
                progress(len(points), total)
    agreement = agreements(points)
    results = {
        "command": "choose",
        "settings": asdict(config),
        "taken": {name: chosen(points, name).file for name in MEASURES},
        "agreement": {name: {each: asdict(found) for each, found in row.items()} for name, row in agreement.items()},
        "checkpoints": [point.plain() for point in points],
        "provenance": provenance(),
    }
    _report(points, agreement, len(images), config)  # before writing: the results stay visible if writing fails
    write_json(output / RESULTS, results)
    log(f"results: {output / RESULTS}")
    labeled = bool(points[0].accuracies)
    best = chosen(points, "rank_me")  # even with labels: the held-out images must not choose the checkpoint
    needed = fields_to_repeat(asdict(data_config(subject, opened)), in_run_directory(Path(best.file)))
    following = replace(computing_as(config), checkpoint=best.file, data=replace(config.data, **needed))
    used = command("moco.embed", following, output=str(output / "features"))
    log_next(command("moco.linear", following) if labeled else used, "the checkpoint that RankMe chooses")
    return points


def _runs(patterns: Sequence[str]) -> list[str]:
    """Return the directories that match the patterns, without duplicates."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        paths = glob.glob(pattern)  # noqa: PTH207 # Path.glob takes no absolute pattern
        matches = sorted(path for path in paths if Path(path).is_dir())
        if not matches:
            name = "name a run directory, e.g. runs=[runs/digits]"
            matched = f"{pattern} matches {'files only' if paths else 'no directory'}"
            raise ConfigError(f"runs: {matched}: {name}")
        found |= {resolved(path): path for path in matches}
    return list(found.values())


def _checkpoints(run: str) -> list[Path]:
    """Return a run's checkpoints, the oldest first."""
    found = checkpoint.list_checkpoints(Path(run) / "checkpoints")
    if not found:
        if any(Path(run).glob("*/checkpoints/")):
            raise ConfigError(f"runs: {run} has no checkpoint: name the runs in it, {override('runs', [f'{run}/*'])}")
        raise ConfigError(f"{no_checkpoint_message(Path(run), 'runs')}; or leave it out of runs")
    return found[::-1]


def _refuse_too_few_checkpoints(files: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a single run with fewer than three checkpoints. Its last two, which it keeps by default, hardly differ."""
    run, paths = next(iter(files.items()))
    if len(files) > 1 or len(paths) > 2:
        return
    has = f"{run} has only {len(paths)} checkpoint{'s' * (len(paths) > 1)}, and a choice needs three"
    epochs = int(read_encoder(paths[-1]).config["epochs"])
    fix = f"train again with checkpoint.keep_epochs={max(1, epochs // 5)}" if epochs > 2 else "train for more epochs"
    raise ConfigError(f"runs: {has}: {fix}, or name several runs")


def _refuse_different_data(files: Mapping[str, Sequence[Path]], config: ChooseConfig) -> str:
    """Return the first run; refuse runs on different data, unless the configuration names the data for all of them."""
    first, *others = files
    given = config.data.overrides()
    name = given.get("name", "")
    if "root" in given or (name in SOURCES and not SOURCES[name].root):
        return first  # the data fields of the other runs are not used
    of_first = read_encoder(files[first][-1]).config["data"]
    for run in others:
        own = read_encoder(files[run][-1]).config["data"]
        for field in ("name", "root", "more_roots", "eval_root", "labels", "label_file"):
            # Runs of older versions lack some of these fields.
            here, there = own.get(field) or "", of_first.get(field) or ""
            difference = f"{run} has data.{field}={here or repr('')}, but {first} has {there or repr('')}"
            require(field in given or here == there, f"runs: {difference}: choose runs on the same images")
    return first


def _value(measure: Measure, outputs: Outputs) -> float:
    try:
        return float(measure.compute(outputs))
    except ValueError:  # collapsed features have too few directions for alpha-ReQ
        return float("nan")


def _accuracies(outputs: Outputs, file: EncoderFile, sources: Sources, config: ChooseConfig) -> dict[str, float]:
    """Compute the accuracies on held-out images; {} without labels."""
    bank, held_out = sources.bank, sources.held_out
    if bank is None or bank.labels is None or held_out is None or held_out.labels is None:
        return {}
    backbone, device = outputs.encoder.backbone, outputs.features.device
    references, queries = (plain_features(backbone, each, file, device) for each in (bank, held_out))
    few_labels = KnnSettings(1, VOTE_TEMPERATURE, config.labels_per_class, config.draws)
    with naming_field("labels_per_class", config.labels_per_class):
        knn = knn_accuracy(references, bank.labels, queries, held_out.labels, few_labels)
    with naming_field("probe_labels_per_class", config.probe_labels_per_class):
        rows = per_class(bank.labels, config.probe_labels_per_class, seed=0)
    some, labels = references[torch.from_numpy(rows).to(device)], bank.subset(rows).labels
    assert labels is not None
    recipe = replace(PROBE, batch_size=len(some))
    columns = {PROBE_SETTING.layer: slice(0, some.shape[1])}
    weight, bias = retrain(LabeledFeatures(some, columns, labels, len(bank.classes), device), PROBE_SETTING, recipe)
    right = (queries @ weight.T + bias).argmax(dim=1).cpu().numpy() == held_out.labels
    return {"knn": knn.mean, "probe": 100 * float(right.mean())}


def chosen(points: Sequence[Point], measure: str) -> Point:
    """Return the checkpoint with the best value of a measure; the first one if several are equal or all lack it."""
    return _best(points, measure)[0]


def _best(points: Sequence[Point], measure: str) -> list[Point]:
    """Return the checkpoints that are best by a measure, in their order; several if they are equal."""
    scores = [-np.inf if np.isnan(value := point.score(measure)) else value for point in points]
    return [point for point, value in zip(points, scores, strict=True) if value == max(scores)]


def agreements(points: Sequence[Point]) -> dict[str, dict[str, Agreement]]:
    """Compare each measure with each accuracy; {} without labels."""
    if not points or not points[0].accuracies:
        return {}
    runs = [[point for point in points if point.run == run] for run in dict.fromkeys(point.run for point in points)]
    last = [max(run, key=lambda point: point.step) for run in runs]
    several = [run for run in runs if len(run) > 2]  # the correlation of two is always 1 or -1

    def agreement(measure: str, evaluation: str) -> Agreement:
        pair = (measure, evaluation)
        within = [value for run in several if (value := _correlation(run, *pair)) is not None]
        across, everything = (_correlation(each, *pair) for each in (last, points))
        lost = (float(np.mean([_lost(run, *pair) for run in runs])), _lost(last, *pair), _lost(points, *pair))
        return Agreement(float(np.mean(within)) if within else None, across, everything, *lost)

    return {measure: {each: agreement(measure, each) for each in EVALUATIONS} for measure in MEASURES}


def _correlation(points: Sequence[Point], measure: str, evaluation: str) -> float | None:
    """Return Spearman's rank correlation of score and accuracy.

    None if fewer than three checkpoints have a score, or if all scores or all accuracies are equal.
    """
    from scipy.stats import spearmanr  # costs half a second at start-up

    pairs = [(point.score(measure), point.accuracies[evaluation]) for point in points]
    known = [pair for pair in pairs if not np.isnan(pair[0])]
    if len(known) < 3 or min(len(set(each)) for each in zip(*known, strict=True)) < 2:
        return None
    return float(spearmanr(*zip(*known, strict=True)).statistic)


def _lost(points: Sequence[Point], measure: str, evaluation: str) -> float:
    """Return the percentage points by which the measure's choice, or the mean of equal choices, is below the best."""
    accuracy = [point.accuracies[evaluation] for point in _best(points, measure)]
    return max(point.accuracies[evaluation] for point in points) - float(np.mean(accuracy))


def _report(
    points: Sequence[Point], agreement: Mapping[str, Mapping[str, Agreement]], images: int, config: ChooseConfig
) -> None:
    """Print each measure's choice, and with labels how many points of accuracy that choice loses."""
    rows = []
    for name, measure in MEASURES.items():
        point, *equal = _best(points, name)
        choice = f"{Path(point.run)} step {point.step}" + f", first of {1 + len(equal)} equal" * bool(equal)
        row = [measure.title, measure.best, f"{point.measures[name]:.4g}", choice]
        rows.append(row + [f"{value:.1f}" for value in point.accuracies.values()])
    runs = len({point.run for point in points})
    labels = dict(zip(EVALUATIONS, (config.labels_per_class, config.probe_labels_per_class), strict=True))
    note = "; ".join(f"{title}: {labels[name]} per class" for name, title in EVALUATIONS.items())
    table(
        f"{len(points)} checkpoints of {runs} run{'s' * (runs > 1)}, measured on {images:,} images without labels",
        ["measure", "best", "value", "choice", *([f"{each} %" for each in EVALUATIONS.values()] * bool(agreement))],
        rows,
        f"labels: {note}" * bool(agreement),
    )
    for evaluation, title in EVALUATIONS.items() if agreement else ():
        best = points[int(np.argmax([point.accuracies[evaluation] for point in points]))]
        log(f"highest {title}: {best.run} step {best.step}, {best.accuracies[evaluation]:.1f} %")
        table(
            f"agreement with {title} on held-out images",
            ["measure", "ρ in a run", "ρ of last", "ρ of all", "lost in a run", "lost of last", "lost of all"],
            [[MEASURES[name].title, *_cells(each[evaluation])] for name, each in agreement.items()],
            "ρ: Spearman's rank correlation, 1 if both orders are equal; lost: percentage points below the best (for "
            "equal choices, their mean); in a run: mean over runs; last: among the last checkpoints of all runs; all: "
            "among all checkpoints",
        )


def _cells(each: Agreement) -> list[str]:
    shown = ["–" if value is None else f"{value:+.2f}" for value in (each.within, each.across, each.everything)]
    return [*shown, *(f"{value:.1f}" for value in (each.lost_within, each.lost_across, each.lost_everything))]
