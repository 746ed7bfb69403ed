"""ReSSL: fields, checks and construction. The algorithm is in moco/methods/ressl.py."""

from dataclasses import dataclass
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig
from moco.config.train import TrainConfig


@dataclass
class ReSSLConfig(MethodConfig):
    """ReSSL: a queue and a momentum encoder, as in MoCo.

    `temperature` is the temperature of the student, which encodes the strongly augmented view.
    """

    name: str = "ressl"
    """The method; set by method=OPTION."""
    queue_size: int = bounded(131072, ge=1)
    """Number of keys in the queue (K)."""
    momentum: float = bounded(0.999, ge=0, le=1)
    """Momentum m of the momentum encoder. Each step sets each of its weights to m x (its old value) + (1 - m) x (the
    encoder's weight)."""
    momentum_end: float | None = bounded(None, ge=0, le=1)
    """Value of m at the end of the run. m changes from `momentum` to this value along half a cosine; null: m is
    constant."""
    teacher_temperature: float = bounded(0.04, gt=0)
    """Temperature of the teacher, for the weakly augmented view. If teacher_temperature is lower than `temperature`,
    the teacher's softmax over the queue is sharper than the student's."""

    has_momentum_encoder = True
    can_learn_temperature = False

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(config.augment.views == 2, f"augment.views={config.augment.views} must be 2 for {self.name}")

    def advice(self, config: TrainConfig) -> list[str]:
        """See `MethodConfig.advice`."""
        if config.augment.second:
            return super().advice(config)
        strong = "augment.second is empty, so the teacher's view is as strongly augmented as the student's"
        return [*super().advice(config), f"{strong}: set augment=ressl, or the fields of a weak view in augment.second"]

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.builder import KeyQueue
        from moco.methods.ressl import ReSSL

        queue = KeyQueue(self.queue_size, config.model.dim, mask_own_keys=False)
        return ReSSL(encoder, queue, self.temperature, self.teacher_temperature)
