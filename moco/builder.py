"""Momentum Contrast: the key queue, the momentum encoder, and MoCo v1, v2 and v2+.

    Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020)
    Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020)

One training step is the paper's Algorithm 1 (see `moco/training/step.py`):

    keys = moco.encode_keys(views)                     k = f_k(x_k), no gradient
    output = moco(views, keys, index)                  q = f_q(x_q); InfoNCE(q, k, queue)
    output.loss.backward(); optimizer.step()           update f_q
    moco.update_momentum_encoder(momentum)             f_k = m f_k + (1 - m) f_q
    moco.enqueue(output.new_keys, index)               enqueue k, dequeue the oldest keys

v1 and v2 differ only in configuration: head, temperature, augmentation and schedule. v2+ is symmetric: each view is the
query once and the key once.

Deliberate deviation: the official code updates the momentum encoder at the start of the next step, between encoding
query and key. The keys are the same, and here a step that fails changes nothing.

Changes to InfoNCE are off by default. `MoCo._contrast` applies `moco.losses.Switches` and labels, and `MoCo.forward` a
learned temperature. With labels the method is SupMoCo:

    Supervised Momentum Contrastive Learning for Few-Shot Classification (Majumder et al., 2021)

Legend: N micro-batch, n local batch, C embedding, K queue length, V = 2 views, E views that serve as keys, W processes.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.keyed import MIX, keyed_uniform
from moco.distributed import Order, copy_to_device, gather, permute, rank
from moco.losses import LearnedTemperature, Switches, Temperature, contrast, info_nce_streamed, split_temperature
from moco.losses.streamed import Streamed, has_kernel
from moco.models.norm import untracked

Directions = Sequence[tuple[int, int]]  # pairs (query's view, key's view)

UNKNOWN = -1  # the image index of a key whose image is unknown: a random initial key, or one from another run's queue
NO_CLASS = torch.iinfo(torch.int64).min  # the class of such a key; no image has this class
# With this many logits (N x K) or more, the loss does not store them: 16 MiB in float32, more than many caches hold.
STREAM_FROM = 2**22


def separate_unlabeled(labels: Tensor) -> Tensor:
    """Return labels (images,) in which each unlabeled image, with a label below 0, is a class of its own."""
    return torch.where(labels < 0, -1 - torch.arange(len(labels), device=labels.device), labels)


class KeyQueue(nn.Module):
    """The dictionary: a ring buffer of the K newest keys and the indices of their images.

    Args:
        size: K.
        dim: C.
        start: "random": filled with random unit vectors that count as negatives, as in the official code. "empty": an
            entry is a negative only after a key is stored in it.
        mask_own_keys: exclude the older keys of a query's own image from its negatives.
    """

    keys: Tensor  # (K, C), unit length
    index: Tensor  # (K,), the image index of each key, or UNKNOWN
    count: Tensor  # (), number of keys enqueued so far; the next one goes to slot count % K

    def __init__(self, size: int, dim: int, start: str = "random", mask_own_keys: bool = True) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"method.queue_size={size} must be at least 1")
        if start not in ("random", "empty"):
            raise ValueError(f"method.queue_start={start!r} must be 'random' or 'empty'")
        self.size, self.start, self.mask_own_keys = size, start, mask_own_keys
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("index", torch.full((size,), UNKNOWN))
        self.register_buffer("count", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Replace the oldest keys by those of the global batch, (W n, C), with their image indices, (W n,).

        The ring wraps around for any n; if there are more than K keys, the newest K stay.
        """
        dropped = max(0, len(keys) - self.size)
        # `count` is on the device: a Python int would make the host wait for the device.
        slots = (self.count + torch.arange(dropped, len(keys), device=self.count.device)) % self.size
        self.keys[slots] = keys[dropped:].to(self.keys.dtype)
        self.index[slots] = index[dropped:]
        self.count += len(keys)

    @torch.no_grad()
    def load(self, keys: Tensor) -> None:
        """Fill the queue with keys (K, C) of unknown images, the oldest first, and normalize them."""
        self.keys.copy_(unit_length(keys))
        self.index.fill_(UNKNOWN)
        self.count.fill_(self.size)

    def filled(self) -> int:
        """Return the number of entries that hold the key of an image."""
        return min(int(self.count), self.size)

    def filled_mask(self) -> Tensor | None:
        """Return the entries that can be negatives, boolean (1, K); None means all entries."""
        if self.start == "random":
            return None
        return (torch.arange(self.size, device=self.count.device) < self.count)[None]

    def negatives(self, index: Tensor) -> Tensor | None:
        """Return the negatives of queries with image indices (N,), boolean (N, K) or (1, K); None means all."""
        allowed = self.filled_mask()  # (1, K)
        if self.mask_own_keys:
            others = self.index != index[:, None]  # (N, K)
            allowed = others if allowed is None else allowed & others
        return allowed


