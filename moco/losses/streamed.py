"""InfoNCE with a long queue in one pass over it: no tensor of size N x K is kept, and nothing is computed twice.

The queue's keys Q_j have no gradient. So the gradient only needs the mean of the negatives Q_j under their softmax p_j.
Let u = q / T. Let L be the log of the sum of the negatives' exponentials, and P = sigmoid(L - u k) the share of all
negatives in the softmax over the key k and all negatives:

    loss = log(1 + exp(L - u k))        d loss / du = P (sum over j of p_j Q_j - k)

The decoupled contrast, L - u k, has the same gradient without the factor P.

This is attention with keys = values = queue. As in FlashAttention (Dao et al., 2022) the sums run over parts of the
queue and are relative to the largest logit so far (the online softmax of Milakov & Gimelshein, 2018). The
gradient is a vector (N, C) times a factor (N,). Forward saves both, and backward multiplies them by the incoming
gradient of the losses. By the chain rule the derivative with respect to a learned T is -u / T times the derivative with
respect to u.

The entropy of the p_j is L minus the mean logit under the p_j. This mean logit is u times the mean key.

On a GPU two kernels compute the sums over the queue, the loss and the measures: `moco.kernels.info_nce`.

Legend: N queries, C dimension, K queue length, R queries and B entries of the queue per block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.kernels import fused
from moco.losses.queue import check_inputs
from moco.losses.similarity import ABSENT, Temperature, check_mask, check_shapes, full_precision, paired_similarity

# R and the logits of a block, R x B, by device. A block is 1 MiB of float32 on a CPU, which fits in the cache (256 <= B
# <= 1,024 changes the time by less than 10 %), and 128 MiB on a GPU, which needs few and large operations.
ROWS = {"cpu": 512, "cuda": 4096}
BLOCK = {"cpu": 2**18, "cuda": 2**25}


MEASURES = ("negatives", "chance", "contrast_accuracy", "positive_similarity", "effective_negatives", "push")


class Streamed(NamedTuple):
    """Each query's loss, to differentiate, and detached statistics of its logits."""

    losses: Tensor  # (N,)
    positive: Tensor  # (N,), the key's logit
    hardest: Tensor  # (N,), the largest logit of a negative; -inf without any
    log_sum: Tensor  # (N,), log of the sum of the negatives' exponentials; -inf without any
    negatives: Tensor  # (N,), the number of negatives
    effective_negatives: Tensor  # (N,), exp of the entropy of the negatives' shares, 1 ... K; 0 without any
    each: Tensor | None = None  # (6, N), each query's values of MEASURES, in this order; None without a kernel

    @property
    def loss(self) -> Tensor:
        """Return the mean loss over the queries, shape ()."""
        return self.losses.mean()

    def measures(self, temperature: Temperature, decoupled: bool = False) -> dict[str, Tensor]:
        """Return means over the queries, of shape (): "negatives", "chance", and those of `logit_measures`.

        "chance" is the loss if all logits are equal.

        The arguments are those of `info_nce_streamed`.
        """
        if self.each is not None:
            return dict(zip(MEASURES, self.each.mean(dim=1).unbind(), strict=True))
        count = self.negatives.to(self.positive.dtype)
        return {
            "negatives": count.mean(),
            "chance": (count.clamp(min=1).log() if decoupled else count.log1p()).mean(),
            **_means(self.positive, self.hardest, self.log_sum, self.effective_negatives, temperature),
        }


@torch.no_grad()
def logit_measures(logits: Tensor, temperature: Temperature) -> dict[str, Tensor]:
    """Return measures of `info_nce`'s logits, (N, 1 + K): means over the queries, of shape ().

    "contrast_accuracy": the share of queries with their key above every negative (a tie is a failure);
    "positive_similarity": the cosine of query and key; "effective_negatives": exp of the entropy of the negatives'
    softmax; "push": the share of all negatives in the softmax, 0 (solved) ... 1, to which the gradient is proportional.
    """
    positive, negative = logits[:, 0], logits[:, 1:]
    log_sum = negative.logsumexp(dim=1)  # (N,)
    entropy = torch.special.entr(negative.softmax(dim=1)).sum(dim=1)  # (N,), nan without any negative
    effective = entropy.exp().masked_fill(log_sum == ABSENT, 0.0)
    return _means(positive, negative.amax(dim=1), log_sum, effective, temperature)


