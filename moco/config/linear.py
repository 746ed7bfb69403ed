"""The configuration of a linear probe, `python -m moco.linear`. `configs/protocol/` has the values of each protocol."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import bounded, require, require_divisible
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class SweepConfig:
    """Fields of kind=sweep: train many classifiers on fixed features, and choose the best on a validation part."""

    lrs: list[float] = bounded([], gt=0)
    """Learning rates to try. They are not scaled by the batch size."""
    weight_decays: list[float] = bounded([], ge=0)
    """Weight decays to try, in every combination with `lrs`."""
    layers: list[str] = bounded(["output"], min_length=1, unique=True)
    """Layers to try: output, or submodules of the backbone such as layer3 or blocks.10. The best one is used."""
    normalize: str = bounded("standard", choices=("standard", "l2", "none"))
    """Normalization of features: standard (mean 0 and standard deviation 1 of each dimension over the training
    features), l2 (length 1), or none."""
    validation: float = bounded(0.2, gt=0, lt=1)
    """Fraction of the training split, taken from each class, that is set aside to choose layer, lr and weight decay."""
    cache: str = bounded("memory", choices=("memory", "disk"))
    """Where features are stored: memory, or disk (output/features/, which later commands with the same data reuse)."""


@dataclass
class OfficialConfig:
    """Fields of kind=official: train one classifier on augmented images, as the official main_lincls.py does."""

    lr: float = bounded(30.0, gt=0)
    """Peak learning rate, before it is scaled by the batch size (see base_batch)."""
    base_batch: int | None = bounded(None, ge=1)
    """Scale lr by batch_size / base_batch; null: do not scale it."""
    weight_decay: float = bounded(0.0, ge=0)
    """Weight decay of the classifier."""
    schedule: str = bounded("step", choices=("cosine", "step", "constant"))
    """How the lr decreases: cosine, step (at the milestones), or constant. It changes only between epochs."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which schedule=step multiplies the lr by gamma."""
    gamma: float = bounded(0.1, gt=0, le=1)
    """Factor of the lr at each milestone of schedule=step."""
    head_std: float = bounded(0.01, ge=0)
    """Standard deviation of the classifier's initial weights."""


@dataclass
class LinearConfig(SubjectConfig):
    """Train and evaluate a linear classifier on a frozen encoder (a linear probe)."""

    protocol: str = "sweep"
    """Name of the protocol in tables and results.json. On the command line, protocol=NAME also sets all fields to the
    values of that protocol."""
    kind: str = bounded("sweep", choices=("sweep", "official"))
    """Procedure of the protocol: sweep (uses the fields sweep.*) or official (uses official.* and augment.*)."""
    epochs: int = bounded(100, ge=1)
    """Passes over the training features or images."""
    batch_size: int = bounded(512, ge=1)
    """Images per step, over all processes. If there are fewer training images, the batch size is lowered: to their
    number, or with kind=official to the largest power of two up to their number."""
    momentum: float = bounded(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    seeds: int = bounded(1, ge=1)
    """Number of trainings, with different orders, views, initial weights and validation parts. The result is the mean
    over the trainings, with a 95 % interval (Student's t)."""
    compare: list[str] = bounded([], choices=("untrained", "pixels"))
    """Baselines: untrained (the same network with random weights), pixels (raw pixels, for kind=sweep only)."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    official: OfficialConfig = field(default_factory=OfficialConfig)
    augment: dict[str, Any] = field(default_factory=dict)
    """For kind=official: fields of the training augmentation; docs/config/augment.md lists the fields. Set size, mean
    and std in `images`, not here."""


def check_linear(config: LinearConfig, processes: int) -> None:
    """Raise ConfigError for a configuration that is invalid with this number of processes."""
    check_subject(config)
    if config.kind == "sweep":
        error = "official.* and augment.* have no effect with protocol=sweep: set protocol=moco_v2"
        if config.protocol != "sweep":  # kind=sweep was set for a protocol of the other kind
            error = "official.* and augment.* have no effect with kind=sweep: set kind=official, or protocol=sweep"
        require(config.official == OfficialConfig() and not config.augment, error)
        for name in ("lrs", "weight_decays"):
            require(bool(getattr(config.sweep, name)), f"sweep.{name}=[] must hold at least 1 value")
        return
    error = f"sweep.* has no effect with protocol={config.protocol}: set protocol=sweep"
    if config.protocol == "sweep":
        error = "sweep.* has no effect with kind=official: set protocol=moco_v2 instead, or kind=sweep"
    require(config.sweep == SweepConfig(), error)
    require("pixels" not in config.compare, "compare=[pixels] needs fixed features: set protocol=sweep")
    require_divisible(config.batch_size, processes, f"the {processes} processes")
    for name in ("size", "mean", "std"):
        require(name not in config.augment, f"augment.{name} must equal that of evaluation: set images.{name} instead")