def unit_length(x: Tensor) -> Tensor:
    """Normalize rows (N, C) in float32 or float64: in bf16 their length would have an error of 0.001."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: Tensor, shuffle: Order | None, micro_batch: int | None = None) -> Tensor:
    """Return the keys of one view of the local batch, (n, C), without gradient.

    Args:
        encoder: f_k.
        images: (n, channels, S, S).
        shuffle: a permutation of the global batch (0 ... W n - 1). With it, BN normalizes a key in another group than
            its query, so that BN's statistics do not reveal the positive (paper, section 3.3). None: no shuffling.
        micro_batch: number of images per forward pass; None: all.
    """
    x = images if shuffle is None else permute(images, shuffle)
    k = torch.cat([unit_length(encoder(part)) for part in x.split(micro_batch or len(x))])
    return k if shuffle is None else permute(k, shuffle.argsort())


@torch.no_grad()
def update_momentum_encoder(momentum_encoder: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """Set f_k = m f_k + (1 - m) f_q (Eq. 2). Updates only parameters: f_k has its own running statistics of BN."""
    torch._foreach_lerp_(list(momentum_encoder.parameters()), list(encoder.parameters()), weight=1 - momentum)


def encode_queries(encoder: nn.Module, views: Sequence[Tensor], directions: Directions) -> dict[int, Tensor]:
    """Return the queries, {view: (N, C)}, of the query views in `directions` and of all small views.

    Small views leave BN's running statistics unchanged: the features are used later for images of the full size.
    """
    queries = {view: unit_length(encoder(views[view])) for view, _ in directions}
    if len(views) > 2:
        with untracked(encoder, backward=True):
            queries |= {view: unit_length(encoder(views[view])) for view in range(2, len(views))}
    return queries


def with_small_views(directions: Directions, views: int) -> list[tuple[int, int]]:
    """Return `directions`, and then the pairs of each small view with each key view (multi-crop).

    `views` is the number of views; the third and later ones are small.

    Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al., 2020), section 3.2
    """
    keys = sorted({key for _, key in directions})
    return [*directions, *((view, key) for view in range(2, views) for key in keys)]


def queue_contrast(
    q: Tensor, k: Tensor, queue: KeyQueue, temperature: Temperature, index: Tensor, decoupled: bool = False
) -> Streamed:
    """Compute InfoNCE(q, k, queue) for each query, without storing the logits (N, 1 + K).

    `q` and `k` have shape (N, C); `index`, (N,), holds the image indices.
    """
    filled, samples = queue.filled_mask(), (index, queue.index) if queue.mask_own_keys else None
    return info_nce_streamed(q, k, queue.keys, temperature, filled, samples=samples, decoupled=decoupled)


def queue_info_nce(
    q: Tensor, k: Tensor, queue: KeyQueue, temperature: Temperature, index: Tensor, decoupled: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return InfoNCE(q, k, queue), shape (), and measures of its logits; see `queue_contrast`."""
    streamed = queue_contrast(q, k, queue, temperature, index, decoupled)
    return streamed.loss, streamed.measures(temperature, decoupled)


def mean_measures(measured: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average the measures, of shape (), of several directions or micro-batches: one operation for all measures."""
    table = torch.stack([torch.stack(list(each.values())) for each in measured])  # (parts, measures)
    return dict(zip(measured[0], table.mean(dim=0).unbind(), strict=True))


class Output(NamedTuple):
    """The result of a method's forward."""

    loss: Tensor  # (), to differentiate
    measures: dict[str, Tensor]  # detached, each of shape (); must contain "chance" and "contrast_accuracy"
    query: Tensor  # (N, C), detached, of the first direction
    key: Tensor  # (N, C), for each query the key of the same image
    new_keys: Tensor | None = None  # (N, E, C), to enqueue after the step; None without a queue


class Method(Protocol):
    """A self-supervised method: an `nn.Module` that `moco.training.step.train_step` can train.

    Its forward takes (views, keys, index, start) and returns an `Output`, see `MoCo.forward`.
    """

    encoder: nn.Module  # f_q
    temperature: float  # T; if it has a schedule, the trainer sets it before each step
    step: int  # number of the current step, from 0; the trainer sets it before each step
    passes: int  # forward passes of each encoder per micro-batch, without those of the small views

    @property
    def momentum_encoder(self) -> nn.Module | None: ...

    @property
    def queue(self) -> KeyQueue | None: ...

    @property
    def directions(self) -> Directions: ...  # without the small views

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Any]: ...  # with `MethodConfig.uses_places` also gets `moco.data.loader.Batch.places`

    def update_momentum_encoder(self, momentum: float) -> None: ...

    def enqueue(self, keys: Tensor, index: Tensor) -> None: ...  # called if the forward returns `new_keys`