def _means(
    positive: Tensor, hardest: Tensor, log_sum: Tensor, effective_negatives: Tensor, temperature: Temperature
) -> dict[str, Tensor]:
    """Return the measures that `logit_measures` describes, from each query's statistics, all (N,)."""
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
    samples: tuple[Tensor, Tensor] | None = None,
    decoupled: bool = False,
    chunk: int | None = None,
) -> Streamed:
    """Compute `info_nce`, with the same loss and gradient up to rounding, in memory of order N C instead of N K.

    The computation is in float32 (or float64) even under autocast. Key and queue get no gradient.

    Args:
        query, key, queue, temperature, negatives: as in `info_nce`.
        samples: integers that identify the image of each query, (N,), and of each entry of the queue, (K,). The
            negatives of a query exclude the entries of its own image, as in `KeyQueue.negatives`, but without a mask of
            size N x K.
        decoupled: compute `decoupled_info_nce` instead.
        chunk: B; affects only speed and rounding. None: a default for the device, or a kernel, see `has_kernel`.

    Raises:
        ValueError: for an invalid temperature, shape or chunk.
        RuntimeError: in a backward with create_graph=True: there is no second derivative.
    """
    check_inputs(query, key, queue, temperature)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    check_mask("negatives", negatives, (len(query), len(queue)))
    if samples is not None:
        shapes = {"samples[0]": (samples[0], "N"), "samples[1]": (samples[1], "K")}
        check_shapes(query=(query, "NC"), queue=(queue, "KC"), **shapes)
    if chunk is None and has_kernel(query, key, queue):
        return _by_kernel(query, key, queue, temperature, negatives, samples, decoupled)
    return _in_chunks(query, key, queue, temperature, negatives, samples, decoupled, chunk)


def has_kernel(query: Tensor, key: Tensor, queue: Tensor) -> bool:
    """Return whether a kernel computes InfoNCE of these tensors: on a GPU, not in float64, and C is small enough."""
    if not fused(query.device):
        return False
    from moco.kernels.info_nce import LARGEST_DIM

    return query.shape[1] <= LARGEST_DIM and torch.float64 not in (query.dtype, key.dtype, queue.dtype)


def _by_kernel(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    negatives: Tensor | None,
    samples: tuple[Tensor, Tensor] | None,
    decoupled: bool,
) -> Streamed:
    """Compute `info_nce_streamed` by a kernel."""
    from moco.kernels.info_nce import info_nce

    found = info_nce(query, key, queue, temperature, negatives, samples, decoupled)
    factors = found.by_query, found.by_temperature
    losses = _Loss.apply(full_precision(query), temperature, found.losses, found.apart, *factors)
    return Streamed(losses, *found[1:7])


def _in_chunks(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    negatives: Tensor | None,
    samples: tuple[Tensor, Tensor] | None,
    decoupled: bool,
    chunk: int | None,
) -> Streamed:
    """Compute `info_nce_streamed` by torch's operations."""
    device = "cpu" if query.device.type == "cpu" else "cuda"
    size = _chunk(len(query), device) if chunk is None else chunk
    own = None if samples is None else _OwnKeys.find(*samples, size)
    query = full_precision(query)
    with torch.autocast(query.device.type, enabled=False), torch.no_grad():
        scaled = query / temperature  # (N, C), u
        key = key.to(query.dtype)
        parts = []
        for start in range(0, max(1, len(query)), ROWS[device]):
            rows = slice(start, start + ROWS[device])
            allowed = negatives if negatives is None or len(negatives) == 1 else negatives[rows]
            own_rows = own and own._replace(sample=own.sample[rows])
            parts.append(_pass(scaled[rows], queue, allowed, own_rows, size))
        hardest, log_sum, mean_key, count = (torch.cat(part) for part in zip(*parts, strict=True))
        positive = paired_similarity(scaled, key)[:, 0]  # (N,)
        mean_logit = paired_similarity(scaled, mean_key)[:, 0]  # (N,), of the negatives, by their shares
        apart, gap, excess = mean_key - key, mean_logit - positive, log_sum - positive
        if decoupled:
            has_negative = excess != ABSENT
            losses, factor = torch.where(has_negative, excess, 0.0), has_negative.to(excess.dtype)
        else:
            losses, factor = torch.logaddexp(excess, torch.zeros_like(excess)), excess.sigmoid()
        losses = losses + (positive - positive)  # 0; nan for an infinite logit, which logaddexp would hide
        by_query = factor / temperature  # (N,); the gradient of the query is this times apart
        effective = (log_sum - mean_logit).exp()
    losses = _Loss.apply(query, temperature, losses, apart, by_query, -by_query * gap)
    return Streamed(losses, positive, hardest, log_sum, count, effective)


