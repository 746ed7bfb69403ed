"""Attention of a vision transformer's class token.

Legend: N images, S side of an image, P patches, H heads, T tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ORANGE = (255.0, 140.0, 26.0)
_STRONGEST = 0.8  # opacity of the color on the most attended patch: the image stays visible
_GRAY = 0.7  # scales the image's brightness, so that white stays darker than the color


def has_class_token(backbone: nn.Module) -> bool:
    """Return whether a backbone is a timm transformer with a class token."""
    network: Any = backbone
    return getattr(network, "cls_token", None) is not None and hasattr(_last_block(network), "attn")


def _last_block(network: Any) -> Any:
    blocks: Any = getattr(network, "blocks", ())
    return blocks[-1] if len(blocks) else None


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Return the last block's attention from the class token to the patches, averaged over heads: (N, P**.5, P**.5).

    These are softmax values: an image's patches sum to 1 minus the attention to the class token and other tokens.
    None if the patches do not form a square, or if the attention weights are not accessible.

    Args:
        backbone: in eval mode; `has_class_token` is true for it.
        images: normalized, (N, 3, S, S).
    """
    from timm.utils.attention_extract import AttentionExtract  # takes a second to import

    network: Any = backbone
    attention = _last_block(network).attn
    if not hasattr(attention, "attn_drop"):
        return None
    fused = getattr(attention, "fused_attn", None)
    name = f"blocks.{len(network.blocks) - 1}.attn.attn_drop"
    extract = AttentionExtract(backbone, names=[name], method="hook")
    try:
        if fused is not None:
            attention.fused_attn = False  # the fused kernel does not materialize the weights
        weights = next(iter(extract(images).values()), None)  # (N, H, T, T)
    finally:
        if fused is not None:
            attention.fused_attn = fused
    if weights is None or weights.ndim != 4:
        return None
    patches = weights[:, :, 0, int(getattr(network, "num_prefix_tokens", 1)) :].float().mean(dim=1)  # (N, P)
    side = math.isqrt(patches.shape[1])
    return patches.reshape(-1, side, side) if side * side == patches.shape[1] else None


def overlay(image: Tensor, attention: Tensor) -> Tensor:
    """Return a gray image with orange where the attention is high; visible on dark and bright images.

    Args:
        image: uint8 (3, S, S).
        attention: (s, s), nonnegative.

    Returns:
        uint8 (3, S, S).
    """
    relative = attention / attention.max().clamp_min(1e-12)
    alpha = _STRONGEST * F.interpolate(relative[None, None].cpu(), size=image.shape[1:], mode="nearest")[0]  # (1, S, S)
    gray = _GRAY * image.float().mean(dim=0, keepdim=True)  # (1, S, S)
    return ((1 - alpha) * gray + alpha * torch.tensor(_ORANGE).view(3, 1, 1)).round().to(torch.uint8)
