"""Choosing a checkpoint without labels: measures of unlabeled pictures, and how well they agree with labels.

    RankMe (Garrido et al., ICML 2023); alpha-ReQ (Agrawal et al., NeurIPS 2022); Wang & Isola (ICML 2020)

A measure sees training pictures without their labels. What it is held against are few-label kNN and a linear probe on
held-out pictures, which take no part in a choice.

Legend: M measured pictures, n checkpoints.
"""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.analysis import alignment, alpha_req, rank_me, uniformity
from moco.analysis.studies.measures import VOTE, in_parts, plain_features, two_views
from moco.config import ConfigError, DataConfig, require
from moco.config.choose import ChooseConfig
from moco.data.opening import open_sources
from moco.data.sources import Source, Sources, limited, subset
from moco.evaluation.knn_classifier import knn_accuracy
from moco.evaluation.metrics import figures
from moco.evaluation.subsets import per_class
from moco.evaluation.sweep import Recipe, Setting, retrain
from moco.files import write_json
from moco.interop.encoder_file import EncoderFile, build, read_encoder
from moco.runs import checkpoint
from moco.runtime.console import log, progress_bar, table
from moco.runtime.device import pick_device
from moco.runtime.provenance import provenance


@dataclass(frozen=True)
class Measure:
    """A measure that needs no labels, and which way is better."""

    name: str
    goodness: Callable[[float], float]  # of the measure: the checkpoint with the highest is taken
    wanted: str


MEASURES = {
    "rank_me": Measure("RankMe, backbone", lambda value: value, "highest"),
    "rank_me_projection": Measure("RankMe, projection", lambda value: value, "highest"),
    "alpha_req": Measure("alpha-ReQ, backbone", lambda value: -abs(value - 1), "nearest to 1"),
    "uniformity": Measure("uniformity, backbone", lambda value: -value, "lowest"),
    "uniformity_projection": Measure("uniformity, projection", lambda value: -value, "lowest"),
    "alignment": Measure("alignment, backbone", lambda value: -value, "lowest"),
    "sum": Measure("alignment + uniformity, backbone", lambda value: -value, "lowest"),
    "step": Measure("the newest checkpoint", lambda value: value, "highest"),
}
JUDGES = {"knn": "few-label kNN", "probe": "linear probe"}


@dataclass(frozen=True)
class Point:
    """A checkpoint, its measures, and what labels say of it."""

    run: str
    file: str
    step: int
    measures: dict[str, float]  # by the names of MEASURES; nan where a collapse leaves no value
    subject: dict[str, float]  # percent, by the names of JUDGES; empty without labels


@dataclass(frozen=True)
class Agreement:
    """How well a measure orders checkpoints as labels do."""

    within: float | None  # Spearman's rank correlation within a run, mean over the runs
    across: float | None  # over the last checkpoints of all runs
    everything: float | None  # over all checkpoints
    lost_within: float  # points of accuracy lost by choosing in a run by the measure, mean over the runs
    lost_across: float  # points lost by choosing among the last checkpoints of all runs
    lost_everything: float  # points lost by choosing among all checkpoints


def choose(config: ChooseConfig) -> list[Point]:
    """See `moco.choose.choose`.

    Returns:
        Every checkpoint with its measures, run by run, the oldest first.

    Raises:
        ConfigError: if a pattern names no run, a run holds no checkpoint, or the runs are of different pictures.
    """
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    files = {run: _checkpoints(run) for run in _runs(config.runs)}
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output} cannot be made: {error.strerror}") from error
    sources = open_sources(_same_data(files), bank_size=0)
    pictures = limited(sources.train, config.images)
    require(len(pictures) >= 2, f"{len(pictures)} training picture is too little to measure: two or more are needed")
    points, total = [], sum(map(len, files.values()))
    with progress_bar("measuring checkpoints", quiet=False) as progress:
        for run, paths in files.items():
            views = two_views(pictures, read_encoder(paths[0]), device)  # the same for all of its checkpoints
            for path in paths:
                file = read_encoder(path)
                subject = _judge(file, sources, config, device) if config.labels else {}
                points.append(Point(run, str(path), file.step, _measure(file, pictures, views, device), subject))
                progress(len(points), total)
    agreement = agreements(points)
    _write(config, output, points, agreement)
    _report(points, agreement, len(pictures), output)
    return points


