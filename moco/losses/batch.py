"""Contrast within the batch: an anchor is compared with the embeddings of the global batch, its candidates.

The caller gathers the embeddings of the global batch.

A loss is the mean over the anchors of this process. See `moco.distributed.gather_with_gradient` for how the gradients
of the processes combine.

Legend: N samples of this process, M samples of the global batch (M = N in one process), V views, A views that serve as
anchors, C dimension.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.margin import Margin, add_margin
from moco.losses.positives import PositivesMean, cross_entropy_over_positives
from moco.losses.similarity import ABSENT, Temperature, check_floating, check_shapes, check_temperature, similarity


def in_batch_info_nce(
    query: Tensor,
    keys: Tensor,
    positives: Tensor,
    temperature: Temperature,
    *,
    margin: float = 0.0,
    margin_kind: Margin = "arc",
    decoupled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE with the keys of the other samples as negatives: `ctr` of MoCo v3's Algorithm 1.

    Chen et al. (2021), without the factor 2T. In the paper the keys carry no gradient; this function detaches nothing.
    For uniform logits the loss is log(M), or log(M - 1) with `decoupled`.

    Args:
        query: L2-normalized, shape (N, C).
        keys: L2-normalized, shape (M, C), of all processes.
        positives: the column of each query's key, integers of shape (N,): rank * N + 0 ... N - 1.
        temperature: T > 0.
        margin, margin_kind: of the positives, see `add_margin`.
        decoupled: leave the positive out of the denominator, see `cross_entropy_over_positives`.

    Returns:
        The mean loss over the queries, shape (), and the detached logits without margin, shape (N, M).
    """
    check_temperature(temperature)
    _check_pairs(query, keys, positives)
    cosine = similarity(query, keys)  # (N, M)
    positive = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, positives[:, None], True)  # (N, M)
    logits = torch.where(positive, add_margin(cosine, margin, margin_kind), cosine) / temperature
    if decoupled:
        loss = cross_entropy_over_positives(logits, positive, decoupled=True)
    else:
        loss = F.cross_entropy(logits, positives)
    return loss, (cosine / temperature).detach()


def nt_xent(embeddings: Tensor, others: Tensor, offset: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """Compute NT-Xent, the normalized temperature-scaled cross entropy of SimCLR (Chen et al., 2020), Eq. 1.

    Each embedding is an anchor and is compared with all other embeddings of the global batch. Its positives are the
    other views of the same sample, each with its own softmax term. This is `sup_con` in which each sample is its own
    class. For uniform logits the loss is log(V M - 1).

    Args, results and errors are those of `sup_con`; V must be at least 2.
    """
    if len(embeddings) < 2:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} have {len(embeddings)} view; nt_xent needs 2 or more")
    return sup_con(embeddings, others, offset, temperature)


def sup_con(
    embeddings: Tensor,
    others: Tensor,
    offset: int,
    temperature: Temperature,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    base_temperature: float | None = None,
    contrast_mode: Literal["all", "one"] = "all",
) -> tuple[Tensor, Tensor]:
    """Compute the supervised contrastive loss L_out (Khosla et al., 2020), Eq. 2: samples of a class are positives.

    With neither labels nor a mask, each sample is its own class, and the loss is `nt_xent`.

    Deviations from the official code: an anchor without any positive is excluded from the mean, where the official code
    counts it with loss 0. (With one view, an anchor has no positive if no other sample has its class.) The factor
    T / base_temperature is off by default.

    The mean of the losses of all processes is the loss of the global batch if all processes have the same number of
    anchors with a positive. This holds with two views or more, unless a `mask` separates the views of a sample.

    Args:
        embeddings: L2-normalized, this process's samples, shape (V, N, C).
        others: L2-normalized, the global batch's embeddings, shape (V, M, C); `embeddings` itself in one process.
        offset: the position of this process's first sample in `others`: rank * N.
        temperature: T > 0.
        labels: the classes of the global batch, integers of shape (M,).
        mask: replaces labels; boolean (N, M), the positives of each sample. Entry (n, offset + n): whether the other
            views of sample n are positives; an embedding is never its own positive.
        base_temperature: multiplies the loss by T / base_temperature (the official code: 0.07).
        contrast_mode: views that serve as anchors: "all", or only the first ("one").

    Returns:
        The mean loss over the anchors, shape (), and the detached logits, shape (A N, V M) with A = V or 1. The logit
        of an anchor with itself is -inf. Rows and columns are ordered by view, then by sample.

    Raises:
        ValueError: for arguments of another shape, type or range, and if there are both labels and mask.
    """
    if base_temperature is not None and not 0 < base_temperature < math.inf:
        raise ValueError(f"base_temperature={base_temperature} must be above 0 and finite, or None for no factor")
    logits, positive, nonfinite = _candidates(embeddings, others, offset, temperature, contrast_mode, labels, mask)
    loss = cross_entropy_over_positives(logits, positive) + nonfinite
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    return loss, logits.detach()


