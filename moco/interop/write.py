"""Write an encoder in formats of this and other projects: the backbone, and in official MoCo files also the head.

Each format has a function that writes a file, and a function that reads this file again without the writer's code. The
reader uses torchvision, timm, torch.export or onnxruntime if one of these can read the file, otherwise code of this
project. So a conversion is checked before its file is kept.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn

import moco
from moco.files import write_json
from moco.interop.detectron2 import load_detectron2, save_detectron2
from moco.interop.encoder_file import LOADING_OPTIONS, EncoderFile, build, load_all, read_encoder, save_encoder
from moco.interop.exported import Features, load_exported, load_onnx, save_exported, save_onnx
from moco.interop.foreign import State
from moco.interop.hub import SETTINGS, WEIGHTS
from moco.interop.model_card import shareable
from moco.interop.weights import save_weights

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_OFFICIAL_VITS = ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base")
# options that do not change the features of a network with trained weights
_UNUSED = ("freeze_patches", "drop_path_rate", "zero_init_residual", *LOADING_OPTIONS)
_DEIT_NAMES = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))"
    r"\.(weight|bias)"
)


class Read(NamedTuple):
    """The content of a written file."""

    network: Features
    weights: State  # under the names of the source; empty for a simplified graph (ONNX)


@dataclass(frozen=True)
class Format:
    """A format to which an encoder can be converted."""

    holds: str  # the networks that it supports, as text
    # returns the network's name in the format, or a call that builds it; None if the format cannot hold it
    network: Callable[[EncoderFile], str | None]
    # writes to a path, given the source file (with `images`) and its backbone in eval mode on the CPU
    write: Callable[[Path, EncoderFile, nn.Module], None]
    # reads the written file; given the source file for the backbone, options and channels, not for its weights
    read: Callable[[Path, EncoderFile], Read]
    load: str  # how to load FILE, whose network is NETWORK
    fixed_size: bool = False  # whether the file computes features of images of one size only
    folder: bool = False  # whether the output is a folder
    tolerance: float = 1e-5  # largest difference between features, as a fraction of the largest feature

    def fits(self, file: EncoderFile) -> bool:
        """Return whether the format can hold this network."""
        return self.network(file) is not None

    def loading(self, file: EncoderFile) -> str:
        """Return a line that loads FILE."""
        return self.load.replace("NETWORK", self.network(file) or "")


def torchvision_name(file: EncoderFile) -> str | None:
    """Return the name of the identical torchvision ResNet, or None. All ResNets of torchvision take three channels."""
    return _resnet_name(file) if file.channels == 3 else None


def _resnet_name(file: EncoderFile) -> str | None:
    """Return the name of the torchvision ResNet that is identical except for the channels of its images, or None."""
    name = file.backbone.removeprefix("timm/")
    options = _options(file)
    plain = not options or (options == {"stem": "imagenet"} and name == file.backbone)
    return name if name in _RESNETS and plain else None


def timm_name(file: EncoderFile) -> tuple[str, dict[str, Any]] | None:
    """Return name and options of the identical timm model, or None."""
    channels = {} if file.channels == 3 else {"in_chans": file.channels}
    if (resnet := _resnet_name(file)) is not None:
        return resnet, channels
    options = _options(file) | channels
    if file.backbone.startswith("timm/"):
        return file.backbone.removeprefix("timm/"), options
    if file.backbone == "vit_small" and "stem" not in options:
        return "vit_small_patch16_224", {"num_heads": 12} | options
    if file.backbone == "vit_base" and "stem" not in options:
        return "vit_base_patch16_224", options
    return None


def official_v3_name(file: EncoderFile) -> str | None:
    """Return the `arch` in facebookresearch/moco-v3, or None."""
    standard = file.channels == 3 and _options(file).items() <= {"img_size": 224, "patch_size": 16}.items()
    return file.backbone if file.backbone in _OFFICIAL_VITS and standard else torchvision_name(file)


def _timm_call(file: EncoderFile) -> str | None:
    """Return the expression that builds the identical timm model, or None."""
    name, options = timm_name(file) or (None, {})
    arguments = ", ".join([repr(name), "num_classes=0", *(f"{key}={value!r}" for key, value in options.items())])
    return f"timm.create_model({arguments})" if name else None


def _deit_call(file: EncoderFile) -> str | None:
    """Return the same as `_timm_call` for a plain ViT as in DeiT, otherwise None."""
    return _timm_call(file) if all(_DEIT_NAMES.fullmatch(name) for name in file.weights) else None


def _options(file: EncoderFile) -> dict[str, Any]:
    return {name: value for name, value in file.options.items() if name not in _UNUSED}


def _state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in backbone.state_dict().items()}


def _load(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def _save(path: Path, value: dict[str, Any]) -> None:
    with path.open("wb") as file:  # with a path, torch's writer reports a full disk without the system's error
        torch.save(value, file)


def _write_state(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
    if path.suffix == ".safetensors":
        save_weights(path, _state(backbone))
    else:
        _save(path, _state(backbone))


def _write_moco_v2(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
    head = {} if file.has_v3_head else file.head_weights
    if head.keys() == {"0.weight", "0.bias"}:
        head = {key.removeprefix("0."): value for key, value in head.items()}  # v1's only layer has no number
    _write_official(path, file, torchvision_name(file), "encoder_q", _state(backbone) | _prefixed("fc.", head))


def _write_moco_v3(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
    head = _prefixed("fc." if torchvision_name(file) else "head.", file.head_weights if file.has_v3_head else {})
    _write_official(path, file, official_v3_name(file), "base_encoder", _state(backbone) | head)


def _prefixed(prefix: str, weights: State) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone() for name, value in weights.items()}


def _write_official(path: Path, file: EncoderFile, arch: str | None, encoder: str, weights: State) -> None:
    state = _prefixed(f"module.{encoder}.", weights)
    _save(path, {"epoch": file.config.get("epochs", file.epoch), "arch": arch, "state_dict": state})


def _write_safetensors(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
    images = {"eval_resize" if name == "resize" else name: value for name, value in file.images.items()}
    config = file.config | {
        "model": file.config.get("model", {}) | {"backbone": file.backbone, "options": file.options},
        "augment": file.config.get("augment", {}) | images,
    }
    save_encoder(path, backbone, config, file.step)


def _write_hub(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
    path.mkdir()
    shared = replace(file, config=shareable(file.config))
    _write_safetensors(path / WEIGHTS, shared, backbone)
    about = {name: getattr(file, name) for name in ("backbone", "options", "step", "images")}
    write_json(path / SETTINGS, timm_settings(file) | {"moco": about | {"version": moco.__version__}})


def timm_settings(file: EncoderFile) -> dict[str, Any]:
    """Return what timm's `create_model` reads from config.json of a repository; empty if timm has no such model."""
    import timm  # costs a second at start-up

    name, options = timm_name(file) or (None, {})
    if name is None:
        return {}
    with torch.device("meta"):
        network: Any = timm.create_model(name, num_classes=0, **options)
    published, size, resize = network.pretrained_cfg, file.images["size"], file.images["resize"]
    kept = ("first_conv", "classifier", "fixed_input_size")
    images = {
        "input_size": [file.channels, size, size],
        "mean": list(file.images["mean"]),
        "std": list(file.images["std"]),
    }
    crop = {"crop_pct": _crop_pct(size, resize or size), "crop_mode": "center", "interpolation": "bilinear"}
    return {
        "architecture": published["architecture"],
        "num_classes": 0,
        "num_features": network.num_features,
        "model_args": options,
        "pretrained_cfg": {key: published[key] for key in kept if key in published} | images | crop,
    }


