"""What every command that judges or uses an encoder shares: which encoder, which data, which device."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import ComputeConfig, at_least, check_bounds, one_of, require
from moco.config.data import SubjectDataConfig

__all__ = ["ImagesConfig", "SubjectConfig", "SubjectDataConfig", "check_subject"]


@dataclass
class ImagesConfig:
    """How a picture is shown to the encoder. What is null is as in the run, or as in ImageNet's recipes."""

    size: int | None = None
    """pixels of a side"""
    resize: int | None = None
    """shorter side before the central crop; 0: the pictures have the size already"""
    mean: list[float] | None = None
    """of each channel (images are 0 ... 1), subtracted"""
    std: list[float] | None = None
    """of each channel, divided by after that"""


@dataclass
class SubjectConfig(ComputeConfig):
    """The fields that all these commands have."""

    run: str = ""
    """a run of moco.train: its newest checkpoint, its data, its pictures' size"""
    checkpoint: str = ""
    """or a file: a checkpoint or encoder.safetensors of ours, or an official MoCo v1, v2 or v3 file"""
    weights: str = "encoder"
    """encoder, or momentum_encoder where the file has one"""
    backbone: str | None = None
    """for a file that does not say its network: a name as in model.backbone"""
    options: dict[str, Any] = field(default_factory=dict)
    """and its options as in model.options, each as +options.NAME=VALUE; empty: the file's own, or none"""
    output: str = ""
    """where results.json and pictures go; empty: into the run, beside an encoder.safetensors of ours, or into runs/NAME
    for another checkpoint=.../NAME.ending"""
    seed: int = 0
    """of all draws: labels, orders, views, first weights"""
    images_at_once: int = 512
    """through the encoder without gradient; changes memory, not results"""
    data: SubjectDataConfig = field(default_factory=SubjectDataConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)


def check_subject(config: SubjectConfig) -> None:
    """Refuses what no command of this family can run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    require(
        bool(config.run) != bool(config.checkpoint),
        "say which encoder: run=DIR for a run of moco.train, or checkpoint=FILE"
        + (f" (not both: run={config.run}, checkpoint={config.checkpoint})" if config.run else ""),
    )
    told = [f"backbone={config.backbone}"] * bool(config.backbone) + [f"options={config.options}"] * bool(
        config.options
    )
    require(
        not (config.run and told),
        f"run={config.run} says its network itself: leave {' and '.join(told)} out, or name a file, checkpoint=FILE",
    )
    one_of("weights", config.weights, ("encoder", "momentum_encoder"))
    require(0 <= config.seed < 2**64, f"seed={config.seed} must lie in 0 ... 2**64 - 1")
    at_least(1, {"images_at_once": config.images_at_once})
    require(0 <= config.data.hold_out < 1, f"data.hold_out={config.data.hold_out} must lie in 0 ... 1, and below 1")
    images = config.images
    at_least(1, {"images.size": 1 if images.size is None else images.size})
    at_least(0, {"images.resize": images.resize or 0, "data.workers": config.data.workers or 0})
    for name, three in {"mean": images.mean, "std": images.std}.items():
        require(three is None or len(three) == 3, f"images.{name}={three} must hold three numbers")
    require(images.std is None or min(images.std) > 0, f"images.std={images.std} must hold numbers above 0")
