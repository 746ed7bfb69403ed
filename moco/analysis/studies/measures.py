"""What a finished run of the temperature study is measured by: one run directory to plain numbers.

Everything is measured in eval mode, on pictures that the run was not trained on where there are such. Uniformity and
tolerance are those of the plain evaluation view; alignment, similarities and pushes are of two augmented views, as the
loss sees them: the query by the encoder, its positive by the momentum encoder, the negatives the queue's last keys.

Legend: N pictures, C dimension, K negatives, B bins.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.analysis import alignment, hardness, relative_penalty, similarity_histogram, tolerance, uniformity
from moco.builder import UNKNOWN, unit_length
from moco.config import AugmentConfig, require
from moco.data.augment import augment, crop_one
from moco.data.opening import build_views
from moco.data.sources import Source, Sources, limited
from moco.data.view import draw, draw_crop
from moco.evaluation.features import extract
from moco.evaluation.knn_classifier import Accuracy, knn_accuracy
from moco.interop.encoder_file import EncoderFile, ForeignFileError, build, read_encoder
from moco.models.encoder import Encoder
from moco.runs import checkpoint

ROWS = 256  # pictures or queries at once; changes memory, not results
VOTE = 0.1  # a neighbor's vote weighs exp(similarity / VOTE); with one neighbor all the same


@dataclass(frozen=True)
class Space:
    """The geometry of one network's outputs."""

    uniformity: float
    tolerance: float | None  # None without labels
    alignment: float


@dataclass(frozen=True)
class Contrast:
    """What the loss sees of N queries, each with one positive and K negatives."""

    positive_similarity: float
    negatives: int  # K
    effective_negatives: float  # mean over the queries, 1 ... K
    push: float  # 1 - P of the positive: how much gradient is left, 0 ... 1
    positives_at: list[int]  # (B,), how many positive similarities lie in each bin over -1 ... 1
    negatives_at: list[int]  # (B,), the same of the negatives
    push_at: list[float]  # (B,), the share of a query's push that falls on negatives of each bin; sums to 1


@dataclass(frozen=True)
class Run:
    """A run of the study and what it is measured by."""

    temperature: float
    seed: int
    path: str
    step: int
    seconds: float  # of training
    pictures: int  # N
    knn: Accuracy | None  # percent; None without labeled held-out pictures
    projection: Space
    backbone: Space
    contrast: Contrast

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | {"knn": None if self.knn is None else self.knn._asdict()}


def measure(
    path: Path,
    temperature: float,
    seed: int,
    sources: Sources,
    images: int,
    k: int,
    labels_per_class: int,
    draws: int,
    bins: int,
    device: torch.device,
) -> Run:
    """Measures the newest checkpoint of a run.

    Args:
        path: the run's directory.
        temperature, seed: that it was told.
        sources: its data.
        images: at most so many pictures are measured.
        k, labels_per_class, draws: of the few-label kNN.
        bins: B.
        device: where.

    Raises:
        ConfigError: if the run holds no checkpoint, or there are too few pictures.
        CheckpointError, ForeignFileError: if it cannot be read.
    """
    found = checkpoint.list_checkpoints(path / "checkpoints")
    require(bool(found), f"{path} holds no checkpoint: remove it, and the same command trains it again")
    file, state = read_encoder(found[0]), checkpoint.load(found[0])
    encoder = build(file).to(device)
    pictures = limited(sources.held_out or sources.train, images)
    require(len(pictures) >= 2, f"{len(pictures)} pictures are too few to measure: two or more are needed")
    features = plain_features(encoder.backbone, pictures, file, device)  # (N, D)
    views = two_views(pictures, file, device)
    query = [in_parts(encoder.backbone, view) for view in views]  # two of (N, D)
    projected = [in_parts(encoder.head, each) for each in query]  # two of (N, C)
    key = unit_length(in_parts(_key_encoder(found[0], device) or encoder, views[1]))  # (N, C)
    queue = _queue(state["method"], device)
    return Run(
        temperature,
        seed,
        str(path),
        file.step,
        float(state["seconds"]),
        len(pictures),
        _knn(features, encoder, sources, pictures, file, k, labels_per_class, draws, device),
        _space(in_parts(encoder.head, features), projected, pictures),
        _space(features, query, pictures),
        contrast_of(unit_length(projected[0]), key, queue, temperature, bins),
    )


