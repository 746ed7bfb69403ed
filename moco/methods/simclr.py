"""Contrast within the batch: SimCLR, SupCon (with labels), and plain InfoNCE between two views. One network, no queue.

    A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020)
    Supervised Contrastive Learning (Khosla et al., NeurIPS 2020)

One training step (see `moco/training/step.py`) encodes all views, gathers the embeddings of all ranks with gradient,
and compares each embedding with all others of the global batch. The step encodes no keys and enqueues nothing.

SimCLR is SupCon in which each sample has a label of its own. So one `nn.Module` implements both SimCLR and SupCon.

Deliberate deviations from the official code:

- More than two views are allowed; NT-Xent with V > 2 is SupCon's loss without labels.
- SupCon's factor T / 0.07 is off unless `base_temperature` is given.

Legend: N local batch, W processes, M = W N global batch, V views, C embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moco.builder import Output, separate_unlabeled, unit_length
from moco.distributed import Order, gather, gather_with_gradient, rank
from moco.losses import (
    LearnedTemperature,
    Margin,
    PositivesMean,
    Temperature,
    add_margin,
    in_batch_info_nce,
    multi_positive_nt_xent,
    split_temperature,
    sup_con,
)


@dataclass(frozen=True)
class LossForm:
    """Changes to the loss; the defaults change nothing."""

    margin: float = 0.0  # with `candidates="other_view"`, see `moco.losses.add_margin`
    margin_kind: Margin = "arc"
    decoupled: bool = False  # see `moco.losses.cross_entropy_over_positives`
    positives_mean: PositivesMean = "outside"  # with `candidates="all"`, see `cross_entropy_over_positives`


class SimCLR(nn.Module):
    """SimCLR, SupCon (with labels), and InfoNCE between two views (`candidates="other_view"`).

    BN should normalize the global batch (`model.bn=sync`): smaller groups contain the same samples in each view, so
    their statistics reveal the positive.

    Args:
        encoder: f, images (N, channels, S, S) to embeddings (N, C).
        temperature: T, or a temperature that is trained.
        labels: the class of each image of the data set, integers (images,), -1 if unlabeled. With labels the method is
            SupCon.
        candidates: "all": compare an anchor with all other embeddings, including those of its own view. "other_view":
            compare it with all embeddings of one other view, and average the loss over the pairs of views.
        contrast_mode: "all": each view is the anchor. "one": only the first view.
        base_temperature: see `moco.losses.sup_con`; with `candidates="all"`.
        form: changes to the loss.
    """

    queue: None = None
    momentum_encoder: None = None
    directions = ((0, -1),)  # (first view, last view), which `Output` holds as query and key
    passes = 1  # all views together
    step = 0
    labels: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        temperature: float | LearnedTemperature = 0.5,
        labels: Tensor | None = None,
        candidates: Literal["all", "other_view"] = "all",
        contrast_mode: Literal["all", "one"] = "all",
        base_temperature: float | None = None,
        form: LossForm | None = None,
    ) -> None:
        super().__init__()
        if candidates not in ("all", "other_view"):
            raise ValueError(f"method.candidates={candidates!r} must be 'all' or 'other_view'")
        form = form or LossForm()
        if candidates == "all" and form.margin != 0:
            raise ValueError(f"method.margin={form.margin} needs method.candidates='other_view'")
        if candidates == "other_view" and (labels is not None or base_temperature is not None):
            raise ValueError("method.candidates='other_view' takes neither labels nor method.base_temperature")
        self.encoder = encoder
        self.temperature, self.learned_temperature = split_temperature(temperature)
        self.candidates, self.contrast_mode, self.base_temperature = candidates, contrast_mode, base_temperature
        self.form = form
        self.register_buffer("labels", None if labels is None else separate_unlabeled(labels), persistent=False)

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return {}: the forward computes all embeddings. Raise ValueError for micro-batches: they lack negatives."""
        if micro_batch is not None and micro_batch != len(views[0]):
            raise ValueError(f"accumulate={len(views[0]) // micro_batch} must be 1: the batch provides the negatives")
        return {}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of the local batch, views (N, channels, S, S) and index (N,), against the global batch."""
        z = unit_length(self.encoder(torch.cat(list(views))))  # (V N, C)
        z = z.unflatten(0, (len(views), len(index)))  # (V, N, C)
        all_z = gather_with_gradient(z.transpose(0, 1)).transpose(0, 1)  # (V, M, C); gathering needs N first
        sample = gather(index)  # (M,)
        classes = sample if self.labels is None else self.labels[sample]  # (M,)
        first = rank() * len(index)
        same = classes[first : first + len(index), None] == classes  # (N, M)
        temperature = self.temperature if self.learned_temperature is None else self.learned_temperature()
        if self.candidates == "all":
            loss, logits = self._all_views(z, all_z, first, temperature, same)
        else:
            loss, logits = self._between_views(z, all_z, first, temperature)
        return Output(loss, self._measures(logits, same, temperature), z[0].detach(), z[-1].detach())

    def _all_views(
        self, z: Tensor, all_z: Tensor, first: int, temperature: Temperature, same: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss with all other embeddings as candidates, and the logits."""
        base, mode, form = self.base_temperature, self.contrast_mode, self.form
        if not form.decoupled and form.positives_mean == "outside":
            return sup_con(z, all_z, first, temperature, mask=same, base_temperature=base, contrast_mode=mode)
        loss, logits = multi_positive_nt_xent(
            z, all_z, first, temperature, same, mode, form.positives_mean, form.decoupled
        )
        return loss if base is None else loss * (temperature / base), logits

    def _between_views(self, z: Tensor, all_z: Tensor, first: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """Return the mean InfoNCE over the pairs (anchor's view, other view), and the logits (pairs N, M)."""
        anchors = range(len(z) if self.contrast_mode == "all" else 1)
        positives = first + torch.arange(z.shape[1], device=z.device)  # (N,), the column of each anchor's positive
        form = self.form
        how: Any = {"margin": form.margin, "margin_kind": form.margin_kind, "decoupled": form.decoupled}
        pairs = [(z[a], all_z[b]) for a in anchors for b in range(len(z)) if a != b]
        found = [in_batch_info_nce(a, b, positives, temperature, **how) for a, b in pairs]
        losses, logits = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.cat(logits)

    @torch.no_grad()
    def _measures(self, logits: Tensor, same: Tensor, temperature: Temperature) -> dict[str, Tensor]:
        """Return means over anchors; an anchor is correct if one of its positives is nearer than all negatives."""
        candidate = logits > -math.inf  # all but the anchor itself
        positive = same.repeat(len(logits) // len(same), logits.shape[1] // same.shape[1]) & candidate
        negative = candidate & ~positive
        count = positive.sum(dim=1)  # 0 for a class of one sample with one view
        similarity = logits.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp(min=1) * temperature
        nearest, hardest = (logits.masked_fill(~each, -math.inf).amax(dim=1) for each in (positive, negative))
        factor = 1.0 if self.base_temperature is None else temperature / self.base_temperature
        # The loss if all similarities are 0. A negative counts as many times as a positive with its margin.
        lowered = add_margin(torch.zeros((), device=logits.device), self.form.margin, self.form.margin_kind)
        weighted = negative.sum(dim=1).float() * (-lowered / temperature).exp()
        in_denominator = weighted if self.form.decoupled else count + weighted
        measures = {
            "contrast_accuracy": (nearest > hardest).float().mean(),
            "positive_similarity": similarity.mean(),
            "negatives": negative.sum(dim=1).float().mean(),
            "chance": factor * in_denominator.clamp(min=1).log().mean(),
        }
        if self.labels is not None:
            measures["positives"] = count.float().mean()
        if isinstance(temperature, Tensor):
            measures["temperature"] = temperature.detach()
        return measures

    def update_momentum_encoder(self, momentum: float) -> None:
        """Do nothing: there is no momentum encoder."""

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Do nothing: there is no queue."""
