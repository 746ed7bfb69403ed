"""Measures of a finished run of the temperature study: geometry, few-label kNN, similarities and pushes.

All networks are in eval mode. The images are held-out images if the data set has them, else training images. Uniformity
and tolerance are computed on plain evaluation views. Alignment compares the encoder's outputs for two augmented views.
The push on a negative is its softmax value: the gradient of the loss with respect to its similarity, times T.
Similarities and pushes are as in the loss: the momentum encoder makes the positive, the queue's keys are the negatives.

Legend: N images, D feature dimension, C projection dimension, K negatives, B bins.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.analysis import alignment, hardness, relative_penalty, similarity_histogram, tolerance, uniformity
from moco.analysis.studies.outputs import BATCH, VOTE_TEMPERATURE, augmented_views, encode, in_parts, plain_features
from moco.builder import UNKNOWN, unit_length
from moco.config import require
from moco.config.temperature import TemperatureConfig
from moco.data.sources import Source, Sources, limited
from moco.evaluation.knn_classifier import Accuracy, KnnSettings, knn_accuracy
from moco.evaluation.subsets import naming_field
from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.models.encoder import Encoder
from moco.runs import checkpoint


@dataclass(frozen=True)
class Space:
    """The geometry of one network's outputs."""

    uniformity: float
    tolerance: float | None  # None without labels
    alignment: float


@dataclass(frozen=True)
class Contrast:
    """Similarities and pushes of N queries, each with one positive and K negatives."""

    positive_similarity: float
    negatives: int  # K
    effective_negatives: float  # mean over the queries, 1 ... K
    push: float  # 1 - the softmax value of the positive, 0 (no gradient is left) ... 1
    positives_at: list[int]  # (B,), number of positives whose similarity is in each bin over -1 ... 1
    negatives_at: list[int]  # (B,), number of negatives whose similarity is in each bin
    push_at: list[float]  # (B,), share of the push on the negatives in each bin, a mean over the queries; sums to 1


@dataclass(frozen=True)
class Run:
    """A run of the study and its measures."""

    temperature: float
    seed: int
    path: str
    step: int
    seconds: float  # of training
    pictures: int  # N; the results file uses this name
    knn: Accuracy | None  # percent; None without labeled held-out images
    projection: Space
    backbone: Space
    contrast: Contrast

    def plain(self) -> dict[str, Any]:
        """Return the values for the results file."""
        return asdict(self) | {"knn": None if self.knn is None else self.knn._asdict()}


def by_temperature(runs: Sequence[Run]) -> dict[float, list[Run]]:
    """Group runs by their temperature, in ascending order."""
    return {at: [run for run in runs if run.temperature == at] for at in sorted({run.temperature for run in runs})}


def measure(
    path: Path, temperature: float, seed: int, sources: Sources, config: TemperatureConfig, device: torch.device
) -> Run:
    """Measure the newest checkpoint of a run with this temperature and seed on these sources.

    Raises:
        ConfigError: if the run has no checkpoint, if there are fewer than two images, or if a class has fewer than
            `labels_per_class` reference images.
        CheckpointError, ForeignFileError: if the checkpoint cannot be read.
    """
    found = checkpoint.list_checkpoints(path / "checkpoints")
    require(bool(found), f"run {path} has no checkpoint: delete it and run the same command again to retrain it")
    file, state = read_encoder(found[0]), checkpoint.load(found[0])
    images = limited(sources.held_out or sources.train, config.images)
    require(len(images) >= 2, f"data.root has {len(images)} image to measure: name a folder with 2 or more")
    views = augmented_views(images, file, device)
    outputs = encode(file, images, views, device)
    query, other = (in_parts(outputs.encoder.head, each) for each in outputs.view_features)  # (N, C) each
    key = in_parts(_momentum_encoder(found[0], device) or outputs.encoder, views[1])  # (N, C)
    knn, bank = None, sources.bank
    if bank is not None and bank.labels is not None and sources.held_out is not None and images.labels is not None:
        references = plain_features(outputs.encoder.backbone, bank, file, device)
        few_labels = KnnSettings(config.k, VOTE_TEMPERATURE, config.labels_per_class, config.draws)
        with naming_field("labels_per_class", config.labels_per_class):
            knn = knn_accuracy(references, bank.labels, outputs.features, images.labels, few_labels)
    projection = _space(outputs.projection, (query, other), images)
    backbone = _space(outputs.features, outputs.view_features, images)
    queue = _queue(state["method"], device)
    contrast = contrast_of(unit_length(query), unit_length(key), queue, temperature, config.bins)
    about = (temperature, seed, str(path), file.step, float(state["seconds"]), len(images))
    return Run(*about, knn, projection, backbone, contrast)


@torch.no_grad()
def contrast_of(query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, bins: int) -> Contrast:
    """Measure the similarities and pushes of queries (N, C); `key` (N, C) holds their positives, in the same order.

    The negatives are the queue (K, C); without a queue, the keys of all other images. All have unit length.
    """
    negatives = key if queue is None else queue
    positives = (query * key).sum(dim=1)  # (N,)
    negative_counts = torch.zeros(bins, dtype=torch.int64, device=query.device)
    push_sums = torch.zeros(bins, dtype=torch.float64, device=query.device)
    effective, push = 0.0, 0.0
    for start in range(0, len(query), BATCH):
        part = slice(start, start + BATCH)
        similarity = query[part] @ negatives.T  # (n, K)
        if queue is None:
            rows = torch.arange(len(similarity), device=query.device)
            similarity[rows, rows + start] = -torch.inf  # an image's own key is its positive
        measured = hardness(torch.cat([positives[part, None], similarity], dim=1) / temperature)
        effective += measured.effective_negatives.item() * len(similarity)
        push += measured.push.item() * len(similarity)
        negative_counts += similarity_histogram(similarity, bins)
        push_sums += similarity_histogram(similarity, bins, relative_penalty(similarity, temperature))
    n, k = len(query), len(negatives) - (queue is None)
    positive_counts = similarity_histogram(positives, bins)
    histograms = (positive_counts.tolist(), negative_counts.tolist(), (push_sums / n).tolist())
    return Contrast(positives.mean().item(), k, effective / n, push / n, *histograms)


def _space(plain: Tensor, views: tuple[Tensor, Tensor], images: Source) -> Space:
    labels = None if images.labels is None else torch.from_numpy(images.labels).to(plain.device)
    within_class = None if labels is None else tolerance(plain, labels).item()
    return Space(uniformity(plain).item(), within_class, alignment(*views).item())


def _momentum_encoder(path: Path, device: torch.device) -> Encoder | None:
    """Return the momentum encoder of a checkpoint; None if the method has none."""
    try:
        return build(read_encoder(path, "momentum_encoder")).to(device)
    except ForeignFileError:
        return None


def _queue(method: dict[str, Tensor], device: torch.device) -> Tensor | None:
    """Return the queue's keys whose images are known, (K, C); None if there is no queue or no such key."""
    if "queue.keys" not in method:
        return None
    keys = method["queue.keys"][method["queue.index"] != UNKNOWN]
    return unit_length(keys.to(device)) if len(keys) else None
