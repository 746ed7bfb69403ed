"""The configuration of `python -m moco.convert`."""

import re
from dataclasses import dataclass

from moco.config.base import REPOSITORY, bounded, require
from moco.config.data import refuse_hold_out
from moco.config.subject import SubjectConfig, check_subject

# The endings of a file that each format accepts.
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
    "hub": ("",),  # a folder
}


@dataclass
class ConvertConfig(SubjectConfig):
    """Write an encoder in another format, and check the file by reading it again."""

    to: str = bounded("", choices=tuple(ENDINGS))
    """Format of the file. `python -m moco.convert --help` lists the networks that each format supports."""
    output: str = bounded("", path=True)
    """File to write. Its name must end as the format requires, e.g. encoder.onnx for to=onnx. For to=hub: folder to
    write."""
    overwrite: bool = False
    """Replace an existing file. For to=hub, other files in the folder `output` are kept."""
    upload: str = bounded("", example="upload=me/my-encoder")
    """For to=hub: the repository USER/NAME on the Hugging Face Hub to which the folder is uploaded. A repository that
    does not exist is created, as a private one. Empty: nothing is uploaded."""
    public: bool = False
    """Create the repository of `upload` as a public one. To upload to a repository that is already public, public=true
    is required too."""
    pictures: int = bounded(16, ge=1)
    """Number of images on which the features of the written file are compared with those of the encoder. The images
    come from `data` or from the data set of the run. If neither is available, they are digits from scikit-learn, or
    random numbers if the encoder does not take RGB images."""


def check_convert(config: ConvertConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_subject(config)
    endings, hub = ENDINGS[config.to], config.to == "hub"
    require(not hub or bool(config.output), "output='' must name a folder for to=hub, e.g. output=my_encoder")
    required = f"must be a file that ends in {' or '.join(endings)} for to={config.to}, e.g. output=encoder{endings[0]}"
    require(config.output.endswith(endings), f"output={config.output!r} {required}")
    refuse_hold_out(config.data)
    stop = config.on_bad_image == "stop"
    require(stop, f"on_bad_image={config.on_bad_image} has no effect in this command: remove it")
    exact = config.precision == "fp32"
    require(exact, f"precision={config.precision} has no effect in this command: remove it")
    require(hub or not config.upload, f"upload={config.upload} needs to=hub, not to={config.to}")
    require(bool(config.upload) or not config.public, "public=true needs upload=USER/NAME")
    named = not config.upload or re.fullmatch(REPOSITORY, config.upload)
    require(bool(named), f"upload={config.upload!r} must be USER/NAME, e.g. upload=me/my-encoder")
    error = f"device={config.device}: a conversion runs on the CPU, set device=cpu"
    require(config.device in ("auto", "cpu"), error)
