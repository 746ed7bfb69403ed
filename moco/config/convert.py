"""The configuration of `python -m moco.convert`."""

from dataclasses import dataclass

from moco.config.base import bounded, require
from moco.config.subject import SubjectConfig, check_subject

ENDINGS: dict[str, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt"),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "deit": (".pth",),
    "moco_v2": (".pth.tar", ".pth"),
    "moco_v3": (".pth.tar", ".pth"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
}


@dataclass
class ConvertConfig(SubjectConfig):
    """Write an encoder in another format, and check the file by reading it again."""

    to: str = bounded("", choices=tuple(ENDINGS))
    """Format of the file. `python -m moco.convert --help` lists the networks that each format supports."""
    output: str = bounded("", path=True)
    """File to write, with an ending of the format, e.g. encoder.onnx."""
    overwrite: bool = False
    """Replace an existing file."""
    pictures: int = bounded(16, ge=1)
    """Number of images for the check that encoder and file compute the same features. They come from `data` or the run;
    if neither is available, they are digits from scikit-learn."""


def check_convert(config: ConvertConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_subject(config)
    endings = ENDINGS[config.to]
    required = f"must be a file that ends in {' or '.join(endings)} for to={config.to}, e.g. output=encoder{endings[0]}"
    require(config.output.endswith(endings), f"output={config.output!r} {required}")
    require(config.device != "cuda", "device=cuda: a conversion runs on the CPU, set device=cpu")
