"""Measures of the representation while training: `moco.analysis` on the queries, keys and queue of a step."""

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco import analysis
from moco.builder import UNKNOWN, KeyQueue, Method, Output, queue_info_nce, unit_length
from moco.distributed import gather, permute, world_size
from moco.losses import info_nce_logits
from moco.models.norm import GroupedBatchNorm, untracked
from moco.runtime.device import float64_device
from moco.runtime.precision import autocast

KEYS = 4096  # number of the newest keys of the queue whose rank, spectrum and spread are measured
QUERIES = 16  # queries of a step whose logits are measured
ENCODED = 64  # images per rank that are encoded again, rounded up to complete BN groups, at least two groups
TOP = 10  # number of hardest negatives in the measure `top_share`
LIKELY_FALSE = 0.9  # cosine above which a key in the queue probably shows the same thing as the query's key


class Monitor:
    """Measures a step of at least two samples; see `train_step`. The names of the measures begin with "analysis/".

    A call measures the last micro-batch of all ranks together, and the losses with shuffled and with unshuffled keys on
    `ENCODED` images per rank. All ranks return measures with the same names in the same order, so that the step can
    average the measures in one collective.

    Args:
        labels: the class of each image of the data set, (images,), -1 if unlabeled; None without labels. The
            tensor is on the `float64_device` of the method, where all measures except the losses are computed.
        keys_per_step: number of keys that a step enqueues: the global batch size times the views that serve as keys.
        shuffled: whether the step shuffles its keys between BN groups.
        precision: data type of autocast.
        every: steps between two measurements; 0: never.
    """

    def __init__(
        self,
        method: Method,
        labels: Tensor | None,
        keys_per_step: int,
        shuffled: bool,
        precision: torch.dtype,
        every: int = 1,
    ) -> None:
        self._method, self._labels, self._keys_per_step = method, labels, keys_per_step
        self._shuffled, self._precision, self._every = shuffled, precision, every
        self.histograms: dict[str, Tensor] = {}  # of the last measurement: counts over -1 ... 1

    def is_due(self, done: int) -> bool:
        """Return whether to measure step number `done`, counted from 1."""
        return bool(self._every) and done % self._every == 0

    @torch.no_grad()
    def __call__(self, output: Output, views: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        """Return measures by name, of shape (), float32; nan if there is nothing to measure yet, or nothing finite."""
        queue, temperature = self._method.queue, self._temperature()
        device = float64_device(index.device)
        both = gather(torch.cat([output.query, output.key], dim=1))  # (W N, 2 C), one collective
        query, key = both.to(device).chunk(2, dim=1)
        samples = gather(index).to(device)  # (W N,)
        measured = queue if queue is None or device == index.device else copy.deepcopy(queue).to(device)
        bank = key if measured is None else _newest(measured)
        if len(bank) < len(key):
            bank = key
        found = {
            "alignment": analysis.alignment(query, key),
            "uniformity": analysis.uniformity(key),
            "effective_rank": _or_nan(analysis.rank_me, bank),
            "alpha_req": _or_nan(analysis.alpha_req, bank),
            "spread": analysis.spread(bank),
            "std_lowest": analysis.feature_std(bank).amin(),
        }
        if self._labels is not None:
            classes = self._labels[samples]
            known = classes >= 0
            found["tolerance"] = _or_nan(analysis.tolerance, key[known], classes[known])
        self.histograms = {"positives": analysis.similarity_histogram((query * key).sum(dim=1))}
        if queue is not None and measured is not None:
            found |= self._queue_measures(measured, query, key, samples, temperature)
            found |= self._shuffle_losses(queue, output, views, index, temperature)
        return {f"analysis/{name}": value.float().to(index.device) for name, value in found.items()}

    def _temperature(self) -> float:
        learned = getattr(self._method, "learned_temperature", None)
        return float(self._method.temperature if learned is None else learned())

    def _queue_measures(
        self, queue: KeyQueue, query: Tensor, key: Tensor, index: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """Compare the batch with the keys in the queue."""
        some = slice(QUERIES)
        allowed = queue.negatives(index[some])  # (16, K) or (1, K), or None: all
        logits = info_nce_logits(query[some], key[some], queue.keys, temperature, allowed)  # (16, 1 + K)
        self.histograms["negatives"] = analysis.similarity_histogram(logits[:, 1:] * temperature)
        ages = analysis.key_ages(queue.count, queue.size, self._keys_per_step).float()
        found = {
            "top_share": analysis.hardness(logits, TOP).top_share,
            "key_age": ages.masked_fill(ages == analysis.EMPTY, torch.nan).nanmean(),
            "key_drift": analysis.key_drift(queue.keys, queue.index, key, index).nanmean(),
            "own_key_share": analysis.own_key_share(queue.index, index).mean(),
            "likely_false_share": analysis.similar_share(key[some], queue.keys, LIKELY_FALSE, allowed).mean(),
            "duplicate_share": analysis.duplicate_share(key[some], queue.keys, allowed),
        }
        if self._labels is not None:
            known = self._labels[index[some]] >= 0
            key_labels = self._labels[queue.index.clamp(min=0)].masked_fill(queue.index == UNKNOWN, -2)  # -2: no label
            share = analysis.same_label_share(self._labels[index[some]], key_labels, allowed)
            found["same_label_share"] = share.masked_fill(~known, torch.nan).nanmean()
        return found

    def _shuffle_losses(
        self, queue: KeyQueue, output: Output, views: Sequence[Tensor], index: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """Return the losses with shuffled and unshuffled keys; unshuffled, a key is in the BN group of its query.

        The loss with unshuffled keys is lower if the statistics of a group reveal the positive (He et al., 2020, Sec.
        3.3). The step has encoded the keys of one of the two losses; those of the other cost a forward pass of the
        momentum encoder. Return {} without a momentum encoder, or without a `GroupedBatchNorm` that has several groups.
        """
        encoder = self._method.momentum_encoder
        if encoder is None:
            return {}
        group = next((layer.group_size for layer in encoder.modules() if isinstance(layer, GroupedBatchNorm)), 0)
        some = slice(group * max(2, -(-ENCODED // group)) if group else 0)
        images = views[self._method.directions[0][1]][some]  # (n, channels, S, S)
        order = _across_groups(world_size() * len(images), group)
        if order is None:
            return {}
        with untracked(encoder), autocast(images.device, self._precision):
            if self._shuffled:
                other = unit_length(encoder(images))  # (n, C)
            else:
                other = permute(unit_length(encoder(permute(images, order))), np.argsort(order))  # (n, C)
        first, second = (
            queue_info_nce(output.query[some], k, queue, temperature, index[some])[0] for k in (output.key[some], other)
        )
        shuffled, unshuffled = (first, second) if self._shuffled else (second, first)
        return {"loss_shuffled": shuffled, "loss_unshuffled": unshuffled}


def _across_groups(samples: int, group: int) -> NDArray[np.int64] | None:
    """Return an order whose groups each mix as many of the old groups as possible; None without several groups."""
    if group == 0 or samples <= group:
        return None
    return np.arange(samples).reshape(-1, group).T.ravel()


def _newest(queue: KeyQueue) -> Tensor:
    """Return at most `KEYS` of the newest keys, (M, C), without keys whose image is `UNKNOWN`."""
    slots = (queue.count - 1 - torch.arange(min(KEYS, queue.size), device=queue.count.device)) % queue.size
    return queue.keys[slots[queue.index[slots] != UNKNOWN]]


def _or_nan(measure: Callable[..., Tensor], features: Tensor, *more: Tensor) -> Tensor:
    """Return a measure of features; nan if they have too few dimensions or samples, or values that are not finite."""
    try:
        return measure(features, *more)
    except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return features.new_tensor(math.nan)
