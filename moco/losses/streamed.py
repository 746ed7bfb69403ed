"""InfoNCE against a long queue in one pass over it: nothing of size N x K is made, and nothing is computed twice.

The queue's keys carry no gradient, so of the softmax p_j over them the slope needs the mean key alone. With u = q / T,
L the log of the sum of the negatives' exponentials, and P = sigmoid(L - u k) the share that all negatives have of the
softmax over them and the key k:

    loss = log(1 + exp(L - u k))        d loss / du = P (sum over j of p_j Q_j - k)

That is attention with keys = values = queue. As in FlashAttention (Dao et al., 2022) the sums run over the queue in
pieces and are kept relative to the largest logit so far (the online softmax of Milakov & Gimelshein, 2018). Backward
scales what forward has saved, (N, C). By the chain rule the slope by a learned T is -u / T times that by u.

The entropy of the p_j costs nothing either: it is L less their mean logit, and that is u times the mean key.

Legend: N queries, C dimension, K queue length, R queries and B entries of the queue at once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.losses.similarity import (
    ABSENT,
    Temperature,
    check_mask,
    check_temperature,
    full_precision,
    paired_similarity,
)

# R and B by device. On a CPU their logits are 1 MiB of float32, which stays in the cache from one operation to the
# next; time is flat around here (within 10 % for B from 256 to 1,024). A GPU wants few and large operations: 128 MiB.
ROWS = {"cpu": 512, "cuda": 4096}
CHUNK = {"cpu": 512, "cuda": 8192}


class Streamed(NamedTuple):
    """The loss to differentiate, and what the pass saw of each query's logits, detached."""

    loss: Tensor  # (), the mean over the queries
    positive: Tensor  # (N,), the key's logit
    hardest: Tensor  # (N,), the largest logit of a negative; -inf without any
    log_sum: Tensor  # (N,), log of the sum of the negatives' exponentials; -inf without any
    negatives: Tensor  # (N,), how many there are
    effective_negatives: Tensor  # (N,), exp of the entropy of the negatives' shares, 1 ... K; 0 without any

    def measures(self, temperature: Temperature) -> dict[str, Tensor]:
        """Means over the queries, of shape (): what is logged of the logits, which do not exist here.

        "negatives", how many; "chance", the loss if all candidates were alike; and those of `logit_measures`.
        """
        count = self.negatives.to(self.positive.dtype)
        return {
            "negatives": count.mean(),
            "chance": count.log1p().mean(),
            **_means(self.positive, self.hardest, self.log_sum, self.effective_negatives, temperature),
        }


@torch.no_grad()
def logit_measures(logits: Tensor, temperature: Temperature) -> dict[str, Tensor]:
    """What is logged of `info_nce`'s logits, (N, 1 + K): means over the queries, of shape ().

    "contrast_accuracy", the share of queries whose key is above every negative, a tie being no success;
    "positive_similarity", the cosine of query and key; "effective_negatives", exp of the entropy of the negatives'
    shares: over how many the loss spreads its push; "push", the share of the softmax that all negatives together
    have, 0 (solved) ... 1: how much gradient is left.
    """
    positive, negative = logits[:, 0], logits[:, 1:]
    log_sum = negative.logsumexp(dim=1)  # (N,)
    entropy = torch.special.entr(negative.softmax(dim=1)).sum(dim=1)  # (N,), nan without any negative
    effective = entropy.exp().masked_fill(log_sum == ABSENT, 0.0)
    return _means(positive, negative.amax(dim=1), log_sum, effective, temperature)


def _means(
    positive: Tensor, hardest: Tensor, log_sum: Tensor, effective_negatives: Tensor, temperature: Temperature
) -> dict[str, Tensor]:
    """See `logit_measures`; all (N,)."""
    return {
        "contrast_accuracy": (positive > hardest).to(positive.dtype).mean(),
        "positive_similarity": positive.mean() * torch.as_tensor(temperature).detach(),
        "effective_negatives": effective_negatives.mean(),
        "push": (log_sum - positive).sigmoid().mean(),
    }