def _chunk(queries: int, device: str) -> int:
    """Return B. On a GPU it is larger for fewer queries: with 512 queries or fewer, 65,536 keys are one chunk."""
    rows = ROWS[device] if device == "cpu" else min(queries, ROWS[device])
    return BLOCK[device] // rows


class _Loss(torch.autograd.Function):
    """Each query's loss, (N,), which can be differentiated once. The gradients are computed before `forward`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, temperature: Temperature, losses: Tensor, apart: Tensor, *factors: Tensor
    ) -> Tensor:
        """Return `losses`.

        `apart`, (N, C), is the mean key minus k. `factors` are two tensors, (N,) each. The first one times `apart` is
        the gradient of the query. The second one is the gradient of the temperature.
        """
        ctx.save_for_backward(apart, *factors)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():  # the graph would miss the dependence on u and return 0
            raise RuntimeError("create_graph=True: info_nce_streamed can be differentiated once; use info_nce instead")
        apart, by_query, by_temperature = ctx.saved_tensors
        learned = (grads[0] * by_temperature).sum() if ctx.needs_input_grad[1] else None  # T may be a float
        return (grads[0] * by_query)[:, None] * apart, learned, None, None, None, None


class _OwnKeys(NamedTuple):
    """The entries of the queue that show a query's own image."""

    sample: Tensor  # the image of each query, (N,), or (R,) for a block
    queue_sample: Tensor  # the image of each entry of the queue, (K,)
    places: tuple[Tensor, ...] | None  # for each chunk, the positions of entries with any query's image; None: unknown

    @classmethod
    def find(cls, own: Tensor, others: Tensor, chunk: int) -> "_OwnKeys":
        """Find these entries; `own`, (N,), and `others`, (K,), identify the images of the queries and of the queue."""
        if own.device.type != "cpu":  # `nonzero` would make the host wait for the device
            return cls(own, others, None)
        found = torch.isin(others, own).nonzero()[:, 0]
        each = torch.bincount(found // chunk, minlength=-(-len(others) // chunk))
        return cls(own, others, (found % chunk).split(each.tolist()))


def _pass(
    scaled: Tensor, queue: Tensor, allowed: Tensor | None, own: _OwnKeys | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the sums over the queue for a block of u, (R, C), with the mask (R, K) or (1, K).

    Returns the negatives' largest logit, (R,), the log of the sum of their exponentials, (R,), the mean key under their
    softmax, (R, C), and the number of negatives, (R,).
    """
    lowest = torch.finfo(scaled.dtype).min  # not -inf: -inf - -inf is nan
    top = scaled.new_full((len(scaled), 1), lowest)  # (R, 1), the largest logit so far
    total = torch.zeros_like(top)  # (R, 1), sum of exp(logit - top)
    pulled = torch.zeros_like(scaled)  # (R, C), sum of exp(logit - top) key
    count = torch.full((len(scaled),), len(queue) if allowed is None else 0, device=scaled.device)  # (R,)
    room = scaled.new_empty(len(scaled) * min(chunk, len(queue)))  # allocated once, not per chunk
    for number, start in enumerate(range(0, len(queue), chunk)):
        columns = slice(start, start + chunk)
        keys = queue[columns].to(scaled.dtype)  # (B, C)
        weights = torch.mm(scaled, keys.T, out=room[: len(scaled) * len(keys)].view(len(scaled), -1))  # (R, B), logits
        if allowed is not None:
            part = allowed[:, columns]  # (R, B) or (1, B)
            weights.add_(torch.where(part, 0.0, ABSENT))  # several times faster than masked_fill
            count += part.sum(dim=1)
        if own is not None and (own.places is None or len(own.places[number])):
            at = slice(None) if own.places is None else own.places[number]  # (B',)
            same = own.sample[:, None] == own.queue_sample[columns][at]  # (R, B')
            if own.places is None:
                weights.masked_fill_(same, ABSENT)
            else:
                weights[:, at] = weights[:, at].masked_fill(same, ABSENT)
            count -= (same if allowed is None else same & part[:, at]).sum(dim=1)
        higher = torch.maximum(top, weights.amax(dim=1, keepdim=True))
        shrink = (top - higher).exp_()  # (R, 1)
        weights.sub_(higher).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        pulled.mul_(shrink).addmm_(weights, keys)
        top = higher
    # Where there is any negative, the total is at least 1: the largest logit adds exp(0).
    hardest = top.masked_fill(top == lowest, ABSENT)[:, 0]
    return hardest, (top + total.log())[:, 0], pulled / total.clamp(min=1), count
