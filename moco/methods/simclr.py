"""Contrast within the batch: SimCLR, with labels SupCon, and plain InfoNCE between two views. One network, no queue.

    A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020)
    Supervised Contrastive Learning (Khosla et al., NeurIPS 2020)

One training step (see `moco/training/step.py`; what MoCo does besides has nothing to do here):

    z = f(all views), all ranks' gathered with gradient; the loss compares each with all others of the global batch
    loss.backward(); optimizer.step()            update f

SupCon whose every sample is a class of its own is SimCLR, so they are one method, told apart by its labels.

Deliberate deviations from the official codes:

- More than two views are allowed; the paper's NT-Xent with V > 2 is SupCon's loss without labels.
- SupCon's factor T / 0.07 is off unless `base_temperature` is given.

Legend: N local batch, W processes, M = W N global batch, V views, C embedding.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import Output, classes_of_their_own, unit_length
from moco.distributed import gather, gather_with_gradient, rank
from moco.losses import LearnedTemperature, Margin, Temperature, in_batch_info_nce, sup_con


class SimCLR(nn.Module):
    """SimCLR, SupCon (with labels), and the simplest contrast in a batch (`candidates="other_view"`).

    BN should see the global batch (`model.bn=sync`): in smaller groups, which the views of a sample share, a group's
    statistics give the positive away.

    Args:
        encoder: f, images (N, 3, S, S) to embeddings (N, C).
        temperature: T.
        labels: the class of each sample of the data set, integers (samples,), -1 where unknown: SupCon.
        candidates: "all": an anchor is compared with all other embeddings, of its own view too. "other_view": with
            those of one other view at a time, of which one is its positive; the mean over the pairs of views.
        contrast_mode: "all": each view is the anchor. "one": the first alone; with "other_view" one direction.
        base_temperature: see `moco.losses.sup_con`; with `candidates="all"`.
        margin, margin_kind: see `moco.losses.add_margin`; with `candidates="other_view"`.
        learned_temperature: trained along, in place of T.

    Raises:
        ValueError: for values that do not go together.
    """

    queue: None = None  # the negatives are the batch
    passes = 1  # of the encoder in one step: all views together
    labels: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        temperature: float = 0.5,
        labels: Tensor | None = None,
        candidates: Literal["all", "other_view"] = "all",
        contrast_mode: Literal["all", "one"] = "all",
        base_temperature: float | None = None,
        margin: float = 0.0,
        margin_kind: Margin = "arc",
        learned_temperature: LearnedTemperature | None = None,
    ) -> None:
        super().__init__()
        if candidates not in ("all", "other_view"):
            raise ValueError(f"method.candidates={candidates!r} must be 'all' or 'other_view'")
        if candidates == "all" and margin != 0:
            raise ValueError(f"method.margin={margin} needs method.candidates='other_view'")
        if candidates == "other_view" and (labels is not None or base_temperature is not None):
            raise ValueError("method.candidates='other_view' takes neither labels nor method.base_temperature")
        self.encoder, self.temperature, self.learned_temperature = encoder, temperature, learned_temperature
        self.candidates, self.contrast_mode, self.base_temperature = candidates, contrast_mode, base_temperature
        self.margin, self.margin_kind = margin, margin_kind
        self.register_buffer("labels", None if labels is None else classes_of_their_own(labels), persistent=False)

    def encode_keys(
        self, views: Sequence[Tensor], shuffles: Sequence[NDArray[np.int64]] | None, micro_batch: int
    ) -> dict[int, Tensor]:
        """None: there are no keys apart from the forward's embeddings.

        Raises:
            ValueError: for micro-batches, which would be compared with themselves only.
        """
        if micro_batch != len(views[0]):
            raise ValueError(f"accumulate={len(views[0]) // micro_batch} must be 1 where the batch is the negatives")
        return {}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """The loss of this process's samples against the global batch.

        Args:
            views: V tensors (N, 3, S, S).
            keys: not used.
            index: the sample indices, (N,).
            start: not used.
        """
        z = unit_length(self.encoder(torch.cat(list(views))))  # (V N, C)
        z = z.unflatten(0, (len(views), len(index)))  # (V, N, C)
        others = gather_with_gradient(z.transpose(0, 1)).transpose(0, 1)  # rows are gathered: samples first; (V, M, C)
        sample = gather(index)  # (M,)
        classes = sample if self.labels is None else self.labels[sample]  # (M,)
        first = rank() * len(index)
        same = classes[first : first + len(index), None] == classes  # (N, M)
        temperature = self.temperature if self.learned_temperature is None else self.learned_temperature()
        if self.candidates == "all":
            loss, logits = sup_con(
                z,
                others,
                first,
                temperature,
                mask=same,
                base_temperature=self.base_temperature,
                contrast_mode=self.contrast_mode,
            )
        else:
            loss, logits = self._between_views(z, others, first, temperature)
        return Output(loss, self._measures(logits, same, temperature), z[0].detach(), z[-1].detach())

    def _between_views(self, z: Tensor, others: Tensor, first: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """The mean InfoNCE over the pairs (anchor's view, other view), and the logits (pairs N, M)."""
        anchors = range(len(z) if self.contrast_mode == "all" else 1)
        own = first + torch.arange(z.shape[1], device=z.device)  # (N,), each anchor's column
        losses, logits = zip(
            *(
                in_batch_info_nce(z[a], others[b], own, temperature, margin=self.margin, margin_kind=self.margin_kind)
                for a in anchors
                for b in range(len(z))
                if a != b
            ),
            strict=True,
        )
        return torch.stack(losses).mean(), torch.cat(logits)

    @torch.no_grad()
    def _measures(self, logits: Tensor, same: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """Means over the anchors; a success is an anchor to which a positive is nearer than all negatives."""
        candidate = logits > -math.inf  # not an anchor itself
        positive = same.repeat(len(logits) // len(same), logits.shape[1] // same.shape[1]) & candidate
        negative = candidate & ~positive
        count = positive.sum(dim=1)  # 0 in a class of one with one view
        similarity = logits.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp(min=1) * temperature
        nearest = [logits.masked_fill(~each, -math.inf).amax(dim=1) for each in (positive, negative)]
        factor = 1.0 if self.base_temperature is None else temperature / self.base_temperature
        measures = {
            "contrast_accuracy": (nearest[0] > nearest[1]).float().mean(),
            "positive_similarity": similarity.mean(),
            "negatives": negative.sum(dim=1).float().mean(),
            "chance": factor * candidate.sum(dim=1).float().log().mean(),
        }
        if self.labels is not None:
            measures["positives"] = count.float().mean()
        if isinstance(temperature, Tensor):
            measures["temperature"] = temperature.detach()
        return measures

    def update_momentum_encoder(self, momentum: float) -> None:
        """Does nothing: there is none."""

    def enqueue(self, keys: dict[int, Tensor], index: Tensor) -> None:
        """Does nothing: there is no queue."""