def _runs(patterns: Sequence[str]) -> list[str]:
    """The directories that the patterns name, each once.

    Raises:
        ConfigError: for a pattern that names none.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        there = sorted(path for path in glob.glob(pattern) if Path(path).is_dir())  # noqa: PTH207
        require(bool(there), f"runs: {pattern} names no directory: say the directory of a run, e.g. runs=[runs/digits]")
        found |= {Path(path).resolve(): path for path in there}
    return list(found.values())


def _checkpoints(run: str) -> list[Path]:
    """A run's checkpoints, the oldest first."""
    found = checkpoint.list_checkpoints(Path(run) / "checkpoints")
    require(bool(found), f"runs: {run} holds no checkpoint: leave it out, or train it: python -m moco.train run={run}")
    return found[::-1]


def _same_data(files: Mapping[str, Sequence[Path]]) -> DataConfig:
    """The data that all runs say.

    Raises:
        ConfigError: if they differ: measures of different pictures do not compare.
    """
    told = {run: dict(read_encoder(paths[-1]).config["data"]) for run, paths in files.items()}
    first = next(iter(told))
    for run, data in told.items():
        differing = [name for name in ("name", "root", "eval_root", "labels") if data[name] != told[first][name]]
        require(
            not differing,
            f"runs: {run} has data.{differing[0] if differing else ''}={data[differing[0]] if differing else ''}, "
            f"{first} another: choose among runs on the same pictures",
        )
    return DataConfig(**told[first])


def _measure(file: EncoderFile, pictures: Source, views: Sequence[Tensor], device: torch.device) -> dict[str, float]:
    """All of `MEASURES` on pictures without their labels."""
    encoder = build(file).to(device)
    features = plain_features(encoder.backbone, pictures, file, device)  # (M, D)
    projection = in_parts(encoder.head, features)  # (M, C)
    first, second = (in_parts(encoder.backbone, view) for view in views)
    aligned = alignment(first, second).item()
    spread = uniformity(features).item()
    return {
        "rank_me": rank_me(features).item(),
        "rank_me_projection": rank_me(projection).item(),
        "alpha_req": _alpha(features),
        "uniformity": spread,
        "uniformity_projection": uniformity(projection).item(),
        "alignment": aligned,
        "sum": aligned + spread,
        "step": float(file.step),
    }


def _alpha(features: Tensor) -> float:
    try:
        return alpha_req(features).item()
    except ValueError:  # a collapse: too few directions for a line
        return float("nan")


def _judge(file: EncoderFile, sources: Sources, config: ChooseConfig, device: torch.device) -> dict[str, float]:
    """What labels say on held-out pictures; {} without labels."""
    bank, held_out = sources.bank, sources.held_out
    if bank is None or bank.labels is None or held_out is None or held_out.labels is None:
        return {}
    backbone = build(file).to(device).backbone
    references, queries = (plain_features(backbone, each, file, device) for each in (bank, held_out))
    few = (1, VOTE, config.labels_per_class, config.draws)
    knn = knn_accuracy(references, bank.labels, queries, held_out.labels, *few)
    rows = per_class(bank.labels, config.probe_labels_per_class, seed=0)
    some, labels = references[torch.from_numpy(rows).to(device)], subset(bank, rows).labels
    assert labels is not None
    whole = {"output": slice(0, some.shape[1])}
    # One setting for every checkpoint, chosen nowhere: SGD on standardized features, long enough to fit them.
    recipe = Recipe(epochs=100, batch_size=len(some), momentum=0.9, normalize="standard", seed=0)
    weight, bias = retrain(some, whole, labels, len(bank.classes), Setting("output", 0.1, 1e-3), recipe, device)
    return {"knn": knn.mean, "probe": figures(queries @ weight.T + bias, held_out.labels).top1}


def taken(points: Sequence[Point], measure: str) -> Point:
    """The checkpoint that a measure would take: of equal ones the first, and none without a value before others."""
    return _best(points, measure)[0]


def _best(points: Sequence[Point], measure: str) -> list[Point]:
    """Those that a measure finds best, in their order: several where it tells no difference."""

    def goodness(point: Point) -> float:
        value = MEASURES[measure].goodness(point.measures[measure])
        return -np.inf if np.isnan(value) else value

    most = max(map(goodness, points))
    return [point for point in points if goodness(point) == most]


