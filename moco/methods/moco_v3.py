"""MoCo v3: no queue, a predictor after the query encoder, and the other keys of the batch as negatives.

    An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie, He, ICCV 2021)

One training step is the paper's Algorithm 1 (see `moco/training/step.py`):

    keys = method.encode_keys(views)             k1, k2 = f_k(x1), f_k(x2) of all ranks, no gradient
    output = method(views, keys, index)          q1, q2 = f_q(x1), f_q(x2); ctr(q1, k2) + ctr(q2, k1)
    output.loss.backward(); optimizer.step()     update f_q
    method.update_momentum_encoder(momentum)     f_k = m f_k + (1 - m) f_q

f_q is backbone, projector and predictor; f_k has no predictor. ResNet and ViT differ in the heads, the optimizer and
the augmentation, which are configuration.

Deliberate deviations from the official code:

- The official code updates f_k between encoding queries and keys; here f_k is updated at the end of the
  previous step. The keys are the same (in the first step f_k equals f_q), and a step that fails changes nothing.
- Logits are float32 even under autocast.
- Keys can be shuffled between BN groups (`model.bn=grouped`), as in v1 and v2. The official BN is synchronized
  (`model.bn=sync`, `model.shuffle_keys=false`), as in the recipes here except moco_v3_digits.

Legend: N local micro-batch, n local batch, W processes, M = W n global batch, C embedding.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moco.builder import Output, encode_keys, encode_queries, update_momentum_encoder, with_small_views
from moco.distributed import Order, gather, rank, world_size
from moco.losses import in_batch_info_nce


class MoCoV3(nn.Module):
    """MoCo v3, symmetric.

    Args:
        encoder: backbone and projector, images (N, channels, S, S) to (N, C). f_k starts as its copy.
        predictor: (N, C) to (N, C), for queries only; `nn.Identity` for none.
        temperature: T.
        decoupled: leave the positive out of the denominator, see `moco.losses.in_batch_info_nce`.
    """

    queue: None = None
    directions = ((0, 1), (1, 0))
    passes = 2
    step = 0

    def __init__(
        self, encoder: nn.Module, predictor: nn.Module, temperature: float = 1.0, decoupled: bool = False
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"method.temperature={temperature} must be above 0")
        self.encoder, self.predictor = encoder, predictor
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.temperature, self.decoupled = temperature, decoupled

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return the keys of the global batch, {view: (M, C)}: each micro-batch is compared with all of them.

        `views` are images (n, channels, S, S); `shuffles` has one permutation per view. See `moco.builder.encode_keys`.
        """
        shuffled = [None] * len(views) if shuffles is None else shuffles
        pairs = list(zip(views, shuffled, strict=True))[:2]
        local = [encode_keys(self.momentum_encoder, *pair, micro_batch) for pair in pairs]
        return {view: gather(k) for view, k in enumerate(local)}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of one micro-batch against the keys of the global batch: ctr(q1, k2) + ctr(q2, k1).

        The arguments are those of `MoCo.forward`, but keys are {view: (M, C)}.
        """
        local = len(keys[0]) // world_size()  # n
        labels = rank() * local + start + torch.arange(len(index), device=index.device)  # (N,), row of the key
        losses, positives, correct, pairs = [], [], [], []
        queries = encode_queries(nn.Sequential(self.encoder, self.predictor), views, self.directions)
        for query_view, key_view in with_small_views(self.directions, len(views)):
            q, k = queries[query_view], keys[key_view]  # (N, C), (M, C)
            loss, logits = in_batch_info_nce(q, k, labels, self.temperature, decoupled=self.decoupled)  # (), (N, M)
            losses.append(2 * self.temperature * loss)  # ctr of Algorithm 1
            pairs.append((q.detach(), k[labels]))
            positive = logits.gather(1, labels[:, None])  # (N, 1)
            positives.append(positive.mean() * self.temperature)
            correct.append(((logits >= positive).sum(dim=1) == 1).float().mean())  # a tie is a failure
        total = torch.full((), float(len(keys[0])), device=index.device)
        measures = {
            "contrast_accuracy": torch.stack(correct).mean(),
            "positive_similarity": torch.stack(positives).mean(),
            "negatives": total - 1,
            "chance": 2 * (2 * self.temperature) * (total - int(self.decoupled)).log(),  # all keys equally similar
        }
        # Without small views, the result is the sum of both losses.
        return Output(2 * torch.stack(losses).mean(), measures, *pairs[0])

    def update_momentum_encoder(self, momentum: float) -> None:
        """Set f_k = m f_k + (1 - m) f_q, without the predictor."""
        update_momentum_encoder(self.momentum_encoder, self.encoder, momentum)

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Do nothing: there is no queue."""
