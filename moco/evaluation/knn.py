"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., CVPR 2018, section 3.4).

Legend: M reference ("bank") features, Q queries, D dimension, L classes.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.data.keyed import DRAW_LABELS, permutation


class Accuracy(NamedTuple):
    """Top-1 accuracy in percent; over several draws of the labels their mean and standard deviation."""

    mean: float
    std: float
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} %" + (f" ± {self.std:.1f}" if self.draws > 1 else "")


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, chunk: int = 1024
) -> Tensor:
    """Each query's class: the vote of its k nearest by cosine, weighted with exp(similarity / temperature).

    Args:
        bank: features (M, D), of any length; they are normalised here.
        bank_labels: (M,), classes from 0.
        queries: (Q, D).
        k: neighbours; more than M means all M.
        temperature: above 0.
        chunk: queries at once; memory is chunk x M.

    Returns:
        Predicted classes, shape (Q,).
    """
    classes = int(bank_labels.max()) + 1
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    predictions = []
    for part in queries.split(chunk):
        similarity, neighbours = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # (chunk, k)
        # Less the largest, which no vote changes: exp(1 / 0.01) is beyond float32.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, bank_labels[neighbours], weights)  # (chunk, L)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def draw_labels(labels: NDArray[np.int64], per_class: int, draw: int) -> NDArray[np.int64]:
    """Positions of `per_class` samples of each class, a function of the draw alone: every encoder gets the same.

    Raises:
        ValueError: if a class has fewer samples.
    """
    order = permutation(0, 0, len(labels), stream=DRAW_LABELS + draw)
    picked = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    if any(len(each) < per_class for each in picked):
        raise ValueError(
            f"evaluate.labels_per_class={per_class}, but the smallest class has {min(map(len, picked))} samples"
        )
    return np.concatenate(picked)


def knn_accuracy(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    labels: NDArray[np.int64],
    k: int = 200,
    temperature: float = 0.1,
    labels_per_class: int = 0,
    draws: int = 100,
) -> Accuracy:
    """kNN accuracy with all labels, or with few labels a class averaged over many draws of them.

    With all labels kNN saturates on easy data and shows nothing of the encoder; few labels do.

    Args:
        bank, queries: features (M, D) and (Q, D).
        bank_labels, labels: (M,) and (Q,).
        k, temperature: see `knn_predict`.
        labels_per_class: 0 uses the whole bank, once.
        draws: how many draws of the few labels.
    """
    truth = torch.from_numpy(labels).to(bank.device)
    scores = []
    for draw in range(draws if labels_per_class else 1):
        rows = draw_labels(bank_labels, labels_per_class, draw) if labels_per_class else np.arange(len(bank))
        at = torch.from_numpy(rows).to(bank.device)
        few = torch.from_numpy(bank_labels[rows]).to(bank.device)
        predictions = knn_predict(bank[at], few, queries, k, temperature)
        scores.append(100 * (predictions == truth).double().mean().item())
    return Accuracy(float(np.mean(scores)), float(np.std(scores)), len(scores))
