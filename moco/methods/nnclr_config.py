"""NNCLR: fields, checks and construction. The algorithm is in moco/methods/nnclr.py."""

from dataclasses import dataclass
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig
from moco.config.train import TrainConfig


@dataclass
class NNCLRConfig(MethodConfig):
    """NNCLR: a predictor and a queue of projections, in which each view finds its positive; no momentum encoder."""

    name: str = "nnclr"
    """The method; set by method=OPTION."""
    queue_size: int = bounded(98304, ge=1)
    """Number of projections in the queue (K), among which the nearest neighbor is searched: the support set."""

    has_predictor = True
    can_learn_temperature = False
    compares_views = False

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(config.batch_size > 1, f"batch_size={config.batch_size} leaves nnclr no negatives: raise it")
        require(config.augment.views == 2, f"augment.views={config.augment.views} must be 2 for {self.name}")

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.builder import KeyQueue
        from moco.methods.build import predictor_of
        from moco.methods.nnclr import NNCLR

        queue = KeyQueue(self.queue_size, config.model.dim, mask_own_keys=False)
        return NNCLR(encoder, predictor_of(config.model), queue, self.temperature)
