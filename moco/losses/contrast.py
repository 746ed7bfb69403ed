"""InfoNCE with a queue and optional changes: margin, debiasing, false negatives, mixed hard negatives, more positives.

Legend: N queries, C dimension, K queue length, s negatives mixed from pairs, s' mixed with the query, E = s + s'.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moco.losses.debias import debiased_cross_entropy
from moco.losses.false_negatives import find_false_negatives
from moco.losses.margin import Margin, add_margin
from moco.losses.mixing import mix_hard_negatives
from moco.losses.positives import PositivesMean
from moco.losses.queue import check_inputs, cross_entropy_of_key, info_nce_logits
from moco.losses.similarity import ABSENT, Temperature, check_mask, full_precision, paired_similarity, similarity
from moco.losses.streamed import logit_measures
from moco.plugins import Registry, check_options

# Switches of plug-ins. A switch is a function of the logits (N, 1 + K + E), with the positive in column 0, and of its
# options as keyword arguments. It returns the logits of the cross entropy.
SWITCHES: Registry[Callable[..., Tensor]] = Registry("method.switches", {})


@dataclass(frozen=True)
class Switches:
    """Changes to InfoNCE; the defaults change nothing."""

    margin: float = 0.0  # see `add_margin`
    margin_kind: Margin = "arc"
    debias: float = 0.0  # see `debiased_cross_entropy`
    false_negatives: Literal["keep", "eliminate", "attract"] = "keep"  # see `find_false_negatives`
    false_threshold: float | None = None
    false_top: int | None = None
    mix_hardest: int = 0  # see `mix_hard_negatives`
    mix_pairs: int = 0  # s
    mix_query: int = 0  # s'
    decoupled: bool = False  # see `cross_entropy_over_positives`
    positives_mean: PositivesMean = "outside"  # see `cross_entropy_over_positives`
    switches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of plug-ins, by name, with their options

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown switch of a plug-in, or an unknown option."""
        for name, options in self.switches.items():
            check_options(f"method.switches.{name}", SWITCHES.find(name), options, arguments=1)

    @property
    def mixed(self) -> int:
        """Return E, the number of mixed negatives per query."""
        return self.mix_pairs + self.mix_query

    @property
    def draws(self) -> int:
        """Return the number of random numbers per query that mixing needs."""
        return 3 * self.mix_pairs + 2 * self.mix_query


