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
    """Number of keys (K) in each of the two queues. A key of the first queue is the embedding of an image; a key of the
    second queue is the mean embedding of the cells of an image."""
    queue_start: str = bounded("random", choices=("random", "empty"))
    """Initial queues: random (random keys count as negatives, as in the official code) or empty (no negatives)."""
    mask_own_keys: bool = True
    """Exclude the keys of the query's own image, which the queue can hold from an earlier epoch, from the query's
    negatives."""
    momentum: float = bounded(0.999, ge=0, le=1)
    """Momentum m of the momentum encoder. Each step sets each of its weights to m x (its old value) + (1 - m) x (the
    encoder's weight)."""
    momentum_end: float | None = bounded(None, ge=0, le=1)
    """Value of m at the end of the run. m changes from `momentum` to this value along half a cosine; null: m is
    constant."""
    dense_weight: float = bounded(0.5, ge=0, le=1)
    """lambda of the paper: the loss is (1 - lambda) times the loss of the images plus lambda times the loss of the
    cells."""
    dense_warmup_steps: int = bounded(0, ge=0)
    """Number of steps at the start with lambda = 0 instead of dense_weight, because cells are matched by the features
    of the backbone, which are random at first."""
    correspondence: str = bounded("similarity", choices=("similarity", "crops"))
    """The positive of a cell of the query's view: similarity (the cell of the key's view with the most similar features
    of the backbone, as in the paper), or crops (the cell of the key's view that shows the same place of the image as
    the center of the query's cell). With crops, the place is computed from the crops, flips and other geometric changes
    of both views, without the augmentation steps of plug-ins (augment.steps); a cell whose center lies outside of the
    key's view has no loss."""
    grid: int = bounded(0, ge=0)
    """Pool the feature map to grid x grid cells; 0: do not pool the feature map (7 x 7 cells for a ResNet with 224
    pixels)."""

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
