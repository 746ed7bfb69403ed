"""Load the frozen teacher of a distillation: `method.teacher`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.config import ConfigError, TrainConfig, require
from moco.config.quoting import override
from moco.data.pixel_format import RGB, per_channel
from moco.digest import digest
from moco.distributed import all_gather_object
from moco.evaluation.subject import IMAGENET
from moco.files import absent
from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.interop.image_size import fit_to_size
from moco.models.backbones import build_backbone, published_weights
from moco.models.probe import output_error
from moco.runs.directory import folder_message

Normalization = tuple[list[float], list[float]]  # mean and standard deviation of each channel


class Renormalize(nn.Module):
    """Change the normalization of images (N, C, S, S) from the run's to the teacher's."""

    scale: Tensor  # (C, 1, 1)
    shift: Tensor  # (C, 1, 1)

    def __init__(self, run: Normalization, teacher: Normalization) -> None:
        super().__init__()
        mean, std, teacher_mean, teacher_std = (per_channel(each, torch.device("cpu")) for each in (*run, *teacher))
        self.register_buffer("scale", std / teacher_std)
        self.register_buffer("shift", (mean - teacher_mean) / teacher_std)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def load_teacher(config: TrainConfig) -> nn.Module:
    """Return the teacher in evaluation mode. It maps images (N, C, S, S), normalized as in the run, to (N, model.dim).

    Collective: all ranks must have the same weights.

    Raises:
        ConfigError: if the file does not exist, if the teacher's dimension is not `model.dim`, if it takes images with
            another number of channels or range of values than the run's, or if its weights differ between ranks.
        ForeignFileError, CheckpointError, ValueError: see `moco.interop.encoder_file.read_encoder`, `fit_to_size` and
            `moco.models.backbones.build_backbone`.
    """
    method: Any = config.method
    network, images = _published(config) if method.teacher.startswith("timm/") else _from_file(config)
    size, normalization = config.augment.size, (config.augment.mean, config.augment.std)
    if normalization != images:
        network = nn.Sequential(Renormalize(normalization, images), network)
    network.eval().requires_grad_(False)
    with torch.no_grad():
        dim = network(torch.zeros(2, config.data.channels, size, size)).shape[1]
    require(
        dim == config.model.dim,
        f"model.dim={config.model.dim} is not the dimension of method.teacher={method.teacher}: set model.dim={dim}",
    )
    first, *others = all_gather_object(lambda: digest(network.state_dict()))
    require(
        all(other == first for other in others),
        f"method.teacher={method.teacher} has other weights on another rank: give every machine the same file",
    )
    if config.compile:
        network.compile()
    return network


def _published(config: TrainConfig) -> tuple[nn.Module, Normalization]:
    """Return a model of timm with its published weights, and the mean and standard deviation of its images."""
    method: Any = config.method
    _check_images(config, RGB.channels, RGB.dtype)
    network: Any = build_backbone(method.teacher, {"pretrained": True} | method.teacher_options)
    if error := output_error(network, config.augment.size, config.data.channels):
        raise ForeignFileError(
            f"method.teacher={method.teacher} does not fit augment.size={config.augment.size}: {error}; set "
            f"+method.teacher_options.img_size={config.augment.size} for a ViT, or another augment.size"
        )
    images = network.pretrained_cfg
    return network, (list(images["mean"]), list(images["std"]))


def _check_images(config: TrainConfig, channels: int, dtype: str) -> None:
    """Refuse a teacher for images with another number of channels, or range of values, than those of the run."""
    method: Any = config.method
    data, teacher = config.data, f"method.teacher={method.teacher}"
    require(
        data.channels == channels,
        f"{teacher} takes images of {channels} channels, and data.channels={data.channels}: name a teacher that was "
        f"trained on {data.channels} channels",
    )
    scaled = [each != "float32" for each in (data.dtype, dtype)]  # integers are scaled to 0 ... 1
    require(
        scaled[0] == scaled[1],
        f"{teacher} was trained on images of {dtype}, and data.dtype={data.dtype} has another range of values: name a "
        f"teacher that was trained on images of {data.dtype}",
    )


def _from_file(config: TrainConfig) -> tuple[nn.Module, Normalization]:
    """Return the network in a file, and the mean and standard deviation of its images.

    The network is the encoder if method.teacher_features=projection, otherwise only the encoder's backbone.
    """
    method: Any = config.method
    path = Path(method.teacher)
    if path.is_dir():
        raise ConfigError(folder_message(path, "method.teacher"))
    state = absent(path)
    if not path.exists() and len(path.parts) == 1 and published_weights(path.name):
        state = f"is the name of a network: write method.teacher=timm/{path.name} for its published weights"
    require(path.is_file(), f"method.teacher={path} {state}")
    named = method.teacher_backbone or None, method.teacher_options or None
    file = read_encoder(path, method.teacher_weights, *named)
    given = method.teacher_backbone
    require(
        given in ("", file.backbone), f"{path} has backbone={file.backbone}: remove method.teacher_backbone={given}"
    )
    projection = method.teacher_features == "projection"
    require(
        not projection or bool(file.head_weights),
        f"method.teacher_features=projection, but {path} holds no projection head: set "
        "method.teacher_features=backbone",
    )
    _check_images(config, file.channels, file.config.get("data", {}).get("dtype", RGB.dtype))
    encoder = build(fit_to_size(file, config.augment.size, "augment.size"))
    images = IMAGENET | file.images  # not every file records its mean and std
    require(
        len(images["mean"]) == file.channels,
        f"method.teacher={path} records no mean and std of its {file.channels} channels: write a file that has them, "
        f"with python -m moco.convert {override('checkpoint', path)} to=safetensors 'images.mean=[...]' "
        "'images.std=[...]'",
    )
    return encoder if projection else encoder.get_submodule("backbone"), (images["mean"], images["std"])
