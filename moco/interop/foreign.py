"""The layouts of other projects' files, and torchvision's names for the weights of a ResNet."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """The prefixes of a project's keys, after DDP's `module.` is removed."""

    name: str
    encoder: str
    momentum_encoder: str


NOTEBOOK = Layout("official MoCo CIFAR-10 notebook", "encoder_q.net.", "encoder_k.net.")
MOCO_V2 = Layout("official MoCo v1/v2", "encoder_q.", "encoder_k.")
MOCO_V3 = Layout("official MoCo v3", "base_encoder.", "momentum_encoder.")
OFFICIAL = (NOTEBOOK, MOCO_V2, MOCO_V3)
PLAIN = Layout("plain state dict", "", "")
_LAYOUTS = (
    *OFFICIAL,
    Layout("solo-learn", "backbone.", "momentum_backbone."),
    Layout("lightly", "backbone.", "backbone_momentum."),
    Layout("solo-learn before 2022", "encoder.", "momentum_encoder."),
)
# The prefix "encoder." counts only with one of these: torchvision's transformers have a module of that name.
_FIRST_LAYERS = ("encoder.conv1.weight", "encoder.patch_embed.proj.weight")

# nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples; ReLU (2) and pooling (3, 8) have no weights.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# The children of the notebook's ResNet: no max-pooling, but nn.Flatten (8) before the last layer.
_NOTEBOOK_CHILDREN = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "fc"}
_NUMBERINGS = (_CHILDREN, _NOTEBOOK_CHILDREN)


def layout_of(names: Collection[str]) -> Layout:
    """Identify the layout by the names of the weights; `PLAIN` if they have no known prefix."""

    def occurs(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    possible = [each for each in _LAYOUTS if occurs(each.encoder)]
    if not any(name in names for name in _FIRST_LAYERS):
        possible = [each for each in possible if each.encoder != "encoder."]
    return next((each for each in possible if occurs(each.momentum_encoder)), possible[0] if possible else PLAIN)


def torchvision_named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a ResNet with numbered layers to torchvision's names; return other states unchanged."""
    numbers = {name.split(".")[0] for name in state}
    names = next((each for each in _NUMBERINGS if numbers == each.keys()), None)
    if names is None:
        return dict(state)
    return {re.sub(r"^\d+", lambda number: names[number[0]], name): value for name, value in state.items()}
