"""Measures of the representation while it is trained: what `moco.analysis` says of a step's queries, keys and queue."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moco.analysis import (
    EMPTY,
    alignment,
    covariance_spectrum,
    duplicate_share,
    feature_std,
    hardness,
    key_ages,
    key_drift,
    own_key_share,
    power_law_exponent,
    rank_me,
    same_label_share,
    similar_share,
    similarity_histogram,
    spread,
    tolerance,
    uniformity,
)
from moco.builder import UNKNOWN, KeyQueue, MoCo, Output, unit_length
from moco.engine.step import Method
from moco.losses import info_nce_logits, info_nce_streamed
from moco.models.norm import untracked

KEYS = 4096  # whose spectrum is taken: the newest of the queue
QUERIES = 16  # whose logits are looked at one by one
TOP = 10  # negatives of `top_share`
LIKELY_FALSE = 0.9  # a queue's key this similar to the query's own is likely of the same thing


class Observer:
    """Looks at a step of two samples or more, see `train_step`; its measures are named "analysis/...".

    Args:
        method: what is trained.
        labels: the class of each sample of the data set, (samples,), -1 where unknown; None without.
        keys_per_step: keys that a step enqueues, of all ranks and directions.
        shuffled: whether keys are shuffled between BN groups.
        precision: autocast's type.
    """

    def __init__(
        self, method: Method, labels: Tensor | None, keys_per_step: int, shuffled: bool, precision: torch.dtype
    ) -> None:
        self._method, self._labels, self._keys_per_step = method, labels, keys_per_step
        self._shuffled, self._precision = shuffled, precision
        self.histograms: dict[str, Tensor] = {}  # of this rank's last look: counts over -1 ... 1

    @torch.no_grad()
    def __call__(self, output: Output, views: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        """Measures of shape (), float32; nan where there is nothing to measure yet."""
        query, key, queue = output.query, output.key, self._method.queue
        temperature = self._temperature()
        found = {"alignment": alignment(query, key), "uniformity": uniformity(key)}
        bank = key if queue is None else _newest(queue)
        if len(bank) < len(key):
            bank = key
        found |= {
            "effective_rank": rank_me(bank),
            "alpha_req": _exponent(bank),
            "spread": spread(bank),
            "std_lowest": feature_std(bank).amin(),
        }
        if self._labels is not None:
            known = self._labels[index] >= 0
            if known.sum() > 1:
                found["tolerance"] = tolerance(key[known], self._labels[index][known])
        self.histograms = {"positives": similarity_histogram((query * key).sum(dim=1))}
        if queue is not None:
            found |= self._against(queue, query, key, index, temperature)
            if self._shuffled and isinstance(self._method, MoCo):
                found |= self._leak(self._method, query, key, views, index, temperature)
        return {f"analysis/{name}": value.float() for name, value in found.items()}

    def _temperature(self) -> float:
        learned = getattr(self._method, "learned_temperature", None)
        value = self._method.temperature if learned is None else learned()  # type: ignore[attr-defined]
        return float(value)

    def _against(
        self, queue: KeyQueue, query: Tensor, key: Tensor, index: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """What the queue's keys are to the batch."""
        some = slice(QUERIES)
        masked = bool(getattr(self._method, "mask_own_keys", False))
        allowed = queue.negatives(index[some], masked)  # (16, K) or (1, K)
        logits = info_nce_logits(query[some], key[some], queue.keys, temperature, allowed)  # (16, 1 + K)
        self.histograms["negatives"] = similarity_histogram(logits[:, 1:] * temperature)
        ages = key_ages(queue.count, queue.size, self._keys_per_step).float()
        found = {
            "top_share": hardness(logits, TOP).top_share,
            "key_age": ages.masked_fill(ages == EMPTY, torch.nan).nanmean(),
            "key_drift": key_drift(queue.keys, queue.index, key, index).nanmean(),
            "own_key_share": own_key_share(queue.index, index).mean(),
            "likely_false_share": similar_share(key[some], queue.keys, LIKELY_FALSE, allowed).mean(),
            "duplicate_share": duplicate_share(key[some], queue.keys, allowed),
        }
        if self._labels is not None:
            known = self._labels[index[some]] >= 0
            owners = self._labels[queue.index.clamp(min=0)].masked_fill(queue.index == UNKNOWN, -2)
            share = same_label_share(self._labels[index[some]], owners, allowed)
            found["same_label_share"] = share.masked_fill(~known, torch.nan).nanmean()
        return found

    def _leak(
        self, method: MoCo, query: Tensor, key: Tensor, views: Sequence[Tensor], index: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """The loss with the keys as they are, and with keys that were normalised in the groups of their queries.

        Where statistics leak, the second is the lower one (He et al., 2020, Sec. 3.3).
        """
        view = method.directions[0][1]
        device = views[view].device.type
        encoder: nn.Module = method.momentum_encoder
        with untracked(encoder), torch.autocast(device, self._precision, enabled=self._precision != torch.float32):
            plain = unit_length(encoder(views[view]))  # (N, C)
        allowed = method.queue.negatives(index, mask_own_keys=False)
        losses = [info_nce_streamed(query, keys, method.queue.keys, temperature, allowed).loss for keys in (key, plain)]
        return {"loss_shuffled": losses[0], "loss_unshuffled": losses[1]}


def _newest(queue: KeyQueue) -> Tensor:
    """The newest keys of images, at most `KEYS`, (M, C)."""
    slots = (queue.count - 1 - torch.arange(min(KEYS, queue.size), device=queue.count.device)) % queue.size
    return queue.keys[slots[queue.index[slots] != UNKNOWN]]


def _exponent(bank: Tensor) -> Tensor:
    """alpha-ReQ; nan for features that have collapsed to fewer dimensions than its fit needs."""
    try:
        return power_law_exponent(covariance_spectrum(bank))
    except ValueError:
        return bank.new_tensor(math.nan)
