"""Attention maps equal those of the network; a network without a class token has none."""

import pytest
import torch

from moco.models.backbones import build_backbone
from moco.reporting.attention import class_attention, overlay

VIT = {"dim": 24, "depth": 2, "heads": 3, "img_size": 16, "patch_size": 4}


def test_attention_equals_a_reference() -> None:
    torch.manual_seed(0)
    network = build_backbone("vit", VIT).eval()
    images = torch.randn(2, 3, 16, 16)
    found = class_attention(network, images)
    assert found is not None
    assert found.shape == (2, 4, 4)

    block = network.blocks[-1]  # type: ignore[index]
    seen: list[torch.Tensor] = []
    handle = block.attn.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        network(images)
        q, k, _ = block.attn.qkv(seen[0]).reshape(2, 17, 3, 3, 8).unbind(2)  # type: ignore[union-attr]
    handle.remove()
    expected = torch.zeros(2, 16)
    for n in range(2):
        for head in range(3):
            scores = torch.stack([q[n, 0, head] @ k[n, token, head] for token in range(17)]) / 8**0.5
            expected[n] += scores.softmax(0)[1:] / 3
    torch.testing.assert_close(found.flatten(1), expected)


def test_the_network_is_unchanged() -> None:
    torch.manual_seed(0)
    network = build_backbone("vit", VIT).eval()
    images = torch.randn(1, 3, 16, 16)
    before, fused = network(images), network.blocks[-1].attn.fused_attn  # type: ignore[index, union-attr]
    class_attention(network, images)
    assert network.blocks[-1].attn.fused_attn == fused  # type: ignore[index, union-attr]
    assert torch.equal(network(images), before)


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_a_convolutional_network_has_none(name: str) -> None:
    assert class_attention(build_backbone(name, {}).eval(), torch.zeros(1, 3, 16, 16)) is None


def test_attention_is_shown_in_orange() -> None:
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    shown = overlay(image, torch.tensor([[0.2, 0.0], [0.1, 0.0]]))
    assert shown[:, 0, 0].tolist() == [232, 140, 49]  # 0.8 of the color, 0.2 of the gray 140
    assert shown[:, 4, 0].tolist() == [186, 140, 94]  # half the attention: 0.4 and 0.6
    assert shown[:, 0, 4].tolist() == [140, 140, 140]
    assert torch.equal(shown[:, :4, :4], shown[:, :1, :1].expand(3, 4, 4))
    assert overlay(image, torch.zeros(2, 2)).unique().tolist() == [140]