def _crop_pct(size: int, resize: int) -> float:
    """Return the `crop_pct` with which timm resizes the shorter side to `resize`: to floor(size / crop_pct)."""
    part = size / resize
    return part if math.floor(size / part) == resize else math.nextafter(part, 0)


def _read_hub(path: Path, file: EncoderFile) -> Read:
    if timm_name(file) is None:
        return _read_ours(path / WEIGHTS, file)
    import timm  # costs a second at start-up

    network = timm.create_model(f"local-dir:{path}", pretrained=True)
    return Read(network.eval().requires_grad_(False), network.state_dict())


def _torchvision(file: EncoderFile, state: State, path: Path) -> Read:
    network: Any = torchvision.models.get_model(torchvision_name(file) or "", weights=None)
    network.fc = nn.Identity()
    return _loaded(network, state, path)


def _timm(file: EncoderFile, state: State, path: Path) -> Read:
    import timm  # costs a second at start-up

    name, options = timm_name(file) or ("", {})
    return _loaded(timm.create_model(name, num_classes=0, **options), state, path)


def _loaded(network: nn.Module, state: State, path: Path) -> Read:
    load_all(network, state, f"{path.name} does not fit")
    return Read(network.eval().requires_grad_(False), network.state_dict())


def _read_ours(path: Path, file: EncoderFile) -> Read:
    network = build(read_encoder(path)).get_submodule("backbone")
    return Read(network, network.state_dict())


