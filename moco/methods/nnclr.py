"""NNCLR: the positive of a view is the nearest neighbor of the other view in a queue; the negatives are in the batch.

    With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations
    (Dwibedi et al., ICCV 2021)

One training step is the paper's Algorithm 1 (see `moco/training/step.py`):

    output = method(views, keys, index)          z1, z2 = f(x1), f(x2); p1, p2 = g(z1), g(z2)
                                                 L(NN(z1, Q), p2) / 2 + L(NN(z2, Q), p1) / 2
    output.loss.backward(); optimizer.step()     update f and g
    method.enqueue(output.new_keys, index)       enqueue z1, dequeue the oldest

L(nn, p) is the cross entropy of each neighbor with the predictions of all images of the batch; only p has a gradient.

The loss always compares a neighbor with the predictions of the whole batch. With micro-batches, `encode_keys` computes
these predictions first, without gradient, which costs one more forward pass. Each micro-batch then computes its own
predictions again, now with gradient, and uses them in place of those without gradient. The gradients of all
micro-batches and processes add up to the gradient of the batch.

Deliberate deviation: the projector's last BN has no weight and bias, and the predictor's last layer has no bias, as
in MoCo v3.

Legend: N local micro-batch, n local batch, W processes, M = W n global batch, C embedding, K queue length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, Output, unit_length
from moco.distributed import Order, gather, rank, world_size
from moco.losses import in_batch_info_nce
from moco.losses.similarity import similarity
from moco.models.norm import untracked


class NNCLR(nn.Module):
    """NNCLR.

    Args:
        encoder: f, backbone and projector, images (N, channels, S, S) to projections (N, C).
        predictor: g, (N, C) to (N, C).
        queue: Q, the support set: projections of earlier batches.
        temperature: T.
    """

    momentum_encoder: None = None
    directions = ((0, 1), (1, 0))  # (view of p, view whose neighbor is the positive)
    passes = 2  # number of views that the encoder encodes one after the other
    step = 0

    def __init__(self, encoder: nn.Module, predictor: nn.Module, queue: KeyQueue, temperature: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.predictor, self.queue = encoder, predictor, queue
        self.temperature = temperature

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return {view: (M, 2, C)}, neighbors and predictions of the global batch; {} without micro-batches.

        Without micro-batches the forward computes them. `shuffles` are ignored: no key is encoded.
        """
        if micro_batch is None or micro_batch == len(views[0]):
            return {}
        with torch.no_grad(), untracked(self):
            parts = [[torch.stack(self._embed(x)[1:], dim=1) for x in view.split(micro_batch)] for view in views]
        return {view: gather(torch.cat(part)) for view, part in enumerate(parts)}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of the global batch, in which only this micro-batch's predictions have a gradient.

        The arguments are those of `MoCo.forward`, but `keys` is the result of `encode_keys` of this class.
        """
        z, neighbors, p = zip(*(self._embed(view) for view in views), strict=True)  # each V times (N, C)
        batch = keys or {
            view: gather(torch.stack([neighbors[view], p[view].detach()], dim=1)) for view in range(len(views))
        }  # {view: (M, 2, C)}
        total = len(batch[0])  # M
        own = rank() * (total // world_size()) + start + torch.arange(len(index), device=index.device)  # (N,), rows
        losses, positives, correct = [], [], []
        for view, other in self.directions:
            predictions = batch[view][:, 1].index_copy(0, own, p[view])  # (M, C); only the rows `own` have a gradient
            loss, logits = self._contrast(batch[other][:, 0], predictions)  # (), (M, M)
            losses.append(loss)
            positive = logits.diagonal()[:, None]  # (M, 1)
            positives.append(positive.mean() * self.temperature)
            correct.append(((logits >= positive).sum(dim=1) == 1).float().mean())  # a tie is a failure
        loss = torch.stack(losses).mean()
        # The step averages over M / N micro-batches of all processes, but their gradients must be added.
        loss = loss.detach() + (loss - loss.detach()) * (total / len(index))
        count = torch.full((), float(total), device=index.device)
        measures = {
            "contrast_accuracy": torch.stack(correct).mean(),
            "positive_similarity": torch.stack(positives).mean(),
            "neighbor_similarity": (torch.cat(z) * torch.cat(neighbors)).sum(dim=1).mean(),
            "negatives": count - 1,
            "chance": count.log(),  # all predictions equally similar
        }
        return Output(loss, measures, p[0].detach(), z[1], new_keys=z[0][:, None])

    def update_momentum_encoder(self, momentum: float) -> None:
        """Do nothing: there is no momentum encoder."""

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Enqueue the z1 of all ranks, given those of this rank, (n, 1, C), and their image indices, (n,)."""
        self.queue.enqueue(gather(keys[:, 0]), gather(index))

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z, NN(z, Q) and p, each (N, C) and of unit length; only p has a gradient."""
        projection = self.encoder(images)
        z = unit_length(projection.detach())
        nearest = similarity(z, self.queue.keys).argmax(dim=1)  # (N, K) -> (N,)
        return z, self.queue.keys[nearest].to(z.dtype), unit_length(self.predictor(projection))

    def _contrast(self, neighbors: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(nn, p) of the global batch, shape (), and the logits (M, M)."""
        positives = torch.arange(len(neighbors), device=neighbors.device)
        return in_batch_info_nce(neighbors, predictions, positives, self.temperature)
