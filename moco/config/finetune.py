"""The configuration of `python -m moco.finetune`."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import ResumableConfig, bounded, require, require_divisible
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class FinetuneConfig(ResumableConfig, SubjectConfig):
    """Train an encoder and a classifier end to end on labeled images, and evaluate them on held-out images."""

    encoders: list[str] = bounded(
        [], choices=("pretrained", "untrained"), min_length=1, unique=True, example="encoders=[pretrained,untrained]"
    )
    """Encoders to start from: pretrained, untrained (the same network with random weights), or both. [untrained] with
    fraction=1.0 is the supervised baseline."""
    fraction: float | None = bounded(None, gt=0, le=1)
    """Fraction of the training images of each class that the training uses, with their labels; at least one image per
    class. Null: labels_per_class or subset_list selects the images; if neither is set, the fraction is 0.01."""
    labels_per_class: int = bounded(0, ge=0)
    """Labeled training images per class; 0: use fraction or subset_list."""
    subset_list: str = bounded("", path=True)
    """File with the names of the labeled training images, one name per line, such as SimCLR's 1percent.txt; empty: no
    file."""
    seeds: int = bounded(1, ge=1)
    """Number of trainings per encoder, with the seeds `seed`, `seed` + 1, ... They differ in the random initial
    weights, the order of the images and the views; with labels_per_class, or a fraction below 1, also in the labeled
    images."""
    epochs: int = bounded(100, ge=1)
    """Passes over the labeled images."""
    min_steps: int = bounded(0, ge=0)
    """Smallest number of steps. If `epochs` epochs have fewer steps, the number of epochs is raised."""
    batch_size: int = bounded(128, ge=1)
    """Images per step, over all processes. If there are fewer labeled images, the batch size is lowered to their
    number."""
    optimizer: str = bounded("sgd", choices=("sgd", "adamw"))
    """The optimizer."""
    lr: float = bounded(0.01, gt=0)
    """Peak learning rate (lr) of the backbone, not scaled by the batch size. It decreases to 0 along a cosine."""
    head_lr_factor: float = bounded(1.0, gt=0)
    """Ratio of the classifier's learning rate to that of the backbone."""
    momentum: float = bounded(0.9, ge=0, lt=1)
    """Momentum of sgd."""
    nesterov: bool = False
    """For sgd: use Nesterov momentum."""
    betas: list[float] = bounded([0.9, 0.999], ge=0, lt=1, min_length=2, max_length=2)
    """The two decay rates of adamw."""
    weight_decay: float = bounded(0.0, ge=0)
    """Weight decay of all weights except those in `exclude`."""
    exclude: list[str] = bounded([], choices=("bias", "norm"))
    """Weights without weight decay: bias (all biases), norm (the weights of normalization layers)."""
    warmup: float = bounded(0.0, ge=0, lt=1)
    """Fraction of the steps, at the start of the training, in which the lr rises linearly to its peak."""
    layer_decay: float | None = bounded(None, gt=0, le=1)
    """For vision transformers and networks of timm: the ratio of a layer's lr to that of the next layer toward the
    output. Biases and other vectors of the backbone then have no weight decay. Null: the same lr for all layers."""
    drop_path: float | None = bounded(None, ge=0, lt=1)
    """For vision transformers and networks of timm: probability with which the training skips the last block
    (stochastic depth). Earlier blocks are skipped less often. Null: the network's own value."""
    label_smoothing: float = bounded(0.0, ge=0, lt=1)
    """Fraction of each target that is spread evenly over all classes; 0: no smoothing."""
    mixup: float = bounded(0.0, ge=0)
    """MixUp's alpha, of Beta(alpha, alpha); 0: off. If cutmix is above 0 too, each step uses one of the two at
    random."""
    cutmix: float = bounded(0.0, ge=0)
    """CutMix's alpha, of Beta(alpha, alpha); 0: off."""
    bn: str = bounded("sync", choices=("sync", "frozen"))
    """Batch normalization: sync (statistics of the global batch), or frozen (the encoder's running statistics)."""
    validation: float = bounded(0.0, ge=0, lt=1)
    """For choosing settings: fraction of the training split, taken from each class, to evaluate on; training uses the
    other images. 0: evaluate on the held-out split."""
    view: dict[str, Any] = field(default_factory=dict)
    """Fields of the training augmentation to change, each as +view.NAME=VALUE; docs/config/augment.md lists the fields.
    All other fields keep the values of the run's first view. Without a run, the augmentation is a crop of 8 to 100 % of
    the area and a horizontal flip."""


def check_finetune(config: FinetuneConfig, processes: int = 1) -> None:
    """Raise ConfigError for a configuration that is invalid with this number of processes."""
    check_subject(config)
    ways = {name: getattr(config, name) for name in ("fraction", "labels_per_class", "subset_list")}
    chosen = [f"{name}={value}" for name, value in ways.items() if value]
    require(len(chosen) < 2, f"{' and '.join(chosen)} select the labeled images in different ways: remove all but one")
    given = f"optimizer={config.optimizer} with momentum={config.momentum}"
    possible = config.optimizer == "sgd" and config.momentum > 0
    require(not config.nesterov or possible, f"nesterov=true needs optimizer=sgd with momentum above 0, not {given}")
    for name in ("mixup", "cutmix"):
        alpha = getattr(config, name)
        require(alpha == 0 or alpha >= 1e-3, f"{name}={alpha} must be 0 or at least 0.001")
    require_divisible(config.batch_size, processes, f"the {processes} processes")


def fraction_of(config: FinetuneConfig) -> float | None:
    """Return the fraction of the images of each class that are labeled; None if another field selects these images."""
    return None if config.labels_per_class or config.subset_list else config.fraction or 0.01
