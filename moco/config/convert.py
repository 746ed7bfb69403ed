"""The schema of `python -m moco.convert`."""

from dataclasses import dataclass

from moco.config.base import at_least, one_of, require
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
    """An encoder in another format, checked by reading it again; `data` and `images` say with which pictures."""

    to: str = ""
    """torchvision, timm, detectron2, deit, moco_v2, moco_v3, safetensors, onnx or torch_export"""
    output: str = ""
    """the file to write; its ending is the format's"""
    overwrite: bool = False
    """write over a file that is there"""
    pictures: int = 16
    """so many of the run's pictures, or of the embedded digits, must get the same features from both"""


def check_convert(config: ConvertConfig) -> None:
    """Refuses what cannot run, before any work starts.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_subject(config)
    one_of("to", config.to, tuple(ENDINGS))
    endings = ENDINGS[config.to]
    example = f"output=encoder{endings[0]}"
    require(bool(config.output), f"output='' must name the file to write, e.g. {example}")
    require(
        config.output.endswith(endings),
        f"output={config.output} must end in {' or '.join(endings)} for to={config.to}, e.g. {example}",
    )
    require(config.device != "cuda", "device=cuda: a conversion is done and checked on the CPU, set device=cpu")
    at_least(1, {"pictures": config.pictures})
