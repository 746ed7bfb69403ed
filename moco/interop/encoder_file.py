"""Read an encoder from a file: its network, its weights, and how images are preprocessed for it.

Checkpoints and encoder.safetensors of this project describe themselves. Files of other projects are recognized by the
names of their weights, see `moco.interop.foreign`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moco.config.types import check_saved, type_error
from moco.data.pixel_format import RGB
from moco.files import absent, cause
from moco.interop.foreign import LAYOUTS, OFFICIAL, PLAIN, Layout, Part, State, flat, has_small_stem, parts, under
from moco.interop.weights import load_weights, save_weights
from moco.models.backbones import build_backbone, published_preprocessing, with_channels
from moco.models.encoder import Encoder, projection_head
from moco.models.first_layer import first_convolution
from moco.plugins import naming_plugins
from moco.runs import checkpoint
from moco.runs.weights_file import CodeRefused, read_weights
from moco.untrusted import parse_json

# timm's options for loading published weights, which the file's weights replace
LOADING_OPTIONS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
# JSON texts in the metadata of encoder.safetensors
_METADATA: dict[str, Any] = {
    "options": Mapping,
    "images": {"size": int, "resize": int, "mean": list, "std": list},
    "config": Mapping,
}
_NO_NETWORK = "does not name its network: set backbone=NAME, e.g. backbone=resnet50"
_NO_MOMENTUM_ENCODER = "holds no momentum encoder: set weights=encoder"


class ForeignFileError(ValueError):
    """A file from which no encoder can be read; the message is one sentence."""


@dataclass(frozen=True)
class EncoderFile:
    """The content of an encoder file."""

    source: str  # the path
    layout: str  # name of the format of the file, for messages
    backbone: str
    options: dict[str, Any]
    weights: dict[str, Tensor]  # of the backbone
    head_weights: dict[str, Tensor] = field(default_factory=dict)  # of the projection head; empty: no head
    step: int = 0  # optimizer steps of its training; 0: unknown
    images: dict[str, Any] = field(default_factory=dict)  # size, resize, mean and std of evaluation
    config: dict[str, Any] = field(default_factory=dict)  # of the run; empty in files of other projects
    predictor: dict[str, Tensor] = field(default_factory=dict)  # weights of the predictor, as in MoCo v3
    queue: Tensor | None = None  # (K, C), keys of images
    oldest: int = 0  # the row of the oldest key
    unused: tuple[str, ...] = ()  # names of parts of the file whose weights are not used
    channels: int = 3  # of the images
    epoch: int = 0  # epochs of its training, in files of other projects; 0: unknown

    @property
    def seed(self) -> int:
        """The seed of the run's initial weights; 0 in files of other projects."""
        return int(self.config.get("seed", 0))

    @property
    def used_labels(self) -> bool:
        """Whether the encoder was trained with labels, as far as the file tells."""
        return bool(self.config.get("finetuned") or self.config.get("method", {}).get("labels"))

    @property
    def trained(self) -> str:
        """How long the encoder was trained, as ", step 300" or ", epoch 200", to append to its name; "" if unknown."""
        return f", step {self.step}" if self.step else f", epoch {self.epoch}" * bool(self.epoch)

    @property
    def has_v3_head(self) -> bool:
        """Whether the projection head has BN, as in MoCo v3 and NNCLR."""
        return any(name.endswith("running_mean") for name in self.head_weights)


