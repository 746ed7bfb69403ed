"""Momentum Contrast: the key queue, the momentum encoder, and MoCo v1, v2 and v2+.

    Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020)
    Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020)

One training step is the paper's Algorithm 1, in its order (see `moco/training/step.py`):

    keys = moco.encode_keys(views)                     k = f_k(x_k), no gradient
    loss = moco(views, keys, index); loss.backward()   q = f_q(x_q); InfoNCE(q, k, queue)
    optimizer.step()                                   update f_q
    moco.update_momentum_encoder(momentum)             f_k = m f_k + (1 - m) f_q
    moco.enqueue(keys, index)                          enqueue k, dequeue the oldest: last

v1 and v2 differ in the encoder's head, the temperature, the augmentation and the schedule, which
are configuration. v2+ is symmetric: each view is once the query and once the key.

Deliberate deviation: the official code updates the momentum encoder between encoding query and key, at the start of
the next step. The keys are the same; done at the end, a step that fails changes nothing.

What is changed of InfoNCE on the way (`moco.losses.Switches`, labels, a learned temperature) stands behind the one
call that compares; all of it is off unless asked for. With labels it is SupMoCo:

    Supervised Momentum Contrastive Learning for Few-Shot Classification (Majumder et al., 2021)

Legend: N local batch, C embedding, K queue length, V = 2 views, W processes.
"""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.data.keyed import MIX, keyed_uniform
from moco.distributed import gather, permute, rank
from moco.losses import LearnedTemperature, Switches, Temperature, info_nce_streamed, logit_measures, switched_contrast

UNKNOWN = -1  # the sample index of a key that came from no image
NO_CLASS = torch.iinfo(torch.int64).min  # the class of such a key
STREAM_FROM = 2**22  # N x K logits from which they are not kept: 16 MiB of float32, above what caches hold


def classes_of_their_own(labels: Tensor) -> Tensor:
    """Labels (samples,) with each unknown one, below 0, made a class of that sample alone."""
    return torch.where(labels < 0, -1 - torch.arange(len(labels), device=labels.device), labels)