def info_nce_streamed(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    negatives: Tensor | None = None,
    *,
    index: Tensor | None = None,
    queue_index: Tensor | None = None,
    chunk: int | None = None,
) -> Streamed:
    """`info_nce` with the same loss and gradient up to rounding, in memory of the order of N C instead of N K.

    Computed in float32 (or float64) whatever autocast says. Key and queue are detached: no gradient reaches them.

    Args:
        query: L2-normalized, shape (N, C).
        key: L2-normalized, shape (N, C). Row n is the positive of query n.
        queue: L2-normalized, shape (K, C).
        temperature: T > 0; a tensor of shape () if learned.
        negatives: optional boolean (N, K) or (1, K), as in `info_nce`.
        index: which sample each query shows, integers of shape (N,). An entry of the queue that shows the same one is
            no negative of it: the mask of `KeyQueue.negatives`, which never exists as a whole here.
        queue_index: which sample each entry of the queue shows, integers of shape (K,); with `index`.
        chunk: B, how many entries of the queue to look at together; it changes nothing but speed and rounding. None:
            what suits the device.

    Returns:
        The mean loss over the queries and what was seen of the logits, see `Streamed`.

    Raises:
        ValueError: if the temperature is not positive, the shapes do not fit, only one of the indices is given,
            or the chunk is below 1.
        RuntimeError: in a backward with create_graph=True: there is no second derivative.
    """
    check_temperature(temperature)
    if query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and queue {tuple(queue.shape)} "
            "must have shapes (N, C), (N, C) and (K, C)"
        )
    size = _for_device(CHUNK, query) if chunk is None else chunk
    if size < 1:
        raise ValueError(f"chunk={chunk} must be at least 1, the entries of the queue to look at together")
    check_mask("negatives", negatives, (len(query), len(queue)))
    own = None if index is None and queue_index is None else _OwnKeys.find(index, queue_index, query, queue, size)
    query = full_precision(query)
    with torch.autocast(query.device.type, enabled=False), torch.no_grad():
        scaled = query / temperature  # (N, C), u
        key = key.to(query.dtype)
        parts = []
        height = _for_device(ROWS, query)
        for start in range(0, max(1, len(query)), height):
            rows = slice(start, start + height)
            allowed = negatives if negatives is None or len(negatives) == 1 else negatives[rows]
            parts.append(_pass(scaled[rows], queue, allowed, own and own.of(rows), size))
        hardest, log_sum, mean_key, count = (torch.cat(part) for part in zip(*parts, strict=True))
        positive = paired_similarity(scaled, key)[:, 0]  # (N,)
        mean_logit = paired_similarity(scaled, mean_key)[:, 0]  # (N,), of the negatives, each with its share
    losses: Tensor = _Loss.apply(query, temperature, mean_key - key, mean_logit - positive, log_sum - positive)
    return Streamed(losses.mean(), positive, hardest, log_sum, count, (log_sum - mean_logit).exp())


def _for_device(sizes: dict[str, int], x: Tensor) -> int:
    return sizes["cpu" if x.device.type == "cpu" else "cuda"]