_RESNETS_AS_PUBLISHED = "torchvision's ResNets with their own stem"

FORMATS: dict[str, Format] = {
    "torchvision": Format(
        _RESNETS_AS_PUBLISHED,
        torchvision_name,
        _write_state,
        lambda path, file: _torchvision(file, _load(path), path),
        "network = torchvision.models.NETWORK(); network.load_state_dict(torch.load('FILE'), strict=False)  "
        "# fc is not loaded",
    ),
    "timm": Format(
        f"timm's models, {_RESNETS_AS_PUBLISHED}, and vit_small and vit_base",
        _timm_call,
        _write_state,
        lambda path, file: _timm(file, _load(path), path),
        "network = NETWORK; network.load_state_dict(timm.models.load_state_dict('FILE'))",
    ),
    "detectron2": Format(
        _RESNETS_AS_PUBLISHED,
        torchvision_name,
        lambda path, file, backbone: save_detectron2(path, _state(backbone)),
        lambda path, file: _torchvision(file, load_detectron2(path), path),
        "MODEL.WEIGHTS FILE, with INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False and MODEL.PIXEL_MEAN and _STD "
        "of 255 x mean and std",
    ),
    "deit": Format(
        "plain ViTs that timm knows",
        _deit_call,
        lambda path, file, backbone: _save(path, {"model": _state(backbone)}),
        lambda path, file: _timm(file, _load(path)["model"], path),
        "network = NETWORK; network.load_state_dict(torch.load('FILE')['model'])",
    ),
    "moco_v2": Format(
        _RESNETS_AS_PUBLISHED,
        torchvision_name,
        _write_moco_v2,
        _read_ours,
        "main_lincls.py -a NETWORK --pretrained FILE, of facebookresearch/moco",
    ),
    "moco_v3": Format(
        f"{_RESNETS_AS_PUBLISHED}, and vit_small, vit_base and vit_conv_* of 224 px",
        official_v3_name,
        _write_moco_v3,
        _read_ours,
        "main_lincls.py -a NETWORK --pretrained FILE, of facebookresearch/moco-v3",
    ),
    "safetensors": Format(
        "every network",
        lambda file: file.backbone,
        _write_safetensors,
        _read_ours,
        "checkpoint=FILE in the commands that use an encoder, such as moco.knn",
    ),
    "onnx": Format(
        "every network",
        lambda file: file.backbone,
        lambda path, file, backbone: save_onnx(path, backbone, file.images),
        lambda path, file: Read(load_onnx(path), {}),
        "onnxruntime.InferenceSession('FILE').run(None, {'images': array})",
        fixed_size=True,
        tolerance=1e-4,
    ),
    "torch_export": Format(
        "every network",
        lambda file: file.backbone,
        lambda path, file, backbone: save_exported(path, backbone, file.images),
        lambda path, file: Read(*load_exported(path)),
        "torch.export.load('FILE').module()(images)",
        fixed_size=True,
    ),
    "hub": Format(
        "every network",
        lambda file: file.backbone,
        _write_hub,
        _read_hub,
        "moco.load_encoder('FILE'); its README.md shows more",
        folder=True,
    ),
}
