"""Attention of a vision transformer's class token.

Legend: N images, C channels, S side of an image, P patches, H heads, T tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ORANGE = (255.0, 140.0, 26.0)
_STRONGEST = 0.8  # opacity of the color on the most attended patch: the image stays visible
_GRAY = 0.7  # scales the brightness of the gray image, so that the color stands out from white areas


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Return the last block's attention from the class token to the patches, averaged over heads: (N, P**.5, P**.5).

    The values are those of a softmax over all tokens. So over the patches of an image they sum to 1 minus the attention
    to the class token and other tokens. The result is None if the network is not a timm transformer with a class
    token, if it does not expose its attention weights, or if the patches do not form a square.

    Args:
        backbone: in eval mode.
        images: normalized, (N, C, S, S).
    """
    network: Any = backbone
    blocks: Any = list(getattr(network, "blocks", ()))
    attention: Any = getattr(blocks[-1], "attn", None) if blocks else None
    if getattr(network, "cls_token", None) is None or not hasattr(attention, "attn_drop"):
        return None
    weights: list[Tensor] = []
    fused, attention.fused_attn = (
        getattr(attention, "fused_attn", False),
        False,
    )  # fused attention does not return the weights
    try:
        with attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: weights.append(output)):
            network(images)
    finally:
        attention.fused_attn = fused
    if not weights or weights[0].ndim != 4:  # (N, H, T, T)
        return None
    patches = weights[0][:, :, 0, int(getattr(network, "num_prefix_tokens", 1)) :].float().mean(dim=1)  # (N, P)
    side = math.isqrt(patches.shape[1])
    return patches.reshape(-1, side, side) if side * side == patches.shape[1] else None


def overlay(image: Tensor, attention: Tensor) -> Tensor:
    """Return an image, uint8 (3, S, S), in gray with orange where the attention, (s, s), is high."""
    relative = attention / attention.max().clamp_min(1e-12)
    alpha = _STRONGEST * F.interpolate(relative[None, None].cpu(), size=image.shape[1:], mode="nearest")[0]  # (1, S, S)
    gray = _GRAY * image.float().mean(dim=0, keepdim=True)  # (1, S, S)
    return ((1 - alpha) * gray + alpha * torch.tensor(_ORANGE).view(3, 1, 1)).round().to(torch.uint8)