class KeyQueue(nn.Module):
    """The dictionary: a ring of the K newest keys, and of which sample each one shows.

    Args:
        size: K.
        dim: C.
        start: "random" fills it with random unit vectors that count as negatives, as the official code does;
            "empty" takes entries out of the negatives until a key is in them.

    Raises:
        ValueError: if `size` is below 1 or `start` is unknown.
    """

    keys: Tensor  # (K, C), unit length
    index: Tensor  # (K,), the sample that each key shows, or UNKNOWN
    count: Tensor  # (), how many keys were ever enqueued; the next one goes to slot count % K

    def __init__(self, size: int, dim: int, start: str = "random") -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"method.queue_size={size} must be at least 1")
        if start not in ("random", "empty"):
            raise ValueError(f"method.queue_start={start!r} must be 'random' or 'empty'")
        self.size, self.start = size, start
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("index", torch.full((size,), UNKNOWN))
        self.register_buffer("count", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Puts the global batch's keys (n, C) and sample indices (n,) in the place of the oldest ones.

        Any n will do: the ring wraps around, and of more than K keys the newest K stay.
        """
        dropped = max(0, len(keys) - self.size)
        slots = torch.arange(dropped, len(keys), device=self.count.device)
        slots = (self.count + slots) % self.size  # on the device: a pointer on the host would wait for it
        self.keys[slots] = keys[dropped:].to(self.keys.dtype)
        self.index[slots] = index[dropped:]
        self.count += len(keys)

    def filled(self) -> int:
        """How many entries hold the key of an image."""
        return min(int(self.count), self.size)

    def negatives(self, index: Tensor, mask_own_keys: bool) -> Tensor | None:
        """Which entries are negatives of which query, (N, K) or (1, K); None means all of them.

        Args:
            index: the queries' sample indices, (N,).
            mask_own_keys: take out the stale keys of a query's own image: no negatives of it.
        """
        allowed = None
        if self.start == "empty":
            allowed = (torch.arange(self.size, device=index.device) < self.count)[None]  # (1, K)
        if mask_own_keys:
            others = self.index != index[:, None]  # (N, K)
            allowed = others if allowed is None else allowed & others
        return allowed


def unit_length(x: Tensor) -> Tensor:
    """L2-normalized rows (N, C), in float32 at least: in bf16 their length would be off by a thousandth."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


class Output(NamedTuple):
    """What a method's forward returns: the loss to differentiate, detached measures, and a pair of each sample."""

    loss: Tensor  # ()
    measures: dict[str, Tensor]  # each of shape ()
    query: Tensor  # (N, C), detached; of two directions the first one's
    key: Tensor  # (N, C), its positives


class MoCo(nn.Module):
    """MoCo v1, v2 (one direction) and v2+ (symmetric).

    Args:
        encoder: f_q, images (N, 3, S, S) to embeddings (N, dim). f_k starts as its copy.
        dim: C.
        queue_size: K.
        temperature: T.
        queue_start: see `KeyQueue`.
        mask_own_keys: see `KeyQueue.negatives`.
        symmetric: also query with the second view against the first (v2+).
        reduction: of the two directions' losses: "sum" (the official notebook) or "mean".
        labels: the class of each sample of the data set, integers (samples,), -1 where unknown: the queue's keys of
            a query's class are positives of it too (SupMoCo).
        switches: what is changed of InfoNCE.
        learned_temperature: trained along, in place of T.
        seed: of the random numbers that mixing negatives needs; they are a function of it and of `step`.

    Raises:
        ValueError: for values that no step could use.
    """

    labels: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 128,
        queue_size: int = 65536,
        temperature: float = 0.07,
        queue_start: str = "random",
        mask_own_keys: bool = True,
        symmetric: bool = False,
        reduction: Literal["sum", "mean"] = "mean",
        labels: Tensor | None = None,
        switches: Switches | None = None,
        learned_temperature: LearnedTemperature | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"method.reduction={reduction!r} must be 'sum' or 'mean'")
        self.encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim, queue_start)
        self.temperature, self.mask_own_keys, self.reduction = temperature, mask_own_keys, reduction
        # (query's view, key's view) of each direction
        self.directions = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        self.passes = len(self.directions)  # of an encoder in one micro-batch
        self.register_buffer("labels", None if labels is None else classes_of_their_own(labels), persistent=False)
        self.switches, self.learned_temperature = switches or Switches(), learned_temperature
        self.seed, self.step = seed, 0  # whoever counts the steps says which one it is

    @torch.no_grad()
    def encode_keys(
        self, views: Sequence[Tensor], shuffles: Sequence[NDArray[np.int64]] | None, micro_batch: int
    ) -> dict[int, Tensor]:
        """Keys of the whole local batch, for the views that serve as keys: {view: (N, C)}.

        Args:
            views: V tensors (N, 3, S, S).
            shuffles: for each view a permutation of the global batch (0 ... W N - 1), or None. BN then sees
                the keys in other groups than their queries, so a group's statistics give no answer away.
            micro_batch: how many images go through the encoder at once.
        """
        keys = {}
        for _, view in self.directions:
            images = views[view]  # (N, 3, S, S)
            if shuffles is not None:
                images = permute(images, shuffles[view])
            k = torch.cat([unit_length(self.momentum_encoder(part)) for part in images.split(micro_batch)])
            if shuffles is not None:
                k = permute(k, np.argsort(shuffles[view]))
            keys[view] = k  # (N, C)
        return keys

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """The loss of one micro-batch against the queue as it was before this step.

        Args:
            views: V tensors (N, 3, S, S).
            keys: {view: (n, C)} of the whole local batch, from `encode_keys`.
            index: the micro-batch's sample indices, (N,).
            start: where in the local batch the micro-batch begins.
        """
        temperature = self.temperature if self.learned_temperature is None else self.learned_temperature()
        losses, measured, pairs = [], [], []
        for query_view, key_view in self.directions:
            q = unit_length(self.encoder(views[query_view]))  # (N, C)
            k = keys[key_view][start : start + len(q)]  # (N, C)
            uniforms = self._uniforms(query_view, rank() * len(keys[key_view]) + start, index)
            loss, found = self._contrast(q, k, index, temperature, uniforms)
            losses.append(loss)
            measured.append(found)
            pairs.append((q.detach(), k))
        measures = {name: torch.stack([each[name] for each in measured]).mean() for name in measured[0]}
        measures["chance"] = measures["chance"] * (len(losses) if self.reduction == "sum" else 1)
        if isinstance(temperature, Tensor):
            measures["temperature"] = temperature.detach()
        total = torch.stack(losses)
        return Output(total.sum() if self.reduction == "sum" else total.mean(), measures, *pairs[0])

    def _contrast(
        self, q: Tensor, k: Tensor, index: Tensor, temperature: Temperature, uniforms: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE(q, k, queue), shape (), and what is seen of its logits; without ever holding many of them."""
        if self.switches == Switches() and self.labels is None and len(q) * self.queue.size >= STREAM_FROM:
            filled = self.queue.negatives(index, mask_own_keys=False)  # (1, K)
            samples = (index, self.queue.index) if self.mask_own_keys else (None, None)
            streamed = info_nce_streamed(
                q, k, self.queue.keys, temperature, filled, index=samples[0], queue_index=samples[1]
            )
            return streamed.loss, streamed.measures(temperature)
        negatives = self.queue.negatives(index, self.mask_own_keys)  # (N, K)
        positives = self._same_class(index)  # (N, K)
        loss, logits, found = switched_contrast(
            q, k, self.queue.keys, temperature, self.switches, negatives, positives, uniforms
        )
        return loss, found | logit_measures(logits, temperature)

    def _same_class(self, index: Tensor) -> Tensor | None:
        """Which entries are of the class of which query, (N, K), by the samples that they show; None without labels."""
        if self.labels is None:
            return None
        owner = self.labels[self.queue.index.clamp(min=0)]  # (K,)
        owner = owner.masked_fill(self.queue.index == UNKNOWN, NO_CLASS)
        return self.labels[index][:, None] == owner

    def _uniforms(self, view: int, first: int, index: Tensor) -> Tensor | None:
        """Random numbers for mixing, (N, draws): of the queries from place `first` of the global batch on.

        Their key is (seed, step, place, view), which says as much as the sample index would; that one is on the device
        and the host would have to wait for it.
        """
        if not self.switches.draws:
            return None
        places = np.arange(first, first + len(index))
        return torch.from_numpy(keyed_uniform(self.seed, self.step, places, MIX + view, self.switches.draws)).to(
            index.device
        )

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        """f_k = m f_k + (1 - m) f_q (Eq. 2). Parameters only: BN's running statistics are f_k's own."""
        torch._foreach_lerp_(
            list(self.momentum_encoder.parameters()), list(self.encoder.parameters()), weight=1 - momentum
        )

    @torch.no_grad()
    def enqueue(self, keys: dict[int, Tensor], index: Tensor) -> None:
        """Enqueues all ranks' keys, view after view, each in the order of the global batch."""
        index = gather(index)  # (W N,)
        all_keys = gather(torch.cat([keys[view] for view in sorted(keys)], dim=1))  # (W N, views C): one collective
        for k in all_keys.split(self.queue.keys.shape[1], dim=1):
            self.queue.enqueue(k, index)  # (W N, C)
