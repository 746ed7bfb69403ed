"""MoCo v3: fields, checks and construction. The algorithm is in moco/methods/moco_v3.py."""

from dataclasses import dataclass
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig
from moco.config.train import TrainConfig


@dataclass
class MoCoV3Config(MethodConfig):
    """MoCo v3: a momentum encoder and a predictor, no queue.

    Each of the two views is the query once and the key once. This gives two losses, and the method adds them.
    """

    name: str = "moco_v3"
    """The method; set by method=OPTION."""
    momentum: float = bounded(0.99, ge=0, le=1)
    """Momentum m of the momentum encoder. Each step sets each of its weights to m x (its old value) + (1 - m) x (the
    encoder's weight)."""
    momentum_end: float | None = bounded(None, ge=0, le=1)
    """Value of m at the end of the run. m changes from `momentum` to this value along half a cosine; null: m is
    constant."""
    decoupled: bool = False
    """Leave the positive out of the denominator of the softmax (Yeh et al., 2022, decoupled contrastive learning)."""

    has_momentum_encoder = True
    takes_small_views = True
    has_predictor = True
    can_learn_temperature = False
    symmetric = True

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(config.batch_size > 1, f"batch_size={config.batch_size} leaves moco_v3 no negatives: raise it")
        require(config.augment.views == 2, f"augment.views={config.augment.views} must be 2 for {self.name}")

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.methods.build import predictor_of
        from moco.methods.moco_v3 import MoCoV3

        return MoCoV3(encoder, predictor_of(config.model), self.temperature, self.decoupled)
