"""What a vision transformer's class token looks at.

Legend: N images, S side of an image, P patches, H heads, T tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ORANGE = (255.0, 140.0, 26.0)
_STRONGEST = 0.8  # how much of the color the most attended patch has: the picture still shows through
_GREY = 0.7  # of the picture's brightness, so that white stays darker than the color


def has_class_token(backbone: nn.Module) -> bool:
    """Whether it is a transformer of timm's kind, with blocks and a class token."""
    network: Any = backbone
    return getattr(network, "cls_token", None) is not None and hasattr(_last_block(network), "attn")


def _last_block(network: Any) -> Any:
    blocks: Any = getattr(network, "blocks", ())
    return blocks[-1] if len(blocks) else None


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """The last block's attention from the class token to each patch, the mean of the heads: (N, P**.5, P**.5).

    These are the softmax's own values: a picture's patches sum to 1 less what stays on the class token (and others
    that are no patches). None for a network whose patches are no square, or that keeps its attention to itself.

    Args:
        backbone: of which `has_class_token` holds, in eval mode.
        images: normalized, (N, 3, S, S).
    """
    from timm.utils.attention_extract import AttentionExtract  # costs a second at start-up

    network: Any = backbone
    attention = _last_block(network).attn
    if not hasattr(attention, "attn_drop"):
        return None
    fused = getattr(attention, "fused_attn", None)
    name = f"blocks.{len(network.blocks) - 1}.attn.attn_drop"
    extract = AttentionExtract(backbone, names=[name], method="hook")
    try:
        if fused is not None:
            attention.fused_attn = False  # the fused kernel never has the weights in one place
        weights = next(iter(extract(images).values()), None)  # (N, H, T, T)
    finally:
        if fused is not None:
            attention.fused_attn = fused
    if weights is None or weights.ndim != 4:
        return None
    patches = weights[:, :, 0, int(getattr(network, "num_prefix_tokens", 1)) :].float().mean(dim=1)  # (N, P)
    side = math.isqrt(patches.shape[1])
    return patches.reshape(-1, side, side) if side * side == patches.shape[1] else None


def lit(image: Tensor, attention: Tensor) -> Tensor:
    """The picture in gray, the more orange where it is attended to more; that shows on dark and bright pictures alike.

    Args:
        image: uint8 (3, S, S).
        attention: (s, s), at least 0.

    Returns:
        uint8 (3, S, S).
    """
    share = attention / attention.max().clamp_min(1e-12)
    alpha = _STRONGEST * F.interpolate(share[None, None].cpu(), size=image.shape[1:], mode="nearest")[0]  # (1, S, S)
    gray = _GREY * image.float().mean(dim=0, keepdim=True)  # (1, S, S)
    return ((1 - alpha) * gray + alpha * torch.tensor(_ORANGE).view(3, 1, 1)).round().to(torch.uint8)
