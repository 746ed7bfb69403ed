"""The fields that several commands share: the encoder to evaluate or use, and its data."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import ComputeConfig, bounded, check_bounds, refuse_on_mps, require
from moco.config.data import SubjectDataConfig


@dataclass
class ImagesConfig:
    """The preparation of images for the encoder.

    A null field has the value of the run or of the checkpoint file, or ImageNet's value if neither has one.
    """

    size: int | None = bounded(None, ge=1, le=65_536)
    """Side of the input images in pixels."""
    resize: int | None = bounded(None, ge=0, le=65_536)
    """Shorter side in pixels to which an image is resized before the central crop of images.size pixels; 0: the
    shorter side is resized to images.size."""
    mean: list[float] | None = bounded(None, min_length=1)
    """Mean of each channel, subtracted from the pixels, which are in 0 ... 1 unless data.dtype=float32."""
    std: list[float] | None = bounded(None, gt=0, min_length=1)
    """Standard deviation of each channel, by which pixels are divided after the mean is subtracted."""


@dataclass
class EncoderConfig(ComputeConfig):
    """The encoder to use and the output."""

    run: str = bounded("", path=True)
    """Directory of a run of moco.train. Its newest checkpoint is used."""
    checkpoint: str = bounded("", path=True)
    """A file instead of a run: a checkpoint of moco.train, encoder.safetensors, a file of another project such as
    official MoCo, or `hf://USER/REPOSITORY[@REVISION][/FILE]`, a file on the Hugging Face Hub (FILE is
    model.safetensors by default)."""
    weights: str = bounded("encoder", choices=("encoder", "momentum_encoder"))
    """The encoder of the checkpoint to use: encoder, or momentum_encoder if the checkpoint holds one."""
    backbone: str | None = None
    """The architecture of the backbone, a value of model.backbone. Null: the architecture that the file names. For a
    run or a checkpoint of moco.train, no other architecture can be set, nor other `options`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone's constructor, each as +options.NAME=VALUE. Empty: the arguments saved in the
    checkpoint, if it has any."""
    output: str = bounded("", path=True)
    """Directory for results.json and figures. Empty: the run's directory; for an encoder.safetensors of moco.train, the
    directory of that file; for any other checkpoint=.../NAME.ending, runs/NAME."""
    seed: int = bounded(0, ge=0, lt=2**64)
    """Seed of the random choices of this command, such as subsets of the labeled images, the order and the views of the
    images, and initial weights. The images of data.hold_out (masks.hold_out, boxes.hold_out) do not depend on it."""


@dataclass
class SubjectConfig(EncoderConfig):
    """The encoder to use, its data and the output."""

    images_at_once: int = bounded(512, ge=1)
    """Images per forward pass of the frozen encoder. It affects memory, not results."""
    precision: str = bounded("fp32", choices=("fp32", "bf16"))
    """Number format in which the encoder computes. bf16 (bfloat16) is faster on GPUs and CPUs that have units for it;
    it rounds to 8 significant bits, so results differ slightly from those in fp32."""
    on_bad_image: str = bounded("stop", choices=("stop", "skip"))
    """On unreadable images: stop (the command ends and names the image), or skip (they are left out and listed)."""
    data: SubjectDataConfig = field(default_factory=SubjectDataConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)


def check_subject(config: EncoderConfig) -> None:
    """Raise ConfigError unless all fields are within their bounds, and either run or checkpoint names the encoder."""
    check_bounds(config)
    require(bool(config.run or config.checkpoint), "no encoder: set run=DIR (a run of moco.train) or checkpoint=FILE")
    require(
        not (config.run and config.checkpoint),
        f"run={config.run} and checkpoint={config.checkpoint} both name an encoder: remove one of them",
    )
    if isinstance(config, SubjectConfig):
        refuse_on_mps(config, *[f"precision={config.precision}"] * (config.precision != "fp32"))
