"""The schema of a linear probe, `python -m moco.linear`. Values are in `configs/protocol/`."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import at_least, one_of, require
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class SweepConfig:
    """Fixed features of the central view, many heads at once, the best on a part of the training split."""

    lrs: list[float] = field(default_factory=list)
    """learning rates to try, as they stand"""
    weight_decays: list[float] = field(default_factory=list)
    """and weight decays, each with each"""
    layers: list[str] = field(default_factory=lambda: ["output"])
    """output, or submodules of the backbone such as layer3, layers.8, blocks.10; the best one is taken"""
    normalize: str = "standard"
    """standard (each dimension by the training split's mean and deviation), l2 (unit length) or none"""
    validation: float = 0.2
    """the part of each training class that the choice is made on"""
    cache: str = "memory"
    """memory, or disk: features lie in output/features/ and are used again where nothing has changed"""


@dataclass
class OfficialConfig:
    """A recipe of main_lincls.py: the head learns from augmented pictures, at one learning rate."""

    lr: float = 30.0
    """the peak, before it is scaled"""
    base_batch: int | None = None
    """lr is scaled by batch_size / base_batch; null: lr as it stands"""
    weight_decay: float = 0.0
    """of the head"""
    schedule: str = "step"
    """cosine, step or constant, held within an epoch"""
    milestones: list[float] = field(default_factory=list)
    """epochs at which `step` multiplies the lr by gamma"""
    gamma: float = 0.1
    """see milestones"""
    head_std: float = 0.01
    """of the head's first weights"""


@dataclass
class LinearConfig(SubjectConfig):
    """A linear probe."""

    protocol: str = "sweep"
    """the name of the recipe, for tables and results.json; protocol=NAME on the command line takes the recipe itself"""
    kind: str = "sweep"
    """which of the two procedures the recipe is: sweep or official"""
    epochs: int = 100
    """passes over the training features or pictures"""
    batch_size: int = 512
    """over all processes; a smaller data set lowers it, and says so"""
    momentum: float = 0.9
    """of sgd"""
    seeds: int = 1
    """repeat with other orders, views, first weights and validation parts: mean and Student's 95 % interval"""
    compare: list[str] = field(default_factory=list)
    """baselines: untrained (the same network), pixels (sweep only)"""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    official: OfficialConfig = field(default_factory=OfficialConfig)
    augment: dict[str, Any] = field(default_factory=dict)
    """of the official kind: fields of `moco.data.view.View`; size, mean and std are those of `images`"""


def check_linear(config: LinearConfig, processes: int) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_subject(config)
    one_of("kind", config.kind, ("sweep", "official"))
    at_least(1, {"epochs": config.epochs, "batch_size": config.batch_size, "seeds": config.seeds})
    require(0 <= config.momentum < 1, f"momentum={config.momentum} must lie in 0 ... 1, and below 1")
    for name in config.compare:
        one_of("compare", name, ("untrained", "pixels"))
    if config.kind == "sweep":
        unused = config.official != OfficialConfig() or bool(config.augment)
        require(not unused, f"official.* and augment.* say nothing to protocol={config.protocol}: set protocol=moco_v2")
        _check_sweep(config.sweep)
    else:
        unused = config.sweep != SweepConfig()
        require(not unused, f"sweep.* says nothing to protocol={config.protocol}: set protocol=sweep")
        _check_official(config, processes)


def _check_sweep(sweep: SweepConfig) -> None:
    for name in ("lrs", "weight_decays", "layers"):
        require(bool(getattr(sweep, name)), f"sweep.{name} is empty: name at least one")
    for lr in sweep.lrs:
        require(lr > 0, f"sweep.lrs holds {lr}: each must be above 0")
    for decay in sweep.weight_decays:
        require(decay >= 0, f"sweep.weight_decays holds {decay}: none may be negative")
    require(len(set(sweep.layers)) == len(sweep.layers), f"sweep.layers={sweep.layers} names a layer twice")
    one_of("sweep.normalize", sweep.normalize, ("standard", "l2", "none"))
    one_of("sweep.cache", sweep.cache, ("memory", "disk"))
    require(0 < sweep.validation < 1, f"sweep.validation={sweep.validation} must lie between 0 and 1")


def _check_official(config: LinearConfig, processes: int) -> None:
    official = config.official
    require(official.lr > 0, f"official.lr={official.lr} must be above 0")
    at_least(0, {"official.weight_decay": official.weight_decay, "official.head_std": official.head_std})
    at_least(1, {"official.base_batch": 1 if official.base_batch is None else official.base_batch})
    one_of("official.schedule", official.schedule, ("cosine", "step", "constant"))
    require(0 < official.gamma <= 1, f"official.gamma={official.gamma} must lie in 0 ... 1, above 0")
    require("pixels" not in config.compare, "compare=[pixels] needs features that stand still: set protocol=sweep")
    require(
        config.batch_size % processes == 0,
        f"batch_size={config.batch_size} must be a multiple of the {processes} processes",
    )
    for name in ("size", "mean", "std"):
        require(name not in config.augment, f"augment.{name} is that of the held-out view: set images.{name}")
