"""SimCLR, or SupCon if labels are used: fields, checks and construction. The algorithm is in moco/methods/simclr.py."""

from dataclasses import dataclass, fields
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig, check_margin, refuse_together
from moco.config.train import TrainConfig

_ONE_POSITIVE = "with other_view the only positive is another view of the same image"


@dataclass
class SimCLRConfig(MethodConfig):
    """SimCLR, SupCon and plain InfoNCE within the batch: neither a queue nor a momentum encoder."""

    name: str = "simclr"
    """The method; set by method=OPTION."""
    labels: bool = False
    """Train on the classes of the training images: all embeddings of a class are positives (SupCon, Khosla et al.,
    2020, Eq. 2)."""
    candidates: str = bounded("all", choices=("all", "other_view"))
    """The embeddings with which an embedding of view i is compared. all: those of all views of all images of the
    batch. other_view: those of one other view j of all images, so it has one positive; the loss is averaged over all
    pairs (i, j) (Chen et al., 2021, Algorithm 1, ctr)."""
    contrast_mode: str = bounded("all", choices=("all", "one"))
    """The views that serve as anchors: all (every view), or one (only the first view), as in the official code of
    Khosla et al., 2020."""
    base_temperature: float | None = bounded(None, gt=0)
    """Multiply the loss by T / base_temperature (Khosla et al., 2020, official code: 0.07); null: no factor."""
    margin: float = bounded(0.0, ge=0)
    """Margin m that lowers the similarity of an anchor to its positive, see margin_kind; needs candidates=other_view;
    0: no margin."""
    margin_kind: str = bounded("arc", choices=("arc", "cosine"))
    """How the margin changes the cosine similarity cos(theta) of an anchor and its positive: arc, to cos(theta + m),
    with m in radians (Deng et al., 2019, Eq. 3); cosine, to cos(theta) - m (Wang et al., 2018)."""
    decoupled: bool = False
    """Leave the positives out of the denominator of the softmax (Yeh et al., 2022, decoupled contrastive learning)."""
    positives_mean: str = bounded("outside", choices=("outside", "inside"))
    """With several positives per anchor (labels, or three or more views): take the mean over the positives outside the
    logarithm (L_out of Khosla et al., 2020, Eq. 2) or inside (L_in, Eq. 3)."""

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        views, base = config.augment.views, self.base_temperature
        require(config.batch_size > 1, f"batch_size={config.batch_size} leaves simclr no negatives: raise it")
        require(views > 1, f"augment.views={views} leaves a sample no positive of its own: set 2 or more")
        require(
            config.accumulate == 1,
            f"accumulate={config.accumulate} would leave simclr only the negatives of one micro-batch: set "
            "accumulate=1 and use more processes, or use method=moco_v2, whose negatives do not depend on the batch",
        )
        refuse_together(
            self,
            *[("candidates", each, _ONE_POSITIVE) for each in ("labels", "base_temperature", "positives_mean")],
        )
        require(
            self.positives_mean == "outside" or self.labels or views > 2,
            f"method.positives_mean={self.positives_mean} has no effect with one positive per anchor: set "
            "method.labels=true or augment.views=3",
        )
        require(
            base is None or self.temperature_schedule != "learned",
            f"method.base_temperature={base} excludes method.temperature_schedule=learned, which would shrink the "
            "factor T / base_temperature; set method.base_temperature=null",
        )
        require(
            self.margin == 0 or self.candidates == "other_view",
            f"method.margin={self.margin} does not fit method.candidates=all: set method.candidates=other_view or "
            "method.margin=0",
        )
        check_margin(self.margin, self.margin_kind)

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.methods.build import build_temperature
        from moco.methods.simclr import LossForm, SimCLR

        return SimCLR(
            encoder,
            build_temperature(self),
            labels,
            self.candidates,  # type: ignore[arg-type]
            self.contrast_mode,  # type: ignore[arg-type]
            self.base_temperature,
            LossForm(**{each.name: getattr(self, each.name) for each in fields(LossForm)}),
        )
