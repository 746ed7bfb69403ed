"""DenseCL: fields, checks and construction. The algorithm is in moco/methods/densecl.py."""

from dataclasses import dataclass
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig
from moco.config.train import TrainConfig


@dataclass
class DenseCLConfig(MethodConfig):
    """DenseCL: MoCo v2, with a second contrastive loss between the cells of the feature maps of both views."""

    name: str = "densecl"
    """The method; set by method=OPTION."""
    queue_size: int = bounded(65536, ge=1)
    """Number of keys in each of the two queues (K): embeddings of images, and mean embeddings of an image's cells."""
    queue_start: str = bounded("random", choices=("random", "empty"))
    """Initial queues: random (random keys count as negatives, as in the official code) or empty (no negatives)."""
    mask_own_keys: bool = True
    """Exclude older keys of a query's own image from its negatives."""
    momentum: float = bounded(0.999, ge=0, le=1)
    """Momentum m of the momentum encoder. Each step keeps the fraction m of its weights."""
    momentum_end: float | None = bounded(None, ge=0, le=1)
    """Final value of m, to which it increases along half a cosine; null: m is constant."""
    dense_weight: float = bounded(0.5, ge=0, le=1)
    """lambda: the loss is (1 - lambda) times that of the images plus lambda times that of the cells."""
    dense_warmup_steps: int = bounded(0, ge=0)
    """Steps at the start with lambda = 0. Cells are matched by the backbone's features, which are random at first."""
    correspondence: str = bounded("similarity", choices=("similarity", "crops"))
    """The positive of a cell: similarity (the cell of the other view with the most similar features of the backbone, as
    in the paper), or crops (the cell that shows the center of this cell, computed from the crops, flips and other
    changes of both views; cells outside of the other view have no loss). crops ignores the augmentation
    steps of plug-ins (augment.steps)."""
    grid: int = bounded(0, ge=0)
    """Pool the feature map to grid x grid cells; 0: use it as it is (7 x 7 for a ResNet with 224 pixels)."""

    has_momentum_encoder = True
    can_learn_temperature = False

    @property
    def uses_places(self) -> bool:  # type: ignore[override] # read-only here
        """Return whether the crops decide which cells correspond."""
        return self.correspondence == "crops"

    def changing(self) -> list[str]:
        """See `MethodConfig.changing`."""
        steps = self.dense_warmup_steps
        return [*super().changing(), *[f"method.dense_warmup_steps={steps}"][: steps > 0]]

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(config.augment.views == 2, f"augment.views={config.augment.views} must be 2 for {self.name}")
        require(
            not config.model.head_norm,
            "model.head_norm=true does not fit densecl, whose heads have no BN: set model.head_norm=false",
        )
        require(
            self.dense_warmup_steps == 0 or self.dense_weight > 0,
            f"method.dense_warmup_steps={self.dense_warmup_steps} has no effect with method.dense_weight=0: remove it",
        )

    def build(self, config: TrainConfig, encoder: Any, labels: Any) -> Any:
        """See `MethodConfig.build`."""
        from moco.builder import KeyQueue
        from moco.methods.densecl import DenseCL
        from moco.models.dense import build_dense_encoder

        model = config.model
        head = model.head_layers, model.head_hidden, model.dim
        queue, dense_queue = (
            KeyQueue(self.queue_size, model.dim, self.queue_start, self.mask_own_keys) for _ in range(2)
        )
        return DenseCL(
            build_dense_encoder(encoder, *head, config.augment.size, config.data.channels, self.grid),
            queue,
            dense_queue,
            self.temperature,
            self.dense_weight,
            self.dense_warmup_steps,
            by_crops=self.uses_places,
        )
