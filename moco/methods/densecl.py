"""DenseCL: MoCo v2, and a second contrast between the cells of the feature maps of both views.

    Dense Contrastive Learning for Self-Supervised Visual Pre-Training (Wang et al., CVPR 2021)

One training step (see `moco/training/step.py`):

    keys = method.encode_keys(views)             k and the cells t of f_k(x_k), no gradient
    output = method(views, keys, index)          q and the cells r of f_q(x_q); L_q = InfoNCE(q, k, queue);
                                                 L_r = InfoNCE(r, t of the cell that matches r, dense queue), Eq. 2
                                                 (1 - lambda) L_q + lambda L_r, Eq. 3
    output.loss.backward(); optimizer.step()     update f_q
    method.update_momentum_encoder(momentum)     f_k = m f_k + (1 - m) f_q
    method.enqueue(output.new_keys, index)       enqueue k, and the mean of the cells t of each image

A query's cell is matched with the key's cell whose backbone features are most similar (section 3.4), or with the one
that shows the same place of the image. In the second case some cells have no match; L_r is the mean over all matched
cells of the global batch, for any number of processes and micro-batches.

Deliberate deviations from the official code:

- The official code updates f_k before encoding the keys; here f_k is updated at the end of the step.
- If the feature map is pooled (`grid`), the official code pools only the input of the dense head. Here the features by
  which cells are matched are pooled too, so that features and embeddings have the same cells.

Legend: N micro-batch, n local batch, W processes, C embedding, K queue length, D features, P = G x G cells.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, Output, queue_contrast, unit_length, update_momentum_encoder
from moco.data.places import matching_cells
from moco.distributed import Order, gather, mean_over_ranks, permute, world_size
from moco.losses.similarity import full_precision
from moco.models.dense import DenseEncoder, DenseOutput


class DenseKeys(NamedTuple):
    """The keys of the local batch. All vectors have unit length."""

    embedding: Tensor  # (n, C), k
    cells: Tensor  # (n, P, C), t
    mean_cell: Tensor  # (n, C), the mean of the cells of an image
    features: Tensor | None  # (n, P, D), of the backbone; only if cells are matched by similarity
    match: Tensor | None  # (n, P), the match of each cell of the query, or -1; only if cells are matched by the crops
    matched: Tensor  # (), number of matched cells in the global batch, at least 1


class DenseCL(nn.Module):
    """DenseCL.

    Args:
        encoder: f_q, images (N, channels, S, S) to embeddings of images and cells. f_k starts as its copy.
        queue, dense_queue: the keys of images, and the means of their cells.
        temperature: T.
        dense_weight: lambda.
        dense_warmup_steps: number of steps at the start with lambda = 0.
        by_crops: match cells by the crops, not by the similarity of their features.
    """

    encoder: nn.Module
    directions = ((0, 1),)  # (view of the query, view of the key)
    passes = 1
    step = 0

    def __init__(
        self,
        encoder: DenseEncoder,
        queue: KeyQueue,
        dense_queue: KeyQueue,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
        dense_warmup_steps: int = 0,
        by_crops: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue, self.dense_queue = queue, dense_queue
        self.temperature, self.by_crops = temperature, by_crops
        self.dense_weight, self.dense_warmup_steps = dense_weight, dense_warmup_steps

    @torch.no_grad()
    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
        places: Tensor | None = None,
    ) -> dict[int, DenseKeys]:
        """Return the keys of the local batch, {1: keys}: the second view is the key.

        The arguments are those of `MoCo.encode_keys`; `places`, (2, n, 3, 3), are maps from `moco.data.places`, needed
        if cells are matched by the crops.
        """
        shuffle = None if shuffles is None else shuffles[1]
        x = views[1] if shuffle is None else permute(views[1], shuffle)
        parts = [self.momentum_encoder(part, dense=True) for part in x.split(micro_batch or len(x))]
        found = [torch.cat(each) for each in zip(*parts, strict=True)][: 2 if self.by_crops else 3]
        if shuffle is not None:
            found = [permute(each, shuffle.argsort()) for each in found]
        embedding, cells, *features = found
        mean_cell = unit_length(full_precision(cells).mean(dim=1))  # of unnormalized cells, as in the official code
        match, matched = None, torch.full((), float(world_size() * cells.shape[:2].numel()), device=cells.device)
        if self.by_crops:
            assert places is not None
            match = matching_cells(places[0], places[1], math.isqrt(cells.shape[1]))  # (n, P)
            matched = (mean_over_ranks((match >= 0).sum().double()) * world_size()).clamp(min=1).float()
            match, matched = match.to(cells.device), matched.to(cells.device)  # the places may be on the CPU
        by_features = None if self.by_crops else unit_cells(features[0])
        return {1: DenseKeys(unit_length(embedding), unit_cells(cells), mean_cell, by_features, match, matched)}

    def forward(self, views: Sequence[Tensor], keys: dict[int, DenseKeys], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of one micro-batch against the queues before this step.

        The arguments are those of `MoCo.forward`, but the keys are `DenseKeys`.
        """
        rows, of_keys = slice(start, start + len(index)), keys[1]
        found: DenseOutput = self.encoder(views[0], dense=True)
        q, r = unit_length(found.embedding), unit_cells(found.cells)  # (N, C), (N, P, C)
        k, t = of_keys.embedding[rows], of_keys.cells[rows]  # (N, C), (N, P, C)
        if of_keys.match is None:
            assert of_keys.features is not None
            match = most_similar(found.features, of_keys.features[rows])  # (N, P)
        else:
            match = of_keys.match[rows]
        positives = t.gather(1, match.clamp(min=0)[:, :, None].expand_as(t))  # (N, P, C)
        samples = index.repeat_interleave(r.shape[1])  # (N P,)
        contrast = queue_contrast(q, k, self.queue, self.temperature, index)
        dense = queue_contrast(
            r.flatten(0, 1), positives.flatten(0, 1), self.dense_queue, self.temperature, samples
        )  # of N P queries

        # The training step averages the losses of all W n / N micro-batches, so all weights together sum to W n / N.
        parts = world_size() * len(of_keys.cells) / len(index)
        weights = (match >= 0).flatten() * (parts / of_keys.matched)  # (N P,)
        dense_loss = (dense.losses * weights).sum()
        share = self.dense_weight if self.step >= self.dense_warmup_steps else 0.0
        measures = contrast.measures(self.temperature)
        measures |= {
            "chance": (1 - share) * measures["chance"] + share * (dense.negatives.log1p() * weights).sum(),
            "global_loss": contrast.loss.detach(),
            "dense_loss": dense_loss.detach(),
            "dense_accuracy": ((dense.positive > dense.hardest) * weights).sum(),
            "dense_similarity": (dense.positive * weights).sum() * self.temperature,
            "matched_cells": (match >= 0).float().mean(),
        }
        new_keys = torch.stack([k, of_keys.mean_cell[rows]], dim=1)  # (N, 2, C)
        loss = (1 - share) * contrast.loss + share * dense_loss
        return Output(loss, measures, q.detach(), k, new_keys=new_keys)

    def update_momentum_encoder(self, momentum: float) -> None:
        """Set f_k = m f_k + (1 - m) f_q."""
        update_momentum_encoder(self.momentum_encoder, self.encoder, momentum)

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Enqueue the new keys of all ranks.

        `keys` are the new keys of this rank, (n, 2, C): for each image its key and the mean of its cells. `index` holds
        the image indices, (n,).
        """
        index = gather(index)  # (W n,)
        for queue, k in zip((self.queue, self.dense_queue), gather(keys).unbind(1), strict=True):
            queue.enqueue(k, index)


def unit_cells(x: Tensor) -> Tensor:
    """Normalize the vectors of cells, (N, P, C), as `unit_length` does."""
    return unit_length(x.flatten(0, 1)).view(x.shape)


@torch.no_grad()
def most_similar(features: Tensor, others: Tensor) -> Tensor:
    """Return for each cell of the query the index of the key's cell with the most similar features, (N, P).

    `features` are the query's, (N, P, D), and `others` the key's, of unit length.
    """
    with torch.autocast(features.device.type, enabled=False):
        return torch.bmm(unit_cells(features.detach()), others.transpose(1, 2)).argmax(dim=2)