def read_encoder(
    path: Path, weights: str = "encoder", backbone: str | None = None, options: dict[str, Any] | None = None
) -> EncoderFile:
    """Read a file of any known layout. Only tensors and plain values are loaded, no code is run.

    Args:
        weights: "encoder" (f_q, which MoCo v3 calls the base encoder), or "momentum_encoder".
        backbone, options: the network of a file that does not name it. `options` also replace those in .safetensors.

    Raises:
        FileNotFoundError: if the file does not exist.
        ForeignFileError, CheckpointError: if it cannot be read, has an unknown layout, or does not name its network.
        ValueError: for an unknown backbone or option.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint={path} {absent(path)}")
    if path.suffix == ".safetensors":
        if weights != "encoder":
            raise ForeignFileError(f"{path} is a .safetensors file, which holds one encoder: set weights=encoder")
        return _safetensors(path, backbone, options)
    state = _load(path)
    if "method" in state and "config" in state:
        return _ours(path, checkpoint.verify(path, state), weights)
    return _foreign(path, state, weights, backbone, options or {})


def build(file: EncoderFile, seed: int | None = None) -> Encoder:
    """Build the encoder in eval mode with the file's weights, or with random weights from a seed.

    Without a projection head in the file, the head is `nn.Identity`.

    Raises:
        ForeignFileError: if a weight is missing, unknown, of another shape or not finite, or if the network cannot be
            built.
        ValueError: for an unknown backbone or option.
    """
    complaints = (
        f"{file.source} ({file.layout}) does not fit backbone={file.backbone}",
        f"the projection head in {file.source} is unknown",
    )
    if seed is None:  # compare the shapes before memory is allocated for them
        with torch.device("meta"):
            _refuse_misfit(_backbone(file), file.weights, complaints[0])
            _refuse_misfit(_head(file), file.head_weights, complaints[1])
    else:
        torch.manual_seed(seed)
    backbone, head = _backbone(file), _head(file)
    if seed is None:
        backbone.load_state_dict(file.weights, strict=False)
        head.load_state_dict(file.head_weights, strict=False)
    return Encoder(backbone, head).eval().requires_grad_(False)


def _backbone(file: EncoderFile) -> nn.Module:
    options = {name: value for name, value in file.options.items() if name not in LOADING_OPTIONS}
    try:
        with naming_plugins(file.source, file.config):
            return build_backbone(file.backbone, with_channels(options, file.channels), group="")
    except (RuntimeError, MemoryError) as error:
        network = f"backbone={file.backbone} with {options}"
        raise ForeignFileError(f"{file.source}: {network} cannot be built ({cause(error)})") from error


def _head(file: EncoderFile) -> nn.Module:
    if not file.head_weights:
        return nn.Identity()
    shapes = [tuple(value.shape) for value in file.head_weights.values() if value.dim() == 2]
    if not shapes:
        raise ForeignFileError(f"the projection head in {file.source} is unknown: {_some(file.head_weights)}")
    hidden = shapes[0][0] if len(shapes) > 1 else 0
    return projection_head(shapes[0][1], hidden, shapes[-1][0], len(shapes), file.has_v3_head)


def save_encoder(path: Path, backbone: nn.Module | State, config: Mapping[str, Any], step: int) -> None:
    """Write encoder.safetensors: the weights of a backbone, with metadata for `read_encoder`.

    `backbone` is the network or its state dict. `config` is the configuration of the run, with the groups "model" and
    "augment". `step` is the number of optimizer steps of the run.
    """
    model = config["model"]
    about = {"options": model["options"], "images": images_of(config), "config": dict(config)}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    weights = backbone.state_dict() if isinstance(backbone, nn.Module) else backbone
    save_weights(path, weights, metadata | {"backbone": model["backbone"], "step": str(step)})


def load_all(module: nn.Module, weights: State, complaint: str) -> None:
    """Load all weights of a module.

    Raises:
        ForeignFileError: if a weight is missing, unknown, of another shape or not finite; nothing is loaded then. The
            message begins with `complaint`.
    """
    _refuse_misfit(module, weights, complaint)
    module.load_state_dict(dict(weights), strict=False)


def _refuse_misfit(module: nn.Module, weights: State, complaint: str) -> None:
    """Raise the errors of `load_all`; the module may be on the meta device."""
    wanted, found = _shapes(module.state_dict()), _shapes(weights)
    common = sorted(wanted.keys() & found.keys())
    if invalid := [name for name in common if not is_valid(weights[name])]:
        raise ForeignFileError(
            f"{complaint}: {len(invalid)} weights are not finite numbers in a plain floating-point tensor "
            f"({_some(invalid)})"
        )
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = [f"{name} is {found[name]}, not {wanted[name]}" for name in common if wanted[name] != found[name]]
    problems = [
        f"{len(missing)} of {len(wanted)} weights are missing ({_some(missing)})" if missing else "",
        f"{len(extra)} weights in the file are unknown ({_some(extra)})" if extra else "",
        f"{len(reshaped)} have another shape ({_some(reshaped, 2)})" if reshaped else "",
    ]
    if any(problems):
        none = "no weight matches: " if wanted and len(missing) + len(reshaped) == len(wanted) else ""
        raise ForeignFileError(f"{complaint}: {none}{'; '.join(filter(None, problems))}")


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def is_valid(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain one of finite floating-point numbers."""
    plain = tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_meta
    return plain and bool(torch.isfinite(tensor).all())