class _Loss(torch.autograd.Function):
    """Each query's loss, (N,), of the pass's results; differentiable by query and temperature, once."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, temperature: Temperature, apart: Tensor, gap: Tensor, excess: Tensor
    ) -> Tensor:
        """With apart = mean key - k, (N, C), gap = u apart, (N,), and excess = L - u k, (N,)."""
        by_query = excess.sigmoid() / temperature  # (N,), times apart
        ctx.save_for_backward(apart, by_query, -by_query * gap)
        return torch.logaddexp(excess, torch.zeros_like(excess))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # the graph of this would miss how the slope depends on u: a silent zero
            raise RuntimeError("create_graph=True: info_nce_streamed can be differentiated once; use info_nce instead")
        apart, by_query, by_temperature = ctx.saved_tensors
        learned = (grads[0] * by_temperature).sum() if ctx.needs_input_grad[1] else None  # T may be a float
        return (grads[0] * by_query)[:, None] * apart, learned, None, None, None


class _OwnKeys(NamedTuple):
    """Which entries of the queue show a query's own sample."""

    sample: Tensor  # (N,), or (R,), the queries'
    queue_sample: Tensor  # (K,)
    places: tuple[Tensor, ...] | None  # for each chunk, where in it there is any query's own; most often nowhere

    @classmethod
    def find(
        cls, index: Tensor | None, queue_index: Tensor | None, query: Tensor, queue: Tensor, chunk: int
    ) -> "_OwnKeys":
        """Looks for them; raises a ValueError for indices that do not fit."""
        if index is None or queue_index is None:
            missing = "index" if index is None else "queue_index"
            raise ValueError(f"{missing}=None; index and queue_index are compared, so give both or neither")
        if index.shape != query.shape[:1] or queue_index.shape != queue.shape[:1]:
            raise ValueError(
                f"index {tuple(index.shape)} and queue_index {tuple(queue_index.shape)} "
                f"must have shapes {tuple(query.shape[:1])} and {tuple(queue.shape[:1])}"
            )
        if query.device.type != "cpu":  # the host would have to wait for the device, to which comparing all is little
            return cls(index, queue_index, None)
        found = torch.isin(queue_index, index).nonzero()[:, 0]
        each = torch.bincount(found // chunk, minlength=-(-len(queue) // chunk))
        return cls(index, queue_index, (found % chunk).split(each.tolist()))

    def at(self, number: int, keys: Tensor) -> Tensor:
        """Where to look in a chunk with these keys."""
        return torch.arange(len(keys), device=keys.device) if self.places is None else self.places[number]

    def of(self, rows: slice) -> "_OwnKeys":
        """The same for some of the queries."""
        return self._replace(sample=self.sample[rows])


def _pass(
    scaled: Tensor, queue: Tensor, allowed: Tensor | None, own: _OwnKeys | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the queue for u, (R, C), and the mask (R, K) or (1, K).

    Returns:
        The largest logit, (R,), the log of the sum of exponentials, (R,), the mean key under their softmax, (R, C), and
        how many negatives there are, (R,).
    """
    lowest = torch.finfo(scaled.dtype).min  # not -inf, which less itself is nan
    top = scaled.new_full((len(scaled), 1), lowest)  # (R, 1), the largest logit so far
    total = torch.zeros_like(top)  # (R, 1), sum of exp(logit - top)
    pulled = torch.zeros_like(scaled)  # (R, C), sum of exp(logit - top) key
    count = torch.full((len(scaled),), len(queue) if allowed is None else 0, device=scaled.device)  # (R,)
    room = scaled.new_empty(len(scaled) * min(chunk, len(queue)))  # taken once, not for each chunk
    for number, start in enumerate(range(0, len(queue), chunk)):
        columns = slice(start, start + chunk)
        keys = queue[columns].to(scaled.dtype)  # (B, C)
        weights = torch.mm(scaled, keys.T, out=room[: len(scaled) * len(keys)].view(len(scaled), -1))  # (R, B), logits
        if allowed is not None:
            part = allowed[:, columns]  # (R, B) or (1, B)
            weights.add_(torch.where(part, 0.0, ABSENT))  # several times faster than filling where the mask says so
            count += part.sum(dim=1)
        at = own and own.at(number, keys)  # (B',)
        if own is not None and at is not None and len(at):
            same = own.sample[:, None] == own.queue_sample[start + at]  # (R, B')
            weights[:, at] = weights[:, at].masked_fill(same, ABSENT)
            count -= (same if allowed is None else same & part[:, at]).sum(dim=1)
        higher = torch.maximum(top, weights.amax(dim=1, keepdim=True))
        shrink = (top - higher).exp_()  # (R, 1)
        weights.sub_(higher).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        pulled.mul_(shrink).addmm_(weights, keys)
        top = higher
    # Where there is any negative the total is 1 or more: the largest adds exp(0).
    hardest = top.masked_fill(top == lowest, ABSENT)[:, 0]
    return hardest, (top + total.log())[:, 0], pulled / total.clamp(min=1), count