class MoCo(nn.Module):
    """MoCo v1, v2 (one direction) and v2+ (symmetric).

    Args:
        encoder: f_q, images (N, channels, S, S) to embeddings (N, C). f_k starts as its copy.
        queue: the dictionary of keys.
        temperature: T, or a temperature that is trained.
        symmetric: also use the second view as the query and the first one as its key (v2+).
        reduction: of the losses of both directions: "sum" (the official notebook) or "mean".
        labels: the class of each image of the data set, integers (images,), -1 if unlabeled: keys of the query's class
            in the queue are positives too (SupMoCo).
        switches: changes to InfoNCE.
        seed: determines, with the step, the random numbers for mixed negatives.
    """

    labels: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        queue: KeyQueue,
        temperature: float | LearnedTemperature = 0.07,
        symmetric: bool = False,
        reduction: Literal["sum", "mean"] = "mean",
        labels: Tensor | None = None,
        switches: Switches | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"method.reduction={reduction!r} must be 'sum' or 'mean'")
        self.encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = queue
        self.temperature, self.learned_temperature = split_temperature(temperature)
        self.reduction, self.switches, self.seed = reduction, switches or Switches(), seed
        self.directions = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        self.passes = len(self.directions)
        self.step = 0
        self.register_buffer("labels", None if labels is None else separate_unlabeled(labels), persistent=False)

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return the keys of the local batch, {view: (n, C)}, of each view that serves as a key.

        `views` are images (n, channels, S, S); `shuffles` has one permutation per view. See the function `encode_keys`.
        """
        shuffled = [None] * len(views) if shuffles is None else shuffles
        key_views = [key_view for _, key_view in self.directions]
        return {v: encode_keys(self.momentum_encoder, views[v], shuffled[v], micro_batch) for v in key_views}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of one micro-batch against the queue before this step.

        Args:
            views: V tensors (N, channels, S, S), and any number of small views, each of which is a query with each key
                view.
            keys: {view: (n, C)} of the local batch, from `encode_keys`.
            index: the image indices of the micro-batch, (N,).
            start: position of the micro-batch in the local batch.
        """
        temperature = self.temperature if self.learned_temperature is None else self.learned_temperature()
        keys_of = {view: k[start : start + len(index)] for view, k in sorted(keys.items())}  # {view: (N, C)}
        losses, measured, pairs = [], [], []
        queries = encode_queries(self.encoder, views, self.directions)  # {view: (N, C)}
        for query_view, key_view in with_small_views(self.directions, len(views)):
            q, k = queries[query_view], keys_of[key_view]  # (N, C) each
            uniforms = self._uniforms(query_view, rank() * len(keys[key_view]) + start, index)
            loss, measures = self._contrast(q, k, index, temperature, uniforms)
            losses.append(loss)
            measured.append(measures)
            pairs.append((q.detach(), k))
        count = len(self.directions) if self.reduction == "sum" else 1  # small views do not change the loss's scale
        measures = mean_measures(measured)
        measures["chance"] = measures["chance"] * count
        if isinstance(temperature, Tensor):
            measures["temperature"] = temperature.detach()
        total = torch.stack(losses).mean() * count
        return Output(total, measures, *pairs[0], new_keys=torch.stack(list(keys_of.values()), dim=1))

    def update_momentum_encoder(self, momentum: float) -> None:
        """Set f_k = m f_k + (1 - m) f_q."""
        update_momentum_encoder(self.momentum_encoder, self.encoder, momentum)

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Enqueue the new keys of all ranks: all keys of the first view, then those of the second.

        `keys` are the `Output.new_keys` of the local batch, (n, E, C), and `index` its image indices, (n,).
        """
        index = gather(index)  # (W n,)
        for k in gather(keys.flatten(1)).split(keys.shape[2], dim=1):  # (W n, E C) -> E times (W n, C)
            self.queue.enqueue(k, index)

    def _contrast(
        self, q: Tensor, k: Tensor, index: Tensor, temperature: Temperature, uniforms: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return InfoNCE(q, k, queue), shape (), and measures of its logits.

        The logits are not stored if there are at least `STREAM_FROM` of them, or if a kernel computes the loss. Labels,
        and switches other than `decoupled`, need the logits: then they are always stored.
        """
        queue = self.queue
        decoupled = self.switches.decoupled
        plain = self.switches == Switches(decoupled=decoupled) and self.labels is None
        if plain and (len(q) * queue.size >= STREAM_FROM or has_kernel(q, k, queue.keys)):
            return queue_info_nce(q, k, queue, temperature, index, decoupled)
        negatives, positives = queue.negatives(index), self._same_class(index)  # (N, K)
        return contrast(q, k, queue.keys, temperature, self.switches, negatives, positives, uniforms)

    def _same_class(self, index: Tensor) -> Tensor | None:
        """Return the entries of each query's class, boolean (N, K); None without labels."""
        if self.labels is None:
            return None
        classes = self.labels[self.queue.index.clamp(min=0)]  # (K,)
        classes = classes.masked_fill(self.queue.index == UNKNOWN, NO_CLASS)
        return self.labels[index][:, None] == classes

    def _uniforms(self, view: int, first: int, index: Tensor) -> Tensor | None:
        """Return random numbers for mixing, (N, draws), for the queries from position `first` of the global batch.

        They depend on seed, step, position and view. They do not depend on `index`, because to read it, the host would
        have to wait for the device.
        """
        if not self.switches.draws:
            return None
        positions = np.arange(first, first + len(index))
        uniforms = keyed_uniform(self.seed, self.step, positions, MIX + view, self.switches.draws)
        return copy_to_device(torch.from_numpy(uniforms), index.device)
