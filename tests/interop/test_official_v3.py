"""Files of facebookresearch/moco-v3: backbone, and projector with BN."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.models.backbones import BACKBONES, build_backbone
from moco.models.encoder import Encoder


def projector(widths: list[int]) -> nn.Sequential:
    """Rebuild the official projector: layers numbered 0, 1, (2), 3, 4, ..."""
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise(widths), 1):
        last = number == len(widths) - 1
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


def network(arch: str, options: dict[str, Any], hidden: list[int], seed: int) -> Encoder:
    """Set weights and statistics as after training."""
    torch.manual_seed(seed)
    backbone: Any = build_backbone(arch, options)
    encoder = Encoder(backbone, projector([backbone.num_features, *hidden]))
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
            assert name
    return encoder.eval()


def saved(path: Path, arch: str, encoder: Encoder, momentum: Encoder, head: str) -> Path:
    """A checkpoint of main_moco.py: DDP's prefix, both encoders, projectors under the classifier's name."""
    state: dict[str, Tensor] = {}
    for prefix, each in (("base_encoder", encoder), ("momentum_encoder", momentum)):
        state |= {f"module.{prefix}.{name}": value for name, value in each.backbone.state_dict().items()}
        state |= {f"module.{prefix}.{head}.{name}": value for name, value in each.head.state_dict().items()}
    state |= {f"module.predictor.{name}": value for name, value in projector([8, 16, 8]).state_dict().items()}
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    torch.save({"epoch": 100, "arch": arch, "state_dict": state, "optimizer": optimizer, "scaler": {}}, path)
    return path


@pytest.mark.parametrize("weights", ["encoder", "momentum_encoder"])
def test_a_resnet_loads_with_its_projector(tmp_path: Path, weights: str) -> None:
    both = [network("resnet18", {}, [16, 8], seed) for seed in (0, 1)]
    file = read_encoder(saved(tmp_path / "r.pth.tar", "resnet18", both[0], both[1], "fc"), weights)
    assert (file.layout, file.backbone) == ("official MoCo v3", "resnet18")
    expected = both[weights == "momentum_encoder"]
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(build(file).backbone(images), expected.backbone(images))
    torch.testing.assert_close(build(file)(images), expected(images))


@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "vit_conv_small", "vit_conv_base"])
def test_a_vit_loads_with_its_projector(tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the published architecture names, but replace the networks by a small ViT."""
    options = {"img_size": 32, "dim": 32, "depth": 2, "heads": 4, "stem": "conv" if "conv" in arch else "patch"}
    monkeypatch.delitem(BACKBONES, arch)  # a Registry refuses to replace an entry
    monkeypatch.setitem(BACKBONES, arch, lambda: build_backbone("vit", options))
    both = [network("vit", options, [16, 16, 8], seed) for seed in (0, 1)]
    file = read_encoder(saved(tmp_path / "v.pth.tar", arch, both[0], both[1], "head"))
    assert (file.layout, file.backbone, file.options) == ("official MoCo v3", arch, {})
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(build(file).backbone(images), both[0].backbone(images))
    torch.testing.assert_close(build(file)(images), both[0](images))
    assert torch.equal(build(file).backbone.get_parameter("pos_embed"), both[0].backbone.get_parameter("pos_embed"))


@pytest.mark.slow
def test_a_vit_small_of_published_size_loads(tmp_path: Path) -> None:
    encoder = network("vit_small", {}, [64, 64, 8], 0)
    file = read_encoder(saved(tmp_path / "v.pth.tar", "vit_small", encoder, encoder, "head"))
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(build(file)(images), encoder(images))


def test_an_incomplete_projector_is_refused(tmp_path: Path) -> None:
    encoder = network("resnet18", {}, [16, 8], 0)
    path = saved(tmp_path / "r.pth.tar", "resnet18", encoder, encoder, "fc")
    state = torch.load(path, weights_only=True)
    del state["state_dict"]["module.base_encoder.fc.1.weight"]
    torch.save(state, path)
    with pytest.raises(ForeignFileError, match=r"projection head .* 1 of 8 weights are missing \(1\.weight\)"):
        build(read_encoder(path))
