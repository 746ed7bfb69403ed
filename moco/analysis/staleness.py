"""What a queue of keys holds: how old the keys are, how far they have drifted, and which are no true negatives.

All take a queue's own tensors (`KeyQueue.keys`, `index`, `count`, `size`) and stay on their device.

Legend: N queries, K queue length, C dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import find_false_negatives

EMPTY = -1  # the age of a slot that no key has been put in yet
SAME = 1e-5  # 1 - cosine below which two float32 keys are one and the same
ENTRIES_AT_ONCE = 2**22  # similarities at once: 16 MiB of float32


@torch.no_grad()
def key_ages(count: Tensor, size: int, keys_per_step: int) -> Tensor:
    """The age of each slot's key: for how many optimizer steps other keys have been enqueued since.

    The newest keys have age 0; when the next step's queries meet them the encoder is one update further.
    In a full queue the oldest key's is about K / keys_per_step.

    Args:
        count: keys ever enqueued, an integer of shape ().
        size: K.
        keys_per_step: of the global batch, times the directions: W N, or 2 W N if symmetric.

    Returns:
        Shape (K,), integers from 0; `EMPTY` where no key has been.

    Raises:
        ValueError: if a size is below 1.
    """
    if size < 1 or keys_per_step < 1:
        raise ValueError(f"size={size} and keys_per_step={keys_per_step} must be 1 or more")
    slots = torch.arange(size, device=count.device)
    behind = (count - 1 - slots) % size  # keys enqueued after the one in this slot
    return torch.where(behind < count, behind // keys_per_step, EMPTY)


@torch.no_grad()
def key_drift(keys: Tensor, index: Tensor, now: Tensor, now_index: Tensor) -> Tensor:
    """How far stored keys are from what the momentum encoder makes of the same images now: 1 - cosine.

    Another draw of the augmentation moves a key too. To see age alone, subtract the drift of the newest keys, or
    encode the same views.

    Args:
        keys: the queue's, shape (K, C).
        index: which sample each shows, shape (K,).
        now: keys of the present encoder, shape (M, C).
        now_index: their samples, shape (M,); of equal ones any counts.

    Returns:
        Shape (K,), 0 (as fresh) ... 2; nan where the image has no present key. Against `key_ages` it is a curve.

    Raises:
        ValueError: if shapes do not fit.
    """
    if keys.shape[1:] != now.shape[1:] or index.shape != keys.shape[:1] or now_index.shape != now.shape[:1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} with index {tuple(index.shape)} and now {tuple(now.shape)} with now_index "
            f"{tuple(now_index.shape)} must be (K, C), (K,), (M, C), (M,)"
        )
    if len(now) == 0:
        return torch.full(index.shape, torch.nan, device=index.device)
    ordered, order = now_index.sort()
    at = torch.searchsorted(ordered, index).clamp(max=len(ordered) - 1)  # (K,)
    cosine = F.cosine_similarity(keys.float(), now[order[at]].float(), dim=1)
    return torch.where(ordered[at] == index, 1 - cosine, torch.nan)


@torch.no_grad()
def own_key_share(queue_index: Tensor, index: Tensor) -> Tensor:
    """The share of the queue's keys that show a query's own image: false negatives, unless they are masked.

    With K keys and epochs over M >= K images, each in an order of its own, a query finds one with probability
    (K / M)^2 / 2: its last visit was M keys ago, give or take an epoch's order.

    Args:
        queue_index: which sample each key shows, -1 for none, shape (K,).
        index: the queries' samples, 0 or more, shape (N,).

    Returns:
        Of each query, shape (N,), 0 ... 1.
    """
    ordered = queue_index.sort().values
    first = torch.searchsorted(ordered, index)
    return (torch.searchsorted(ordered, index, right=True) - first) / len(queue_index)


@torch.no_grad()
def similar_share(key: Tensor, queue: Tensor, threshold: float, negatives: Tensor | None = None) -> Tensor:
    """The share of a query's negatives that are likely false: more similar to its own key than a threshold.

    Huynh et al. (2022), as `moco.losses.find_false_negatives`, which says why the key is asked and not the query.

    Args:
        key: L2-normalized, shape (N, C).
        queue: L2-normalized, shape (K, C).
        threshold: a cosine, -1 ... 1.
        negatives: which entries are negatives, boolean (N, K) or (1, K); None means all.

    Returns:
        Of each query, shape (N,), 0 ... 1; 0 without negatives.

    Raises:
        ValueError: see `find_false_negatives`.
    """
    rows = max(1, ENTRIES_AT_ONCE // len(queue))
    shares = []
    for start in range(0, len(key), rows):
        own = key[start : start + rows]
        candidates = None if negatives is None else negatives[start : start + rows] if len(negatives) > 1 else negatives
        found = find_false_negatives(own, queue, threshold=threshold, candidates=candidates).sum(dim=1)
        shares.append(found / (len(queue) if candidates is None else candidates.sum(dim=1).clamp(min=1)))
    return torch.cat(shares) if shares else key.new_zeros(0)


def duplicate_share(key: Tensor, queue: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Whether a query's very own key is among its negatives: the share of queries, shape (), 0 ... 1.

    Above 0 means keys are enqueued before the loss, or in the same step: the softmax then halves, and the loss cannot
    fall below log 2. A collapsed encoder gives 1 too. Arguments: see `similar_share`.
    """
    return (similar_share(key, queue, 1 - SAME, negatives) > 0).float().mean()


@torch.no_grad()
def same_label_share(labels: Tensor, queue_labels: Tensor, negatives: Tensor | None = None) -> Tensor:
    """The share of a query's negatives that are false by the labels: of the query's own class.

    Args:
        labels: of the queries, integers of shape (N,).
        queue_labels: of the queue's keys, shape (K,), a value that is no class where none is known.
        negatives: which entries are negatives, boolean (N, K) or (1, K); None means all.

    Returns:
        Of each query, shape (N,), 0 ... 1; 0 without negatives. About 1 / classes where classes are balanced.
    """
    same = labels[:, None] == queue_labels  # (N, K)
    if negatives is None:
        return same.sum(dim=1) / len(queue_labels)
    return (same & negatives).sum(dim=1) / negatives.sum(dim=1).clamp(min=1)