def contrast(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    switches: Switches,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute InfoNCE with switches; without any switch the loss equals `info_nce` bit for bit.

    Args:
        query, key, queue, temperature, negatives: as in `info_nce`.
        switches: the changes.
        positives: boolean (N, K) or (1, K), keys in the queue that are positives too: those of the query's class
            (SupMoCo), see `multi_positive_info_nce`.
        uniforms: random numbers for mixing, shape (N, switches.draws).

    Returns:
        The loss and a dict of detached measures, all of shape () and means over the queries. "negatives" and
        "positives": the numbers of negatives and positives in the queue; "chance": the loss if all similarities, also
        those of mixed negatives, are 0, as they are on average for random vectors; "eliminated" or "attracted": the
        number of false negatives found; "mixed_similarity": the cosine of a query and its mixed negatives. The measures
        of `logit_measures` are computed without margin and mixed negatives, so that runs can be compared.

    Raises:
        ValueError: for invalid values and shapes, and for debiasing with any other switch or positives.
    """
    _check(query, key, queue, temperature, switches, positives)
    measures = {}
    if switches.false_negatives != "keep":
        threshold, top = switches.false_threshold, switches.false_top
        found = find_false_negatives(key, queue, threshold=threshold, top=top, candidates=negatives)  # (N, K)
        if switches.false_negatives == "eliminate":
            measures["eliminated"] = _mean_count(found)
            negatives = ~found if negatives is None else negatives & ~found
        else:
            measures["attracted"] = _mean_count(found)
            positives = found if positives is None else positives | found
    whole_queue = torch.ones(1, len(queue), dtype=torch.bool, device=queue.device)
    only_negatives = candidates = whole_queue if negatives is None else negatives  # (N, K) or (1, K)
    if positives is not None:
        positives = positives & candidates
        measures["positives"] = _mean_count(positives)
        only_negatives = candidates & ~positives
    measures["negatives"] = _mean_count(only_negatives)
    measures["chance"] = _chance(candidates, only_negatives, temperature, switches)
    mixed = None
    if switches.mixed:
        mixed = _mix(query, queue, switches, uniforms, only_negatives)  # (N, E, C)
        measures["mixed_similarity"] = similarity(query.detach(), mixed).mean()
    query = full_precision(query)
    logits = info_nce_logits(query, key, queue, temperature, negatives)  # (N, 1+K)
    loss = _loss(query, key, queue, logits, temperature, switches, positives, mixed)
    plain = logits.detach()
    if positives is not None:
        plain = torch.cat([plain[:, :1], plain[:, 1:].masked_fill(positives, ABSENT)], dim=1)
    return loss, measures | logit_measures(plain, temperature)


def _loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    logits: Tensor,
    temperature: Temperature,
    switches: Switches,
    positives: Tensor | None,
    mixed: Tensor | None,
) -> Tensor:
    """Return the cross entropy of the logits: debiased, or with margin, positives and mixed negatives."""
    if switches.debias:
        return debiased_cross_entropy(logits, temperature, switches.debias)
    if switches.margin:
        margin, kind = switches.margin, switches.margin_kind
        own = add_margin(paired_similarity(query, key), margin, kind) / temperature  # (N, 1)
        rest = logits[:, 1:]  # (N, K)
        if positives is not None:
            lowered = add_margin(similarity(query, queue), margin, kind) / temperature
            rest = torch.where(positives, lowered, rest)
        logits = torch.cat([own, rest], dim=1)
    if mixed is not None:
        absent = (mixed == 0).all(dim=2)  # (N, E), True for a query without any negative to mix
        extra = (similarity(query, mixed) / temperature).masked_fill(absent, ABSENT)
        logits = torch.cat([logits, extra], dim=1)  # (N, 1+K+E)
    for name, options in switches.switches.items():
        logits = SWITCHES[name](logits, **options)
    return cross_entropy_of_key(logits, positives, switches.positives_mean, switches.decoupled)


def _check(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, switches: Switches, positives: Tensor | None
) -> None:
    """Raise ValueError for invalid values and shapes, and for switches that exclude each other."""
    check_inputs(query, key, queue, temperature)
    check_mask("positives", positives, (len(query), len(queue)))
    if switches.false_negatives not in ("keep", "eliminate", "attract"):
        raise ValueError(f"false_negatives={switches.false_negatives!r} must be 'keep', 'eliminate' or 'attract'")
    if min(switches.mix_hardest, switches.mix_pairs, switches.mix_query) < 0:
        raise ValueError(f"{switches} must not have negative numbers")
    others = {
        "margin": switches.margin != 0,
        "mixed negatives": switches.mixed > 0,
        "false_negatives": switches.false_negatives != "keep",
        "decoupled": switches.decoupled,
        "positives": positives is not None,
        **dict.fromkeys(switches.switches, True),
    }
    on = [name for name, is_on in others.items() if is_on]
    if switches.debias and on:
        raise ValueError(
            f"debias={switches.debias} excludes {', '.join(on)}: the debiased loss is defined only for InfoNCE "
            "without other changes; use one or the other"
        )


def _mix(query: Tensor, queue: Tensor, switches: Switches, uniforms: Tensor | None, negatives: Tensor) -> Tensor:
    """Return the mixed negatives, (N, E, C)."""
    if uniforms is None or uniforms.shape != (len(query), switches.draws):
        raise ValueError(f"uniforms must have shape ({len(query)}, {switches.draws}) for mixing")
    pairs, with_query = uniforms.split([3 * switches.mix_pairs, 2 * switches.mix_query], dim=1)
    pairs = pairs.unflatten(1, (switches.mix_pairs, 3))
    with_query = with_query.unflatten(1, (switches.mix_query, 2))
    return mix_hard_negatives(query, queue, switches.mix_hardest, pairs, with_query, negatives)


def _chance(candidates: Tensor, negatives: Tensor, temperature: Temperature, switches: Switches) -> Tensor:
    """Return the loss of similarities 0: a mean over queries, so it does not depend on how the batch is divided."""
    lowered = add_margin(torch.zeros((), device=negatives.device), switches.margin, switches.margin_kind)
    # The margin lowers the logits of positives, so a negative weighs exp(-lowered / T) times as much as a positive.
    count = negatives.sum(dim=1).float()
    weighted = (count + switches.mixed) * (-lowered / temperature).exp()
    if switches.decoupled:
        return weighted.clamp(min=1).log().mean()
    return torch.log1p(candidates.sum(dim=1).float() - count + weighted).mean()


def _mean_count(mask: Tensor) -> Tensor:
    return mask.sum(dim=1).float().mean()
