"""A ViT is used for images of another size: fixed positions are computed again, learned ones interpolated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.interop.encoder_file import EncoderFile, ForeignFileError, build
from moco.interop.image_size import fit_to_size, with_positions_of
from moco.models.backbones import build_backbone
from moco.models.vit import sin_cos_positions

OWN: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 2, "img_size": 32, "patch_size": 16}
TIMM: dict[str, Any] = {"img_size": 32, "embed_dim": 12, "depth": 1}


def file_of(name: str, options: dict[str, Any]) -> EncoderFile:
    torch.manual_seed(0)
    return EncoderFile("a.pth", "made up", name, options, dict(build_backbone(name, options).state_dict()))


def test_a_network_that_fits_is_left_as_it_is() -> None:
    for file in (
        file_of("convnet", {"width": 2}),
        file_of("timm/vit_tiny_patch16_224", TIMM | {"dynamic_img_size": True}),
    ):
        assert fit_to_size(file, 64, "images.size") is file


def test_fixed_positions_are_computed_for_the_new_size() -> None:
    file = file_of("vit", OWN)
    larger = fit_to_size(file, 64, "images.size")
    assert larger.options == OWN | {"img_size": 64}
    torch.testing.assert_close(larger.weights["pos_embed"], sin_cos_positions(4, 8)[None])
    assert all(larger.weights[name] is value for name, value in file.weights.items() if name != "pos_embed")
    assert build(larger).backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 8)


@pytest.mark.parametrize("size", [16, 48, 64])
def test_learned_positions_are_those_of_timms_dynamic_size(size: int) -> None:
    name, images = "timm/vit_tiny_patch16_224", torch.rand(2, 3, size, size)
    file = file_of(name, TIMM)
    adapted = build(fit_to_size(file, size, "images.size")).backbone(images)
    dynamic = build(replace(file, options=TIMM | {"dynamic_img_size": True})).backbone(images)
    torch.testing.assert_close(adapted, dynamic)


def test_positions_of_the_same_size_are_the_files() -> None:
    file = file_of("vit", OWN)
    weights = {**file.weights, "pos_embed": torch.rand(1, 5, 8)}
    assert with_positions_of(build_backbone("vit", OWN), "vit", weights)["pos_embed"] is weights["pos_embed"]


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit", OWN, 40),  # no multiple of the patch
        ("timm/vit_tiny_patch16_224", TIMM, 8),
        (
            "timm/swin_tiny_patch4_window7_224",
            {"img_size": 56, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1]},
            64,
        ),
    ],
)
def test_a_size_that_cannot_be_used_is_named_with_its_field(name: str, options: dict[str, Any], size: int) -> None:
    with pytest.raises(ForeignFileError, match=rf"images\.size={size} .*a\.pth, backbone={name}") as caught:
        fit_to_size(file_of(name, options), size, "images.size")
    assert "augment.size" not in str(caught.value)


def test_a_file_of_the_adapted_network_has_its_size(tmp_path: Path) -> None:
    from moco.interop.encoder_file import read_encoder, save_encoder

    larger = fit_to_size(file_of("vit", OWN), 64, "images.size")
    config = {
        "model": {"backbone": "vit", "options": larger.options},
        "augment": dict(size=64, eval_resize=64, mean=[0.5] * 3, std=[0.2] * 3),
    }
    save_encoder(tmp_path / "encoder.safetensors", build(larger).backbone, config, 1)
    again = read_encoder(tmp_path / "encoder.safetensors")
    assert fit_to_size(again, 64, "images.size") is again