def multi_positive_nt_xent(
    embeddings: Tensor,
    others: Tensor,
    offset: int,
    temperature: Temperature,
    mask: Tensor | None = None,
    contrast_mode: Literal["all", "one"] = "all",
    positives_mean: PositivesMean = "inside",
    decoupled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute NT-Xent with the mean over the positives inside the logarithm, or with no positives in the denominator.

    For uniform logits and without a mask the loss is log(V M - 1), or log(V M - V) with `decoupled`. With
    positives_mean="outside" and without `decoupled`, the loss is `sup_con`.

    Args:
        positives_mean, decoupled: see `cross_entropy_over_positives`.

    Other arguments, results and errors are those of `sup_con`.
    """
    logits, positive, nonfinite = _candidates(embeddings, others, offset, temperature, contrast_mode, None, mask)
    return cross_entropy_over_positives(logits, positive, positives_mean, decoupled) + nonfinite, logits.detach()


def _candidates(
    embeddings: Tensor,
    others: Tensor,
    offset: int,
    temperature: Temperature,
    contrast_mode: str,
    labels: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (A N, V M), which of them are positives, boolean (A N, V M), and a number to add to the loss.

    The number is nan if an embedding is not finite, else 0. Without it, the loss could be finite although the embedding
    of an anchor without a positive is not finite.
    """
    check_temperature(temperature)
    same = _same_class(embeddings, others, offset, labels, mask)  # (N, M)
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"contrast_mode={contrast_mode!r} must be 'all' or 'one'")
    views, samples, total = len(embeddings), embeddings.shape[1], others.shape[1]
    anchors = embeddings if contrast_mode == "all" else embeddings[:1]  # (A, N, C)
    logits = similarity(anchors.flatten(0, 1), others.flatten(0, 1)) / temperature  # (A N, V M)
    view = torch.arange(len(anchors), device=same.device)[:, None]
    column = (view * total + offset + torch.arange(samples, device=same.device)).flatten()  # (A N,)
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, column[:, None], True)
    logits = logits.masked_fill(itself, ABSENT)
    finite = embeddings.isfinite().all() & others.isfinite().all()
    return logits, same.repeat(len(anchors), views) & ~itself, torch.where(finite, 0.0, torch.nan)


def _same_class(embeddings: Tensor, others: Tensor, offset: int, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Check the arguments. Return which samples of the global batch have each sample's class, or `mask`: (N, M)."""
    check_shapes(embeddings=(embeddings, "VNC"), others=(others, "VMC"))
    check_floating(embeddings=embeddings, others=others)
    shapes = f"embeddings {tuple(embeddings.shape)} and others {tuple(others.shape)}"
    samples, total = embeddings.shape[1], others.shape[1]
    if not 0 <= offset <= total - samples:
        raise ValueError(
            f"offset={offset} must be 0 ... {total - samples}: the position of the first sample of "
            f"embeddings in others ({shapes})"
        )
    if len(others) * total < 2:
        raise ValueError(f"{shapes}: a single embedding has no candidates; pass a second view or sample")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both define the positives; pass only one of them")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != (samples, total):
            raise ValueError(f"mask {tuple(mask.shape)} of {mask.dtype} must be bool of shape {(samples, total)}")
        return mask
    if labels is None:
        labels = torch.arange(total, device=others.device)
    if labels.shape != (total,):
        raise ValueError(f"labels {tuple(labels.shape)} must have shape {(total,)}: one per sample of the global batch")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {str(labels.dtype).removeprefix('torch.')}; they must be integers")
    return labels[offset : offset + samples, None] == labels  # (N, M)


def _check_pairs(query: Tensor, keys: Tensor, positives: Tensor) -> None:
    """Check the arguments of `in_batch_info_nce`. On a GPU the device checks the range of the positives."""
    check_shapes(query=(query, "NC"), keys=(keys, "MC"), positives=(positives, "N"))
    check_floating(query=query, keys=keys)
    if positives.dtype != torch.int64:
        raise ValueError(f"positives are {str(positives.dtype).removeprefix('torch.')}; they must be int64")
    if positives.device.type == "cpu" and not 0 <= int(positives.min()) <= int(positives.max()) < len(keys):
        wrong = int(positives.min() if positives.min() < 0 else positives.max())
        raise ValueError(f"positives hold {wrong}; they must be columns of the keys, 0 ... {len(keys) - 1}")
