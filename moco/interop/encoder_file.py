"""An encoder in a file: what network it is, its weights, and what the file says of pictures and data.

Layouts, told apart by their keys: checkpoints and encoder.safetensors of ours; facebookresearch/moco v1 and v2
(`module.encoder_q.*`); facebookresearch/moco-v3 (`module.base_encoder.*`); lightly's and solo-learn's modules
(`backbone.*`); a plain state dict of a backbone, such as torchvision's and timm's.
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moco.interop.foreign import MOCO_V2, MOCO_V3, PLAIN, layout_of, torchvision_named
from moco.interop.weights import save_weights
from moco.models.backbones import build_backbone
from moco.models.encoder import Encoder, projection_head
from moco.runs import checkpoint

State = Mapping[str, Tensor]

_WRAPPERS = ("module.", "_orig_mod.")  # DDP's and torch.compile's
_CLASSIFIERS = ("fc.", "head.", "classifier.")  # of a plain supervised network: no part of the backbone
_ELSEWHERE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")  # timm's
_ONE_NETWORK = "holds one network only, no momentum encoder: set weights=encoder"


class ForeignFileError(ValueError):
    """A file that gives no encoder; its message is one sentence."""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder as a file holds it."""

    source: str  # the path
    layout: str
    backbone: str
    options: dict[str, Any]
    weights: dict[str, Tensor]  # of the backbone
    head_weights: dict[str, Tensor] = field(default_factory=dict)  # of the projection head; empty if there is none
    step: int = 0  # optimizer steps it was trained for, where the file says so
    images: dict[str, Any] = field(default_factory=dict)  # size, resize, mean, std
    config: dict[str, Any] = field(default_factory=dict)  # of the run, where it is one of ours


