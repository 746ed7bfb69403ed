"""The switches of a contrast with a queue: what is found and made of the queue's keys before `contrast` compares.

Legend: N queries, C dimension, K queue length, s mixed pairs, s' mixed with the query.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moco.losses.composed import contrast
from moco.losses.false_negatives import find_false_negatives
from moco.losses.margin import Margin
from moco.losses.mixing import mix_hard_negatives
from moco.losses.similarity import ABSENT, Temperature, similarity


@dataclass(frozen=True)
class Switches:
    """What is changed of InfoNCE; as it stands here nothing is, to the bit."""

    margin: float = 0.0  # see `add_margin`
    margin_kind: Margin = "arc"
    debias: float = 0.0  # see `debiased_cross_entropy`
    false_negatives: Literal["keep", "eliminate", "attract"] = "keep"  # see `find_false_negatives`
    false_threshold: float | None = None
    false_top: int | None = None
    mix_hardest: int = 0  # see `mix_hard_negatives`
    mix_pairs: int = 0  # s
    mix_query: int = 0  # s'

    @property
    def mixed(self) -> int:
        """How many negatives are mixed for a query."""
        return self.mix_pairs + self.mix_query

    @property
    def draws(self) -> int:
        """How many random numbers a query needs for them."""
        return 3 * self.mix_pairs + 2 * self.mix_query


def switched_contrast(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    switches: Switches,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`contrast` with what the switches ask for; `info_nce`, bit for bit, if they ask for nothing.

    Args:
        query, key, queue, temperature, negatives: as in `info_nce`.
        switches: what is on.
        positives: boolean (N, K), the queue's keys that are positives too: those of the query's class (SupMoCo).
        uniforms: random numbers for mixing, shape (N, switches.draws).

    Returns:
        The mean loss over the queries, shape (); the detached logits, shape (N, 1 + K), as `info_nce`'s, -inf for all
        that is no negative of the query; and detached measures of shape (), means over the queries: "negatives", how
        many the queue has; "chance", the loss of a query to which all candidates are alike; where they are asked for,
        "eliminated" or "attracted", the false negatives found; "positives", those in the queue besides the key;
        "mixed_similarity", the cosine of the query and its mixed negatives.

    Raises:
        ValueError: for values and shapes that do not fit.
    """
    measures = {}
    if switches.false_negatives != "keep":
        found = find_false_negatives(
            key, queue, threshold=switches.false_threshold, top=switches.false_top, candidates=negatives
        )  # (N, K)
        if switches.false_negatives == "eliminate":
            measures["eliminated"] = _mean_count(found)
            negatives = ~found if negatives is None else negatives & ~found
        else:
            measures["attracted"] = _mean_count(found)
            positives = found if positives is None else positives | found
    all_gather_object = torch.ones(1, len(queue), dtype=torch.bool, device=queue.device)
    candidates = only_negatives = all_gather_object if negatives is None else negatives  # (N, K) or (1, K)
    if positives is not None:
        positives = positives & candidates
        measures["positives"] = _mean_count(positives)
        only_negatives = candidates & ~positives
    measures["negatives"] = _mean_count(only_negatives)
    # A mean of logarithms, not the logarithm of a mean: the same for any division of the batch.
    measures["chance"] = torch.log1p(candidates.sum(dim=1).float() + switches.mixed).mean()
    extra = None
    if switches.mixed:
        assert uniforms is not None
        pairs, with_query = uniforms.split([3 * switches.mix_pairs, 2 * switches.mix_query], dim=1)
        extra = mix_hard_negatives(
            query,
            queue,
            switches.mix_hardest,
            pairs.unflatten(1, (switches.mix_pairs, 3)),
            with_query.unflatten(1, (switches.mix_query, 2)),
            only_negatives,
        )  # (N, s+s', C)
        measures["mixed_similarity"] = similarity(query.detach(), extra).mean()
    loss, logits = contrast(
        query,
        key,
        queue,
        temperature,
        negatives,
        margin=switches.margin,
        margin_kind=switches.margin_kind,
        extra_negatives=extra,
        positives=positives,
        debias=switches.debias,
    )
    if positives is not None:
        logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(positives, ABSENT)], dim=1)  # (N, 1+K)
    return loss, logits, measures


def _mean_count(mask: Tensor) -> Tensor:
    return mask.sum(dim=1).float().mean()
