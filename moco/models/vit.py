"""Vision transformers of MoCo v3: timm's, with fixed positions and a random, untrained patch projection.

    An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie, He, ICCV 2021)

State-dict keys are timm's, as in the official files.

Legend: N images, C channels, S side of an image, P patches, D width.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def vit(
    dim: int,
    depth: int,
    heads: int,
    img_size: int = 224,
    patch_size: int = 16,
    stem: str = "patch",
    freeze_patches: bool | None = None,
    channels: int = 3,
    **options: Any,
) -> nn.Module:
    """Return a ViT from images (N, C, S, S) to the features of the class token, (N, D).

    As in the paper and its code: fixed 2-D sin-cos positions; Xavier initialization that treats the weights of query,
    key and value as three matrices. Section 4.2: a random patch projection, not trained, stabilizes training.

    Args:
        dim: D, a multiple of 4 and of `heads`; with stem "conv" also of 8.
        depth, heads: number of blocks, and of attention heads per block.
        img_size: S; the positions are fixed for it.
        patch_size: side of a patch; must divide `img_size`.
        stem: "patch": linear projection of patches. "conv": four trained 3x3 convolutions of stride 2 (Xiao et al.,
            2021); `patch_size` must be 16.
        freeze_patches: do not train the patch projection; None: True, except for a conv stem.
        channels: C, of the images.
        options: further arguments of timm's VisionTransformer, e.g. drop_path_rate.

    Raises:
        ValueError: for invalid values.
        AssertionError: from forward, for images of another size.
    """
    from timm.models.vision_transformer import VisionTransformer  # costs a second at start-up

    _check(dim, heads, img_size, patch_size, stem, freeze_patches)
    network: Any = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="token",
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="moco",  # Xavier; query, key and value as three; class token of std 1e-6
        **options,
    )
    network.map_layer = "norm"  # the layer that returns the tokens, see `build_backbone`
    side = img_size // patch_size
    network.pos_embed = nn.Parameter(sin_cos_positions(side, dim)[None], requires_grad=False)  # (1, 1 + P, D)
    patches = network.patch_embed
    if stem == "conv":
        patches.proj = conv_stem(dim, channels)
    else:
        bound = math.sqrt(6 / (channels * patch_size**2 + dim))  # Xavier's, of the projection as a linear layer
        nn.init.uniform_(patches.proj.weight, -bound, bound)
        nn.init.zeros_(patches.proj.bias)
        patches.requires_grad_(freeze_patches is False)
    return network  # type: ignore[no-any-return]


def _check(dim: int, heads: int, img_size: int, patch_size: int, stem: str, freeze_patches: bool | None) -> None:
    """Raise ValueError for invalid arguments of `vit`."""
    if dim < 4 or dim % 4 or heads < 1 or dim % heads:
        raise ValueError(f"options.dim={dim} must be a multiple of 4 and of heads={heads}")
    if patch_size < 1 or img_size < 1 or img_size % patch_size:
        raise ValueError(f"options.patch_size={patch_size} must divide img_size={img_size}")
    if stem not in ("patch", "conv"):
        raise ValueError(f"options.stem={stem!r} must be 'patch' or 'conv'")
    if stem == "conv" and (patch_size != 16 or dim % 8 or freeze_patches):
        raise ValueError(
            f"options.stem='conv' needs patch_size=16, freeze_patches=false or null, and dim divisible by 8, but "
            f"patch_size={patch_size}, freeze_patches={freeze_patches} and dim={dim}"
        )


def sin_cos_positions(side: int, dim: int) -> Tensor:
    """Return fixed positions of side x side patches, row by row, after zeros for the class token: (1 + side**2, dim).

    Half of the dimensions hold sines and cosines of the row, the other half hold sines and cosines of the column. The
    frequencies fall geometrically from 1 to almost 1/10000.
    """
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    positions = build_sincos2d_pos_embed([side, side], dim, interleave_sin_cos=True)  # (P, D)
    return torch.cat([torch.zeros(1, dim), positions])


def conv_stem(dim: int, channels: int) -> nn.Sequential:
    """Return a network, (N, C, S, S) to (N, D, S/16, S/16).

    It has four 3x3 convolutions with D/8 ... D channels, and then a 1x1 convolution.
    """
    widths = [channels, dim // 8, dim // 4, dim // 2, dim]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


vit_small = partial(vit, 384, 12, 12)  # 12 heads; the usual ViT-S has 6
vit_base = partial(vit, 768, 12, 12)
vit_conv_small = partial(vit, 384, 11, 12, stem="conv")  # 11 blocks: the stem costs about as much as the twelfth
vit_conv_base = partial(vit, 768, 11, 12, stem="conv")