def _some(names: Any, limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _refuse_unknown_heads(path: Path, backbone: str) -> None:
    """Refuse a ViT-S in a layout that does not state its number of attention heads: any number fits the weights."""
    if backbone == "vit_small":
        raise ForeignFileError(
            f"{path} does not state how many heads its ViT has: set backbone=timm/vit_small_patch16_224 for a ViT-S of "
            "timm or DeiT, which has 6 heads; for one of MoCo v3, which has 12, also set +options.num_heads=12"
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        state = read_weights(path)
    except CodeRefused as error:
        raise ForeignFileError(
            f"{path} is refused: torch cannot load it with weights_only=True (which runs no code), e.g. because it is "
            "damaged, is not a file of weights, or holds code; save only its state dict, with torch.save's default "
            "pickle_protocol, or use safetensors"
        ) from error
    if not isinstance(state, dict):
        raise ForeignFileError(
            f"{path} holds a {type(state).__name__}, not a dict of weights: save the network's state_dict()"
        )
    return state


def _ours(path: Path, state: dict[str, Any], weights: str) -> EncoderFile:
    try:
        config = with_bits(_checked_config(state["config"]), state.get("bits"))
        method, model = state["method"], config["model"]
        backbone, head = (under(prefix, method) for prefix in (f"{weights}.backbone.", f"{weights}.head."))
        name, options, step = str(model["backbone"]), dict(model["options"]), state["step"]
        images = _checked_images(images_of(config))
        keys, count = method.get("queue.keys"), _integer(method.get("queue.count")) or 0
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ForeignFileError(
            f"{path} is not a complete checkpoint of moco.train ({cause(error)}): name another file"
        ) from error
    if not backbone:
        raise ForeignFileError(f"{path} {_NO_MOMENTUM_ENCODER}")
    file = EncoderFile(str(path), "checkpoint of moco.train", name, options, backbone, head, step, images, config)
    file = replace(file, channels=len(images["mean"]))
    if keys is not None and 0 < len(keys) <= count:
        file = replace(file, queue=keys, oldest=count % len(keys))
    return replace(file, predictor=under("predictor.", method))


def _checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration from a file; raise ValueError if a value has another type than its field."""
    check_saved(config)
    return dict(config)


def with_bits(config: Mapping[str, Any], bits: Any) -> dict[str, Any]:
    """Return a run's configuration with `data.bits` set to `bits`, the number that the run derived from its images.

    The configuration stays unchanged if it states data.bits, or if `bits` is not a number from 8 to 15.
    """
    data = config.get("data", {})
    known = data.get("bits") is not None or type(bits) is not int or not 8 <= bits < RGB.bits
    return dict(config) if known else {**config, "data": {**data, "bits": bits}}


def _checked_images(images: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of images that a file states; raise ValueError if a value is out of range."""
    channels = [images.get(name, [1, 1, 1]) for name in ("mean", "std")]
    numbers = len(channels[0]) == len(channels[1]) > 0 and all(
        all(type(x) in (int, float) and math.isfinite(x) for x in each) for each in channels
    )
    sizes = images.get("size", 1) >= 1 and (images.get("resize") or 0) >= 0
    if not (numbers and sizes and min(channels[1]) > 0):
        raise ValueError(f"its size, resize, mean or std of images is out of range ({dict(images)})")
    return dict(images)


def _foreign(
    path: Path, state: Mapping[str, Any], weights: str, backbone: str | None, options: dict[str, Any]
) -> EncoderFile:
    tensors = flat(state)
    if not tensors:
        raise ForeignFileError(f"{path} holds no weights (keys: {_some(state)}): name the state dict of a network")
    found = list(parts(tensors, weights != "encoder"))
    if not found:
        raise ForeignFileError(f"{path} {_NO_MOMENTUM_ENCODER}")
    name = backbone or state.get("arch")  # official files use the same names as this project
    if not isinstance(name, str):
        raise ForeignFileError(f"{path} {_NO_NETWORK}")
    layout, body, head, others, known = _most_complete(found, EncoderFile(str(path), "", name, options, {}), tensors)
    official = layout in OFFICIAL
    if backbone and not official:
        _refuse_unknown_heads(path, backbone)
    if has_small_stem(body) and not (official or known or layout == PLAIN):
        raise ForeignFileError(
            f"{path} ({layout.name}) has a 3x3 first convolution of unknown padding (solo-learn pads by 2, which no "
            "backbone here does): if it is 1, save only the backbone's state dict and set +options.stem=cifar"
        )
    file = EncoderFile(str(path), layout.name, name, known | options, body)
    epoch = state.get("epoch")
    file = replace(file, channels=_channels(file), epoch=epoch if type(epoch) is int and epoch > 0 else 0)
    if not official:
        images = published_preprocessing(name) if layout.of_timm else {}
        return replace(file, unused=_parts_of([*others, *head], layout), images=images)
    head = {key.split(".", 1)[1]: value for key, value in head.items()}
    if set(head) == {"weight", "bias"}:  # v1 has one linear layer, without a number
        head = {f"0.{key}": value for key, value in head.items()}
    keys, pointer = others.pop("queue", None), _integer(others.pop("queue_ptr", None))
    if keys is not None and keys.dim() == 2 and pointer is not None:
        file = replace(file, queue=keys.T, oldest=pointer)  # official files store (C, K)
    predictor = under("predictor.", others)
    unused = _parts_of(others.keys() - {f"predictor.{name}" for name in predictor}, layout)
    return replace(file, head_weights=head, predictor=predictor, unused=unused)


def _channels(file: EncoderFile) -> int:
    """Return the number of channels of the images, for a file that does not state it: that of the first convolution.

    The number is 3 if the first convolution is not known.
    """
    try:
        with torch.device("meta"):
            first = first_convolution(_backbone(file))
    except ForeignFileError:  # the network cannot be built on the meta device
        return 3
    weight = file.weights.get(f"{first[0]}.weight") if first else None
    return int(weight.shape[1]) if weight is not None and weight.dim() == 4 else 3


def _parts_of(names: Iterable[str], layout: Layout) -> tuple[str, ...]:
    """Return the parts to which weights belong: the first components of their names, e.g. `student`.

    A part has two components, e.g. `teacher.head`, if the names of the encoder's weights begin with the first one.
    """
    split = (name.replace(".module.", ".").split(".") for name in names)
    shared = layout.encoder.split(".")[0]
    return tuple(sorted({".".join(each[: 1 + (each[0] == shared)]) for each in split}))


def _most_complete(found: list[Part], file: EncoderFile, tensors: State) -> Part:
    """Return the part whose names fit the file's network best, or the first of equally good parts."""
    try:
        with torch.device("meta"):
            wanted = _shapes(_backbone(file).state_dict()).keys()
    except ForeignFileError:  # the network cannot be built on the meta device
        return found[0]
    if wanted and all(wanted.isdisjoint(each.backbone) for each in found):
        known = ", ".join(each.name for each in (*LAYOUTS, PLAIN))
        raise ForeignFileError(
            f"{file.source} has no weight of backbone={file.backbone} in any known layout ({known}): its names are "
            f"{_some(tensors)}; set backbone to its network, or save only the network's state dict"
        )
    return min(found, key=lambda each: len(wanted ^ _shapes(each.backbone).keys()))


def _integer(tensor: Tensor | None) -> int | None:
    """Return the value of an integer tensor with one element; None for anything else."""
    if tensor is None or tensor.numel() != 1 or tensor.dtype != torch.int64 or tensor.is_meta:
        return None
    return int(tensor)


def images_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a run preprocesses images for evaluation."""
    augment = config["augment"]
    return {"size": augment["size"], "resize": augment["eval_resize"], "mean": augment["mean"], "std": augment["std"]}


def _safetensors(path: Path, backbone: str | None, options: dict[str, Any] | None) -> EncoderFile:
    try:
        about, weights = load_weights(path)
        metadata = {name: parse_json(about[name]) for name in _METADATA if name in about}
        if error := type_error("", metadata, _METADATA, exact=True):
            raise ValueError(f"in its metadata, {error}")
        config, images = _checked_config(metadata.get("config", {})), _checked_images(metadata.get("images", {}))
        step = int(about.get("step", 0))
    except (SafetensorError, OSError, ValueError) as error:
        raise ForeignFileError(f"{path} cannot be read as safetensors ({cause(error)})") from error
    if "backbone" not in about:
        return _foreign(path, weights, "encoder", backbone, options or {})
    name, chosen = about["backbone"], options if options is not None else metadata.get("options", {})
    channels = len(images.get("mean", (0, 0, 0)))
    return EncoderFile(str(path), "safetensors", name, chosen, weights, {}, step, images, config, channels=channels)