def read_encoder(
    path: Path, weights: str = "encoder", backbone: str | None = None, options: dict[str, Any] | None = None
) -> EncoderFile:
    """Reads a file of any known layout. Nothing in it is run: tensors and plain values only.

    Args:
        path: the file.
        weights: "encoder" (f_q; the base encoder of v3), or "momentum_encoder".
        backbone, options: the network, where the file does not say it.

    Raises:
        FileNotFoundError: if it is not there.
        ForeignFileError, CheckpointError: if it cannot be read, is none of the layouts, or does not say its network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={path} does not exist")
    if path.suffix == ".safetensors":
        if weights != "encoder":
            raise ForeignFileError(f"{path} {_ONE_NETWORK}")
        return _safetensors(path, backbone, options)
    state = _load(path)
    if "method" in state and "config" in state:
        return _ours(path, checkpoint.verify(path, state), weights)
    arch = state.get("arch")
    tensors = next((state[name] for name in ("state_dict", "model") if isinstance(state.get(name), dict)), state)
    tensors = {
        _unwrapped(name): value
        for name, value in tensors.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ForeignFileError(f"{path} holds no weights: its keys are {_some(state)}")
    layout = layout_of(tensors)
    prefix = layout.encoder if weights == "encoder" else layout.momentum_encoder
    if weights != "encoder" and not (prefix and any(key.startswith(prefix) for key in tensors)):
        raise ForeignFileError(f"{path} {_ONE_NETWORK}")
    if backbone is None:
        if not isinstance(arch, str):
            raise ForeignFileError(f"{path} does not say its network: set backbone=NAME, e.g. backbone=resnet50")
        backbone = arch  # the networks of official files have the same names here
    elif layout == PLAIN:
        _refuse_unknown_heads(path, backbone)
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    head = {key: value for key, value in inside.items() if _is_head(key)}
    body = torchvision_named({key: value for key, value in inside.items() if key not in head})
    official = layout in (MOCO_V2, MOCO_V3)
    if layout not in (MOCO_V2, MOCO_V3, PLAIN) and _has_small_stem(body):
        raise ForeignFileError(
            f"{path} ({layout.name}) has a 3x3 first convolution and does not say how that pads (solo-learn: by 2, "
            "which no backbone here does): if by 1, save the backbone's state dict alone and set options={stem: cifar}"
        )
    plain_head = {key.split(".", 1)[1]: value for key, value in head.items()} if official else {}
    if set(plain_head) == {"weight", "bias"}:  # v1's one linear layer, numbered as v2's two are
        plain_head = {f"0.{key}": value for key, value in plain_head.items()}
    return EncoderFile(str(path), layout.name, backbone, options or {}, body, plain_head)


def build(file: EncoderFile, seed: int | None = None) -> Encoder:
    """The encoder in eval mode with the file's weights, or with a seed the same network untrained.

    Its head is `nn.Identity` where the file holds none.

    Raises:
        ForeignFileError: if any weight of the backbone is missing, superfluous or of another shape.
        ValueError: for a backbone or options that do not exist.
    """
    if seed is not None:
        torch.manual_seed(seed)
    # What would fetch or open other weights is left out: all weights are the file's, or none are.
    options = {name: value for name, value in file.options.items() if name not in _ELSEWHERE}
    try:
        backbone = build_backbone(file.backbone, options)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise ForeignFileError(
            f"{file.source}: backbone={file.backbone} with {options} cannot be built ({reason})"
        ) from error
    head: nn.Module = nn.Identity()
    if file.head_weights:
        shapes = [tuple(value.shape) for value in file.head_weights.values() if value.dim() == 2]
        if not shapes:
            raise ForeignFileError(f"the projection head in {file.source} is unknown: {_some(file.head_weights)}")
        hidden = shapes[0][0] if len(shapes) > 1 else 0
        norm = any(key.endswith("running_mean") for key in file.head_weights)  # v3's
        head = projection_head(shapes[0][1], hidden, shapes[-1][0], len(shapes), norm)
    if seed is None:
        load_all(backbone, file.weights, f"{file.source} ({file.layout}) does not fit backbone={file.backbone}")
        load_all(head, file.head_weights, f"the projection head in {file.source} is unknown")
    return Encoder(backbone, head).eval().requires_grad_(False)


def save_encoder(path: Path, backbone: nn.Module, config: Mapping[str, Any], step: int) -> None:
    """Writes encoder.safetensors: the backbone's weights, and in its metadata all that `read_encoder` wants to know.

    Args:
        path: the file.
        backbone: its weights go in.
        config: of the run, with the groups "model" and "augment".
        step: optimizer steps it was trained for.
    """
    model = config["model"]
    about = {"options": model["options"], "images": images_of(config), "config": dict(config)}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    save_weights(path, backbone.state_dict(), metadata | {"backbone": model["backbone"], "step": str(step)})


def load_all(module: nn.Module, weights: State, complaint: str) -> None:
    """Loads every weight.

    Args:
        module: where to.
        weights: by name.
        complaint: how the error begins.

    Raises:
        ForeignFileError: naming what is missing, superfluous or of another shape; nothing is loaded then.
    """
    counted = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    wanted = {name: tuple(module.state_dict()[name].shape) for name in counted}
    there = {name: tuple(value.shape) for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    odd = [
        name
        for name in sorted(wanted.keys() & there.keys())
        if not _is_plain(weights[name]) or not bool(torch.isfinite(weights[name]).all())
    ]
    if odd:
        raise ForeignFileError(
            f"{complaint}: {len(odd)} weights are not finite numbers in a plain floating-point tensor ({_some(odd)})"
        )
    missing = sorted(wanted.keys() - there.keys())
    extra = sorted(there.keys() - wanted.keys())
    reshaped = [
        f"{name} is {there[name]}, not {wanted[name]}"
        for name in sorted(wanted.keys() & there.keys())
        if wanted[name] != there[name]
    ]
    if missing or extra or reshaped:
        parts = [
            f"{len(missing)} of {len(wanted)} weights are missing ({_some(missing)})" if missing else "",
            f"{len(extra)} in the file are unknown to it ({_some(extra)})" if extra else "",
            f"{len(reshaped)} have another shape ({_some(reshaped, 2)})" if reshaped else "",
        ]
        none = "no weight matches: " if wanted and len(missing) + len(reshaped) == len(wanted) else ""
        raise ForeignFileError(f"{complaint}: {none}{'; '.join(part for part in parts if part)}")
    module.load_state_dict(dict(weights), strict=False)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_meta


def _some(names: Any, limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _is_head(name: str) -> bool:
    return name.startswith(_CLASSIFIERS) and not name.startswith("head.norm.")  # ConvNeXt's: before its classifier


def _refuse_unknown_heads(path: Path, backbone: str) -> None:
    """A plain file of a ViT-S does not say its heads, and any number fits its weights."""
    if backbone == "vit_small":
        raise ForeignFileError(
            f"{path} does not say how many heads its ViT has, and backbone=vit_small is MoCo v3's, with 12: set "
            "backbone=timm/vit_small_patch16_224, which is timm's and DeiT's, with 6; for MoCo v3's weights also "
            "+options.num_heads=12"
        )


def _has_small_stem(body: State) -> bool:
    return "conv1.weight" in body and body["conv1.weight"].shape[-1] == 3


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name.replace("._orig_mod.", ".")


def _load(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle's protocol, which a refusal makes moot
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignFileError(
            f"{path} is refused: it is no file of weights, or holds code beside them (nothing was run); "
            "save its state dict alone, or as safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for one damaged file
        raise ForeignFileError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ForeignFileError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def _ours(path: Path, state: dict[str, Any], weights: str) -> EncoderFile:
    try:
        return _of_training(path, state, weights)
    except (KeyError, TypeError, AttributeError) as error:
        raise ForeignFileError(f"{path} does not hold what a checkpoint of moco.train holds ({error!r})") from error


def _of_training(path: Path, state: dict[str, Any], weights: str) -> EncoderFile:
    config, method = state["config"], state["method"]

    def part(name: str) -> dict[str, Tensor]:
        prefix = f"{weights}.{name}."
        return {key.removeprefix(prefix): value for key, value in method.items() if key.startswith(prefix)}

    if not part("backbone"):
        raise ForeignFileError(f"{path} {_ONE_NETWORK}")
    model = config["model"]
    return EncoderFile(
        str(path),
        "checkpoint of moco.train",
        str(model["backbone"]),
        dict(model["options"]),
        part("backbone"),
        part("head"),
        state["step"],
        images_of(config),
        config,
    )


def images_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a run's configuration shows a picture to its encoder in evaluation."""
    augment = config["augment"]
    return {"size": augment["size"], "resize": augment["eval_resize"], "mean": augment["mean"], "std": augment["std"]}


def _safetensors(path: Path, backbone: str | None, options: dict[str, Any] | None) -> EncoderFile:
    try:
        with safe_open(path, "pt") as file:
            about, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = {name: dict(json.loads(about[name])) for name in ("options", "images", "config") if name in about}
        step = int(about.get("step", 0))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ForeignFileError(f"{path} cannot be read as safetensors ({error})") from error
    if backbone is None and "backbone" not in about:
        raise ForeignFileError(f"{path} does not say its network: set backbone=NAME, e.g. backbone=resnet50")
    if "backbone" not in about and backbone is not None:
        _refuse_unknown_heads(path, backbone)
    named = backbone or about["backbone"]
    chosen = options if options is not None else said.get("options", {})
    body = {key: value for key, value in weights.items() if "backbone" in about or not _is_head(key)}
    return EncoderFile(
        str(path), "safetensors", named, chosen, body, {}, step, said.get("images", {}), said.get("config", {})
    )
