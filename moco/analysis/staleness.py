"""The keys in a queue: their age, their drift, and the share of false negatives among them.

The functions use the tensors of a queue (`KeyQueue.keys`, `index`, `count`, `size`) on their device.

Legend: N queries, K queue length, M present keys, C dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import find_false_negatives

EMPTY = -1  # the age of a slot that has never received a key
SAME = 1e-5  # two float32 keys with 1 - cosine below this are the same key
ENTRIES_AT_ONCE = 2**22  # similarities in memory: 16 MiB of float32


@torch.no_grad()
def key_ages(count: Tensor, size: int, keys_per_step: int) -> Tensor:
    """Compute the age of each slot's key: the number of optimizer steps that enqueued keys after it.

    The newest keys have age 0, although the encoder of the next step's queries is one update newer. In a full queue the
    age of the oldest key is about K / keys_per_step.

    Args:
        count: number of all keys enqueued so far, an integer of shape ().
        size: K.
        keys_per_step: number of keys that a step enqueues: the global batch size, twice that for a symmetric loss.

    Returns:
        Shape (K,), integers from 0; `EMPTY` for a slot without a key.
    """
    if size < 1 or keys_per_step < 1:
        raise ValueError(f"size={size} and keys_per_step={keys_per_step} must be at least 1")
    slots = torch.arange(size, device=count.device)
    newer = (count - 1 - slots) % size  # keys enqueued after the one in this slot
    return torch.where(newer < count, newer // keys_per_step, EMPTY)


@torch.no_grad()
def key_drift(keys: Tensor, index: Tensor, now: Tensor, now_index: Tensor) -> Tensor:
    """Compute 1 - cosine between stored keys and the present momentum encoder's keys of the same images.

    Different augmentations contribute to the drift. To see the effect of age only, subtract the drift of the newest
    keys, or encode the same views.

    Args:
        keys, index: the queue's keys, shape (K, C), and the indices of their images, shape (K,).
        now, now_index: keys of the present encoder, shape (M, C), and the indices of their images, shape (M,). If an
            image occurs twice, either of its keys is used.

    Returns:
        Shape (K,), 0 (unchanged) ... 2; nan for an image without a present key.
    """
    if keys.shape[1:] != now.shape[1:] or index.shape != keys.shape[:1] or now_index.shape != now.shape[:1]:
        raise ValueError(
            f"keys {tuple(keys.shape)}, index {tuple(index.shape)}, now {tuple(now.shape)} and now_index "
            f"{tuple(now_index.shape)} must be (K, C), (K,), (M, C) and (M,)"
        )
    if len(now) == 0:
        return torch.full(index.shape, torch.nan, device=index.device)
    ordered, order = now_index.sort()
    at = torch.searchsorted(ordered, index).clamp(max=len(ordered) - 1)  # (K,)
    cosine = F.cosine_similarity(keys.float(), now[order[at]].float(), dim=1)
    return torch.where(ordered[at] == index, 1 - cosine, torch.nan)


@torch.no_grad()
def own_key_share(queue_index: Tensor, index: Tensor) -> Tensor:
    """Compute the share of the queue's keys that show a query's own image: false negatives, unless they are masked.

    If the epochs go over D >= K images in independent orders, the queue holds a key of a query's image with probability
    (K / D)^2 / 2: the image's last key is D keys old, plus or minus the difference of its positions in the two orders.
    `queue_index` (K,) holds the image index of each key, -1 for none; `index` (N,) holds those of the queries. The
    result is (N,), 0 ... 1.
    """
    _require_keys("queue_index", queue_index)
    ordered = queue_index.sort().values
    first = torch.searchsorted(ordered, index)
    return (torch.searchsorted(ordered, index, right=True) - first) / len(queue_index)


@torch.no_grad()
def similar_share(key: Tensor, queue: Tensor, threshold: float, negatives: Tensor | None = None) -> Tensor:
    """Compute the share of a query's negatives that are probably false negatives.

    These are the negatives whose similarity to the query's own key exceeds a threshold, as in Huynh et al. (2022).
    `moco.losses.find_false_negatives` explains why the key is compared instead of the query.

    Args:
        key, queue: unit length, shapes (N, C) and (K, C).
        threshold: a cosine, -1 ... 1.
        negatives: True for an entry that is a negative, boolean (N, K) or (1, K); None: all.

    Returns:
        Per query, shape (N,), 0 ... 1; 0 without negatives.
    """
    _require_keys("queue", queue)
    rows = max(1, ENTRIES_AT_ONCE // len(queue))
    shares = []
    for start in range(0, len(key), rows):
        part = key[start : start + rows]
        candidates = None if negatives is None else negatives[start : start + rows] if len(negatives) > 1 else negatives
        found = find_false_negatives(part, queue, threshold=threshold, candidates=candidates).sum(dim=1)
        shares.append(found / (len(queue) if candidates is None else candidates.sum(dim=1).clamp(min=1)))
    return torch.cat(shares) if shares else key.new_zeros(0)


def duplicate_share(key: Tensor, queue: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Compute the share of queries with their own key among the negatives, shape (), 0 ... 1.

    Unless the encoder has collapsed, a value above 0 shows that keys are enqueued before the loss: the positive's
    softmax is then at most 1/2, and the loss at least log 2. For the arguments see `similar_share`.
    """
    return (similar_share(key, queue, 1 - SAME, negatives) > 0).float().mean()


@torch.no_grad()
def same_label_share(labels: Tensor, queue_labels: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Compute the share of a query's negatives that have its label, shape (N,), 0 ... 1; 0 without negatives.

    About 1 / classes if the classes are balanced. `labels` (N,) are those of the queries, `queue_labels` (K,) those of
    the keys: give a key of unknown label a value that no query has. For `negatives` see `similar_share`.
    """
    _require_keys("queue_labels", queue_labels)
    same = labels[:, None] == queue_labels  # (N, K)
    if negatives is None:
        return same.sum(dim=1) / len(queue_labels)
    return (same & negatives).sum(dim=1) / negatives.sum(dim=1).clamp(min=1)


def _require_keys(name: str, queue: Tensor) -> None:
    if queue.ndim == 0 or len(queue) == 0:
        raise ValueError(f"{name} {tuple(queue.shape)} must hold at least one key")