def plain_features(network: nn.Module, source: Source, file: EncoderFile, device: torch.device) -> Tensor:
    """Features (N, D) of a source's plain views, in its order."""
    look = file.images
    return extract(network, source, look["size"], look["resize"], look["mean"], look["std"], device, ROWS)


def two_views(source: Source, file: EncoderFile, device: torch.device) -> list[Tensor]:
    """Two augmented views of each picture by the run's own recipe, each (N, 3, S, S).

    A function of the picture's number alone, so that every run is measured on the same ones. (The key is that of
    seed 0's first epoch: those numbers went to other pictures, or, without held-out ones, are what was trained with.)
    """
    seen = []
    for stream, view in enumerate(build_views(AugmentConfig(**file.config["augment"] | {"views": 2}))):
        parts = []
        for start in range(0, len(source), ROWS):
            index = np.arange(start, min(start + ROWS, len(source)))
            uniforms = draw_crop(0, 0, index, stream)
            cut = [crop_one(source.image(int(i)), each, view) for i, each in zip(index, uniforms, strict=True)]
            parts.append(augment(torch.stack(cut).to(device), draw(view, 0, 0, index, stream), view))
        seen.append(torch.cat(parts))
    return seen


@torch.no_grad()
def in_parts(network: nn.Module, inputs: Tensor) -> Tensor:
    """A network's outputs, some rows at a time, float32."""
    return torch.cat([network(part).float() for part in inputs.split(ROWS)])


@torch.no_grad()
def contrast_of(query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, bins: int) -> Contrast:
    """Similarities and pushes of queries against their positives and negatives.

    Args:
        query, key: of unit length, (N, C); row n of the keys is the positive of query n.
        queue: the negatives (K, C), of unit length; None: the keys of all other pictures.
        temperature: above 0.
        bins: B.
    """
    negatives = key if queue is None else queue
    positives = (query * key).sum(dim=1)  # (N,)
    negatives_at = torch.zeros(bins, dtype=torch.int64, device=query.device)
    push_at = torch.zeros(bins, dtype=torch.float64, device=query.device)
    effective, push = 0.0, 0.0
    for start in range(0, len(query), ROWS):
        part = slice(start, start + ROWS)
        similarity = query[part] @ negatives.T  # (n, K)
        if queue is None:
            rows = torch.arange(len(similarity), device=query.device)
            similarity[rows, rows + start] = -torch.inf  # a picture's own key is its positive
        measured = hardness(torch.cat([positives[part, None], similarity], dim=1) / temperature)
        effective += measured.effective_negatives.item() * len(similarity)
        push += measured.push.item() * len(similarity)
        negatives_at += similarity_histogram(similarity, bins)
        push_at += similarity_histogram(similarity, bins, relative_penalty(similarity, temperature))
    count = len(query)
    return Contrast(
        positives.mean().item(),
        len(negatives) - (queue is None),
        effective / count,
        push / count,
        similarity_histogram(positives, bins).tolist(),
        negatives_at.tolist(),
        (push_at / count).tolist(),
    )


def _space(plain: Tensor, views: list[Tensor], pictures: Source) -> Space:
    labels = None if pictures.labels is None else torch.from_numpy(pictures.labels).to(plain.device)
    near = None if labels is None else tolerance(plain, labels).item()
    return Space(uniformity(plain).item(), near, alignment(views[0], views[1]).item())


def _knn(
    features: Tensor,
    encoder: Encoder,
    sources: Sources,
    pictures: Source,
    file: EncoderFile,
    k: int,
    labels_per_class: int,
    draws: int,
    device: torch.device,
) -> Accuracy | None:
    bank = sources.bank
    if bank is None or bank.labels is None or sources.held_out is None or pictures.labels is None:
        return None
    references = plain_features(encoder.backbone, bank, file, device)
    return knn_accuracy(references, bank.labels, features, pictures.labels, k, VOTE, labels_per_class, draws)


def _key_encoder(path: Path, device: torch.device) -> Encoder | None:
    """The momentum encoder of a checkpoint, None for a method that has none."""
    try:
        return build(read_encoder(path, "momentum_encoder")).to(device)
    except ForeignFileError:
        return None


def _queue(method: dict[str, Tensor], device: torch.device) -> Tensor | None:
    """The keys of images in a checkpoint's queue (K, C); None without a queue, or while it holds random ones only."""
    if "queue.keys" not in method:
        return None
    keys = method["queue.keys"][method["queue.index"] != UNKNOWN]
    return unit_length(keys.to(device)) if len(keys) else None