def agreements(points: Sequence[Point]) -> dict[str, dict[str, Agreement]]:
    """For each measure, and each of what labels say, how well they agree; {} without labels."""
    if not points or not points[0].subject:
        return {}
    runs = [[point for point in points if point.run == run] for run in dict.fromkeys(point.run for point in points)]
    last = [max(run, key=lambda point: point.step) for run in runs]
    several = [run for run in runs if len(run) > 2]  # of two the correlation is 1 or -1
    found: dict[str, dict[str, Agreement]] = {}
    for judge in JUDGES:
        for measure in MEASURES:
            within = [value for run in several if (value := _correlation(run, measure, judge)) is not None]
            found.setdefault(measure, {})[judge] = Agreement(
                float(np.mean(within)) if within else None,
                _correlation(last, measure, judge),
                _correlation(points, measure, judge),
                float(np.mean([_lost(run, measure, judge) for run in runs])),
                _lost(last, measure, judge),
                _lost(points, measure, judge),
            )
    return found


def _correlation(points: Sequence[Point], measure: str, judge: str) -> float | None:
    """Spearman's rank correlation of goodness and accuracy; None where either is the same throughout."""
    from scipy.stats import spearmanr  # costs half a second at start-up

    goodness = [MEASURES[measure].goodness(point.measures[measure]) for point in points]
    accuracy = [point.subject[judge] for point in points]
    known = [pair for pair in zip(goodness, accuracy, strict=True) if not np.isnan(pair[0])]
    if len(known) < 3 or min(len(set(each)) for each in zip(*known, strict=True)) < 2:
        return None
    return float(spearmanr(*zip(*known, strict=True)).statistic)


def _lost(points: Sequence[Point], measure: str, judge: str) -> float:
    """Points of accuracy between the best checkpoint and the measure's, on average over those it finds equally good."""
    accuracy = [point.subject[judge] for point in _best(points, measure)]
    return max(point.subject[judge] for point in points) - float(np.mean(accuracy))


def _write(
    config: ChooseConfig, output: Path, points: Sequence[Point], agreement: Mapping[str, Mapping[str, Agreement]]
) -> None:
    results = {
        "command": "choose",
        "settings": asdict(config),
        "taken": {name: taken(points, name).file for name in MEASURES},
        "agreement": {
            name: {judge: asdict(each) for judge, each in judges.items()} for name, judges in agreement.items()
        },
        "checkpoints": [_plain(point) for point in points],
        "provenance": provenance(),
    }
    write_json(output / "results.json", results)


def _plain(point: Point) -> dict[str, Any]:
    """For JSON, which knows no NaN."""
    measures = {name: None if np.isnan(value) else value for name, value in point.measures.items()}
    return asdict(point) | {"measures": measures}


def _report(
    points: Sequence[Point], agreement: Mapping[str, Mapping[str, Agreement]], images: int, output: Path
) -> None:
    """What each measure would take, and with labels how much of a mistake that is."""
    rows = []
    for name, measure in MEASURES.items():
        point = taken(points, name)
        shown = [f"{point.subject[judge]:.1f}" for judge in JUDGES] if point.subject else []
        value = f"{point.measures[name]:.4g}"
        rows.append([measure.name, measure.wanted, value, f"{Path(point.run)} step {point.step}", *shown])
    runs = len({point.run for point in points})
    columns = [
        "measure",
        "wanted",
        "value",
        "would take",
        *([f"{each} %" for each in JUDGES.values()] * bool(agreement)),
    ]
    table(
        f"{len(points)} checkpoints of {runs} run{'s' * (runs > 1)}, measured on {images:,} pictures without labels",
        columns,
        rows,
    )
    if agreement:
        best = [max(points, key=lambda point: point.subject[judge]) for judge in JUDGES]
        log(
            "with labels one would take "
            + " and ".join(
                f"{point.run} step {point.step} ({JUDGES[judge]} {point.subject[judge]:.1f} %)"
                for judge, point in zip(JUDGES, best, strict=True)
            )
        )
        for judge, called in JUDGES.items():
            table(
                f"agreement with {called} on held-out pictures",
                ["measure", "ρ in a run", "ρ of last", "ρ of all", "lost in a run", "lost of last", "lost of all"],
                [[MEASURES[name].name, *_cells(each[judge])] for name, each in agreement.items()],
                "ρ: Spearman's rank correlation, 1 is the labels' own order; lost: points below the best choice; "
                "in a run: mean over runs; last: among the last checkpoints of all runs; all: among all checkpoints",
            )
    log(f"numbers: {output / 'results.json'}")
    log(f"next: python -m moco.knn checkpoint={taken(points, 'rank_me').file}")


def _cells(each: Agreement) -> list[str]:
    shown = ["–" if value is None else f"{value:+.2f}" for value in (each.within, each.across, each.everything)]
    return [*shown, *(f"{value:.1f}" for value in (each.lost_within, each.lost_across, each.lost_everything))]
