"""MoCo v1, v2, v2+ and SupMoCo: fields, checks and construction. The algorithm is in moco/builder.py."""

from dataclasses import dataclass, field, fields
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig, check_margin, refuse_together
from moco.config.train import TrainConfig

_DEBIAS = "the debiased loss is defined only for InfoNCE without other changes"
_NOT_WITH_DEBIAS = ("labels", "margin", "false_negatives", "mix_hardest", "decoupled", "switches")


@dataclass
class MoCoConfig(MethodConfig):
    """MoCo v1, v2, v2+ and SupMoCo: the queue, the momentum encoder and the loss. By default the loss is InfoNCE."""

    name: str = "moco"
    """The method; set by method=OPTION."""
    queue_size: int = bounded(65536, ge=1)
    """Number of keys in the queue (K)."""
    queue_start: str = bounded("random", choices=("random", "empty"))
    """The queue at the start: random (random keys count as negatives, as in the official code) or empty (no
    negatives)."""
    mask_own_keys: bool = True
    """Exclude the keys of the query's own image, which the queue can hold from an earlier epoch, from the query's
    negatives."""
    momentum: float = bounded(0.999, ge=0, le=1)
    """Momentum m of the momentum encoder. Each step sets each of its weights to m x (its old value) + (1 - m) x (the
    encoder's weight)."""
    momentum_end: float | None = bounded(None, ge=0, le=1)
    """Value of m at the end of the run. m changes from `momentum` to this value along half a cosine; null: m is
    constant."""
    symmetric: bool = False
    """Use each of the two views as the query once and as the key once (v2+)."""
    reduction: str = bounded("mean", choices=("mean", "sum"))
    """For symmetric=true: the loss is the mean or the sum of two losses, one with each view as the query."""
    labels: bool = False
    """Train on the classes of the training images: keys of the query's class in the queue are positives too (SupMoCo,
    Majumder et al., 2021)."""
    margin: float = bounded(0.0, ge=0)
    """Margin that lowers the similarity of a query to its positives, see margin_kind; 0: no margin."""
    margin_kind: str = bounded("arc", choices=("arc", "cosine"))
    """How the margin changes the cosine similarity cos(theta) of a query and a positive: arc, to cos(theta + margin),
    in radians (Deng et al., 2019, Eq. 3); cosine, to cos(theta) - margin (Wang et al., 2018)."""
    debias: float = bounded(0.0, ge=0, lt=1)
    """tau+, the share of the queue that has the query's own class (1 / number of classes if all classes are equally
    frequent). The loss subtracts the expected contribution of these keys (Chuang et al., 2020, Eq. 7 and 8); 0: off."""
    false_negatives: str = bounded("keep", choices=("keep", "eliminate", "attract"))
    """Treatment of keys in the queue that resemble the positive of the query: keep (as negatives), eliminate (from the
    negatives), or attract (as positives); false negative cancellation (Huynh et al., 2022)."""
    false_threshold: float | None = bounded(None, gt=-1, le=1)
    """For false_negatives: cosine similarity above which a key in the queue counts as similar to the positive of the
    query; null: no threshold."""
    false_top: int | None = bounded(None, ge=1)
    """For false_negatives: largest number of keys in the queue that count as similar to the positive of a query, the
    most similar keys first; null: no limit."""
    mix_hardest: int = bounded(0, ge=0)
    """Number of hardest negatives of a query from which further negatives are mixed: N of MoCHi (Kalantidis et al.,
    2020, section 4); 0: no mixing."""
    mix_pairs: int = bounded(0, ge=0)
    """Number of further negatives per query that are each mixed from two of its hardest negatives: s of MoCHi."""
    mix_query: int = bounded(0, ge=0)
    """Number of further negatives per query that are each mixed from one of its hardest negatives and the query: s' of
    MoCHi."""
    decoupled: bool = False
    """Leave the positives out of the denominator of the softmax (Yeh et al., 2022, decoupled contrastive learning)."""
    positives_mean: str = bounded("outside", choices=("outside", "inside"))
    """With several positives per query (labels, attract): take the mean over the positives outside the logarithm (L_out
    of Khosla et al., 2020, Eq. 2) or inside (L_in, Eq. 3)."""
    switches: dict[str, Any] = field(default_factory=dict)
    """Changes of the logits that plug-ins define, with the options of each change; they are applied in the given order.
    Set an option by +method.switches.NAME.OPTION=VALUE; to apply a change with its default options, set
    +method.switches.NAME={}."""

    has_momentum_encoder = True
    takes_small_views = True
    is_local = True

    def changing(self) -> list[str]:
        """See `MethodConfig.changing`. Mixing draws random numbers on the host; switches of plug-ins may do so too."""
        drawn = {"mix_hardest": self.mix_hardest, "switches": self.switches}
        return [*super().changing(), *(f"method.{name}={value}" for name, value in drawn.items() if value)]

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(config.augment.views == 2, f"augment.views={config.augment.views} must be 2 for {self.name}")
        refuse_together(
            self,
            *[("debias", other, _DEBIAS) for other in _NOT_WITH_DEBIAS],
            ("labels", "false_negatives", "the labels already define the false negatives"),
        )
        check_margin(self.margin, self.margin_kind)
        require(
            self.positives_mean == "outside" or self.labels or self.false_negatives == "attract",
            f"method.positives_mean={self.positives_mean} has no effect with one positive per query: set "
            "method.labels=true or method.false_negatives=attract",
        )
        size, threshold, top = self.queue_size, self.false_threshold, self.false_top
        require(
            (self.false_negatives != "keep") == (threshold is not None or top is not None),
            f"method.false_negatives={self.false_negatives} with method.false_threshold={threshold} and "
            f"method.false_top={top}: eliminate and attract need at least one of the two; for keep, remove both",
        )
        require(top is None or top <= size, f"method.false_top={top} exceeds method.queue_size={size}: lower it")
        hardest, pairs, query = self.mix_hardest, self.mix_pairs, self.mix_query
        require(
            (hardest > 0) == (pairs + query > 0),
            f"method.mix_hardest={hardest}, method.mix_pairs={pairs} and method.mix_query={query}: mixing needs "
            "mix_hardest and at least one of the other two",
        )
        require(hardest <= size, f"method.mix_hardest={hardest} exceeds method.queue_size={size}: lower it")

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.builder import KeyQueue, MoCo
        from moco.losses import Switches
        from moco.methods.build import build_temperature

        return MoCo(
            encoder,
            KeyQueue(self.queue_size, config.model.dim, self.queue_start, self.mask_own_keys),
            build_temperature(self),
            self.symmetric,
            self.reduction,  # type: ignore[arg-type]
            labels,
            Switches(**{each.name: getattr(self, each.name) for each in fields(Switches)}),
            config.seed,
        )
