"""Use an encoder for images of another size than it was trained on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moco.interop.encoder_file import EncoderFile, ForeignFileError, build
from moco.interop.foreign import State
from moco.models.backbones import BACKBONES
from moco.models.probe import output_error

POSITIONS = "pos_embed"


def fit_to_size(file: EncoderFile, size: int, field: str) -> EncoderFile:
    """Return a file whose network computes features of images of `size` x `size`: `file`, if it fits.

    A ViT for another size is built again with `img_size=size`, with position embeddings from `with_positions_of`.

    Args:
        field: the configuration's field for the size, for the error.

    Raises:
        ForeignFileError: if the network cannot be used for this size; the message names `field`.
    """
    error = output_error(build(file).get_submodule("backbone"), size)
    if not error:
        return file
    network = f"backbone={file.backbone} with options={file.options}"
    if POSITIONS in file.weights:
        resized = replace(file, options=file.options | {"img_size": size})
        try:
            backbone = build(resized, seed=0).get_submodule("backbone")
            resized = replace(resized, weights=with_positions_of(backbone, file.backbone, file.weights))
            error = output_error(build(resized).get_submodule("backbone"), size)
        except (ValueError, RuntimeError) as problem:  # e.g. an image smaller than a patch
            error = str(problem)
        if not error:
            return resized
    raise ForeignFileError(f"{field}={size} does not fit the encoder {file.source}, {network}: {error}")


def with_positions_of(backbone: nn.Module, name: str, weights: State) -> dict[str, Tensor]:
    """Return the weights of a ViT with as many position embeddings as a backbone needs.

    MoCo v3's ViTs have fixed position embeddings: the backbone's own are used. timm interpolates learned position
    embeddings. If timm cannot interpolate them, the weights are returned unchanged.

    Args:
        name: the backbone's name, as in the configuration.
    """
    own: Mapping[str, Any] = dict(backbone.named_parameters())
    before, wanted = weights.get(POSITIONS), own.get(POSITIONS)
    if before is None or wanted is None or before.shape == wanted.shape or before.dim() != 3:
        return dict(weights)
    if name in BACKBONES:
        return {**weights, POSITIONS: wanted.detach().clone()}
    from timm.layers.pos_embed import resample_abs_pos_embed  # takes a second

    network: Any = backbone
    prefix = 0 if getattr(network, "no_embed_class", False) else getattr(network, "num_prefix_tokens", 1)
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if (
        grid is None
        or before.shape[-1] != wanted.shape[-1]
        or round((before.shape[1] - prefix) ** 0.5) ** 2 != (before.shape[1] - prefix)
    ):
        return dict(weights)  # loading them raises an error that names the shapes
    with torch.no_grad():
        positions = resample_abs_pos_embed(before, new_size=list(grid), num_prefix_tokens=prefix)
    return {**weights, POSITIONS: positions.contiguous()}
