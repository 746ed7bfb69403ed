"""Find the encoder in a file of another project, by `LAYOUTS`, and give its weights the names of torchvision."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

State = Mapping[str, Tensor]


class Layout(NamedTuple):
    """Where a project's files hold the weights of an encoder: the prefixes of their names, see `under`."""

    name: str
    encoder: str  # prefix of the encoder's weights
    momentum_encoder: str = ""  # prefix of the momentum encoder's weights; "": the files hold none
    of_timm: bool = False  # timm publishes its weights in this layout


NOTEBOOK = Layout("official MoCo CIFAR-10 notebook", "encoder_q.net.", "encoder_k.net.")
MOCO_V2 = Layout("official MoCo v1/v2", "encoder_q.", "encoder_k.")
MOCO_V3 = Layout("official MoCo v3", "base_encoder.", "momentum_encoder.")
OFFICIAL = (NOTEBOOK, MOCO_V2, MOCO_V3)
LAYOUTS = (
    *OFFICIAL,
    Layout("DINO (teacher)", "teacher.backbone.", "teacher.backbone."),  # DINO evaluates the teacher
    Layout("DINO (student)", "student.backbone."),
    Layout("lightly's DINO (teacher)", "teacher_backbone.", "teacher_backbone."),
    Layout("lightly's DINO (student)", "student_backbone."),
    # timm and torchvision publish the average of the weights, not the weights of the last step.
    Layout("timm (average of the weights)", "state_dict_ema.", of_timm=True),
    Layout("torchvision's references (average of the weights)", "model_ema.module."),
    Layout("VISSL", "trunk."),
    Layout("solo-learn or lightly", "backbone.", "(momentum_backbone|backbone_momentum)."),  # and other projects
    Layout("SupContrast or solo-learn before 2022", "encoder.", "momentum_encoder."),
)
PLAIN = Layout("plain state dict", "", of_timm=True)

# Entries of a file, or attributes of a Lightning module, that may hold the weights. They can be nested.
_CONTAINERS = ("state_dict.", "model.", "model_state_dict.", "net.", "network.", "classy_state_dict.base_model.")
_WRAPPERS = r"(?:(?:module|_orig_mod|_feature_blocks)\.)*"  # of DDP, torch.compile, and VISSL's ResNet
_CLASSIFIERS = ("fc.", "head.", "classifier.", "linear.")  # of supervised networks: not part of the backbone

# nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples; ReLU (2) and pooling (3, 8) have no weights.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# The children of the notebook's ResNet: no max-pooling, but nn.Flatten (8) before the last layer.
_NOTEBOOK_CHILDREN = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "fc"}
_NUMBERINGS = (_CHILDREN, _NOTEBOOK_CHILDREN)


class Part(NamedTuple):
    """An encoder in a file, according to a layout."""

    layout: Layout
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]  # the encoder's weights after the backbone, e.g. fc.*
    others: dict[str, Tensor]  # the weights outside of the encoders
    options: dict[str, Any]  # of the backbone, if the layout implies them


def flat(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of nested dicts under their dotted names."""
    found = dict[str, Tensor]()
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found[name.replace("._orig_mod.", ".")] = value
        elif isinstance(name, str) and isinstance(value, Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in flat(value).items()}
    return found


def under(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by their names without the prefix.

    "module." of DDP, and similar wrappers, may stand before and after each part of the prefix.

    Args:
        prefix: parts that end in a dot; a part may be a regular expression.
    """
    pattern = _pattern(prefix)
    return {name[found.end() :]: value for name, value in state.items() if (found := pattern.match(name))}


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(_WRAPPERS + prefix.replace(".", rf"\.{_WRAPPERS}"))


def parts(tensors: State, momentum: bool = False) -> Iterator[Part]:
    """Yield every encoder, or with `momentum` every momentum encoder, that the names of weights suggest.

    `tensors` are named as `flat` names them.
    """
    tensors = under("", tensors)
    for layout in LAYOUTS:
        prefix = layout.momentum_encoder if momentum else layout.encoder
        if prefix and under(prefix, tensors) and under(layout.encoder, tensors):
            yield _part(layout, prefix, tensors)
    for container in _CONTAINERS:
        if inside := under(container, tensors):
            yield from parts(inside, momentum)
    if not momentum:
        yield _part(PLAIN, "", tensors)


def _part(layout: Layout, prefix: str, tensors: State) -> Part:
    own = under(prefix, tensors)
    named = torchvision_named(own)
    head = {name: value for name, value in named.items() if _is_head(name)}
    backbone = {name: value for name, value in named.items() if name not in head}
    encoders = _pattern(layout.encoder), _pattern(layout.momentum_encoder or layout.encoder)
    others = {name: value for name, value in tensors.items() if not any(each.match(name) for each in encoders)}
    # ResNets whose shortcuts are named "shortcut" (SupContrast, pytorch-cifar) have the stem of SimCLR for CIFAR.
    cifar = layout == NOTEBOOK or (has_small_stem(backbone) and any(".shortcut." in name for name in own))
    return Part(layout, backbone, head, others, {"stem": "cifar"} if cifar else {})


def _is_head(name: str) -> bool:
    """Return whether a weight belongs to a classifier or projection head instead of the backbone."""
    return name.startswith(_CLASSIFIERS) and not name.startswith("head.norm.")  # in ConvNeXt's backbone


def has_small_stem(backbone: State) -> bool:
    """Return whether a ResNet begins with a 3x3 convolution."""
    return "conv1.weight" in backbone and backbone["conv1.weight"].shape[-1] == 3


def torchvision_named(state: State) -> dict[str, Tensor]:
    """Rename the weights of a ResNet with numbered layers or shortcuts to torchvision's names; keep other names."""
    numbers = {name.split(".")[0] for name in state}
    names = next((each for each in _NUMBERINGS if numbers == each.keys()), {})
    renamed = {
        re.sub(r"^\d+", lambda number: names.get(number[0], number[0]), name): value for name, value in state.items()
    }
    return {re.sub(r"^(layer\d\.\d+)\.shortcut\.", r"\1.downsample.", name): value for name, value in renamed.items()}
