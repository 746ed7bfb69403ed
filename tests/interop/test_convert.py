"""Conversion: the file is kept if it was read again with the same features."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco.api import load_encoder
from moco.builder import KeyQueue, MoCo
from moco.config import ConfigError, TrainConfig
from moco.config.convert import ConvertConfig, check_convert
from moco.config.data import SubjectDataConfig
from moco.evaluation.features import Network
from moco.interop.convert import ConversionError, convert_encoder, write_and_compare
from moco.interop.encoder_file import EncoderFile, build, read_encoder, save_encoder
from moco.interop.write import FORMATS, Read
from moco.methods.moco_config import MoCoConfig
from moco.models.backbones import build_backbone, with_channels
from moco.models.encoder import build_encoder
from moco.runs import checkpoint
from tests.data.images import folder as folder_of_images
from tests.interop.networks import IMAGES, VIT, saved, source, trained

CONVNET = {"width": 2}


def convnet(path: Path) -> str:
    """Save a small network as a plain state dict."""
    return str(saved(path, trained("convnet", CONVNET).state_dict()))


def resnet(path: Path) -> str:
    return str(saved(path, {"arch": "resnet18", "state_dict": trained().state_dict()}))


def conversion(**fields: Any) -> ConvertConfig:
    config = ConvertConfig(**fields)
    config.images.size, config.images.resize, config.pictures = 32, 0, 4
    return config


def run_with_data(path: Path, **data: Any) -> str:
    config = TrainConfig(method=MoCoConfig())
    config.model.backbone, config.model.options, config.augment.size = "convnet", CONVNET, 16
    config.data.workers = 0
    for name, value in data.items():
        setattr(config.data, name, value)
    torch.manual_seed(0)
    method = MoCo(build_encoder("convnet", CONVNET, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
    for parameter in method.momentum_encoder.parameters():
        parameter.data.add_(0.1)
    checkpoint.save(path / "checkpoints", 5, {"config": asdict(config), "step": 5, "method": method.state_dict()}, 1)
    return str(path)


# ---- what is left ----


def test_the_summary_reports_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "resnet18.pth"
    convert_encoder(conversion(checkpoint=resnet(tmp_path / "x.pth.tar"), to="torchvision", output=str(output)))
    assert [each.name for each in output.parent.iterdir()] == ["resnet18.pth"]
    written = read_encoder(output, backbone="resnet18")
    assert torch.equal(build(written).get_submodule("backbone")(IMAGES), trained()(IMAGES))
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("features of 4 images (digits) differ by 0 at most", "torchvision.models.resnet18()", "32 px"):
        assert words in printed


@pytest.mark.parametrize(("weights", "added"), [("encoder", 0.0), ("momentum_encoder", 0.1)])
def test_weights_selects_the_network_of_a_run(tmp_path: Path, weights: str, added: float) -> None:
    run = run_with_data(tmp_path / "run")
    output = tmp_path / "x.safetensors"
    convert_encoder(ConvertConfig(run=run, to="safetensors", output=str(output), weights=weights, pictures=2))
    torch.manual_seed(0)
    first = build_encoder("convnet", CONVNET, 2, 0, 8, "grouped", 4).get_parameter("backbone.layers.0.weight")
    written = read_encoder(output)
    assert torch.equal(written.weights["layers.0.weight"], first + added)
    assert (written.step, written.images["size"]) == (5, 16)
    assert written.config["data"]["name"] == "digits"


def test_the_comparison_uses_the_images_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder_of_images(tmp_path / "images", 3)
    # the comparison does not need `resident`
    run = run_with_data(tmp_path / "run", name="folder", root=str(images), resident=True)
    config = ConvertConfig(run=run, to="safetensors", output=str(tmp_path / "x.safetensors"), overwrite=True)
    convert_encoder(config)
    assert "features of 3 images (folder)" in " ".join(capsys.readouterr().out.split())
    for each in images.iterdir():
        each.unlink()
    convert_encoder(config)
    assert "features of 16 images (digits)" in " ".join(capsys.readouterr().out.split())
    config.data = SubjectDataConfig(name="folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_encoder(config)
    config.data = SubjectDataConfig(root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_encoder(config)


# ---- files that are not kept ----


def perturbed(write: Callable[[Path, EncoderFile, nn.Module], None], size: float) -> Any:
    """Return a writer that changes one weight."""

    def wrong(path: Path, file: EncoderFile, backbone: nn.Module) -> None:
        weight = next(backbone.parameters())
        before = weight.clone()
        weight.reshape(-1)[0] += size
        write(path, file, backbone)
        weight.copy_(before)

    return wrong


@pytest.mark.parametrize(
    ("to", "ending", "words"),
    [
        ("safetensors", ".safetensors", r"1 weights differ .*\(layers\.0\.weight\)"),
        ("torch_export", ".pt2", r"1 weights differ .*\(layers\.0\.weight\)"),
    ],
)
def test_a_wrong_file_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, ending: str, words: str
) -> None:
    monkeypatch.setitem(FORMATS, to, replace(FORMATS[to], write=perturbed(FORMATS[to].write, 0.1)))
    output = tmp_path / f"x{ending}"
    output.write_text("what was there")
    path = convnet(tmp_path / "source.pth")
    config = conversion(checkpoint=path, backbone="convnet", options=CONVNET, to=to, output=str(output), overwrite=True)
    with pytest.raises(ConversionError, match=f"to={to}: {words}.* was not kept"):
        convert_encoder(config)
    assert output.read_text() == "what was there"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source.pth", output.name]


@pytest.mark.parametrize(("error", "refused"), [(0.0, False), (0.9e-5, False), (1.1e-5, True), (float("nan"), True)])
def test_the_tolerance_is_relative_to_the_largest_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, refused: bool
) -> None:
    network = trained("convnet", CONVNET)

    def wrong(images: Tensor) -> Tensor:
        return images * (1 + error)

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["safetensors"], read=lambda path, file: Read(wrong, {})))

    def features(each: Network) -> Tensor:
        return torch.tensor([[-200.0, 0.0, 1.0]]) if each is network else each(torch.tensor([[-200.0, 0.0, 1.0]]))

    file = source(network, "convnet", CONVNET)
    if refused:
        with pytest.raises(ConversionError, match="differ by"):
            write_and_compare("onnx", tmp_path / "x.safetensors", file, network, features)
    else:
        difference, largest = write_and_compare("onnx", tmp_path / "x.safetensors", file, network, features)
        assert difference == pytest.approx(200 * error, rel=0.05)
        assert largest == 200


def test_features_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    network = trained("convnet", CONVNET)
    with pytest.raises(ConversionError, match="features 0"):
        write_and_compare(
            "safetensors",
            tmp_path / "x.safetensors",
            source(network, "convnet", CONVNET),
            network,
            lambda each: torch.zeros(2, 16),
        )


def test_an_existing_file_is_overwritten_only_with_overwrite(tmp_path: Path) -> None:
    path, output = convnet(tmp_path / "x.pth"), tmp_path / "y.safetensors"
    output.write_text("dear")
    config = conversion(checkpoint=path, backbone="convnet", options=CONVNET, to="safetensors", output=str(output))
    with pytest.raises(ConfigError, match="exists: choose another, or set overwrite=true"):
        convert_encoder(config)
    assert output.read_text() == "dear"
    config.overwrite = True
    convert_encoder(config)
    assert read_encoder(output).backbone == "convnet"
    config.checkpoint = str(output)
    with pytest.raises(ConfigError, match="is the source file"):
        convert_encoder(config)
    (tmp_path / "folder.safetensors").mkdir()
    config.output = str(tmp_path / "folder.safetensors")
    with pytest.raises(ConfigError, match="is a directory: name a file in it"):
        convert_encoder(config)
    config.output = str(tmp_path / "x.pth" / "y.safetensors")
    with pytest.raises(ConfigError, match="cannot be written"):
        convert_encoder(config)


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("timm/vit_tiny_patch16_224", marks=pytest.mark.slow)])
@pytest.mark.parametrize("to", FORMATS)
def test_other_channels_are_kept_or_refused(
    tmp_path: Path, to: str, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    options = VIT if backbone.startswith("timm/") else {}
    torch.manual_seed(0)
    network = build_backbone(backbone, with_channels(options, 4)).eval()
    look = {"size": 32, "eval_resize": 0, "mean": [0.1] * 4, "std": [0.2] * 4}
    model = {"backbone": backbone, "options": options}
    save_encoder(tmp_path / "x.safetensors", network, {"model": model, "augment": look}, step=3)
    endings = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors", "detectron2": ".pkl", "hub": ""}
    output = tmp_path / f"y{endings.get(to, '.pth')}"
    config = conversion(checkpoint=str(tmp_path / "x.safetensors"), to=to, output=str(output))
    if to in ("torchvision", "detectron2", "moco_v2", "moco_v3") or (to == "deit" and backbone == "resnet18"):
        with pytest.raises(ConfigError, match=rf"to={to} supports .* of 4 channels: set to=NAME, one of timm,"):
            convert_encoder(config)
        return
    convert_encoder(config)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "features of 4 images (random numbers) differ by" in printed
    if to == "timm":
        assert "num_classes=0" in printed
        assert "in_chans=4" in printed
    if to == "hub":
        settings = json.loads((output / "config.json").read_text())
        assert settings["pretrained_cfg"]["input_size"] == [4, 32, 32]
        assert "4 channels, 32 x 32 px" in (output / "README.md").read_text()
        encoder = load_encoder(output)
        image = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
        expected = network((torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.1) / 0.2)
        torch.testing.assert_close(encoder(encoder.transform(image)[None]), expected.detach())
        with pytest.raises(ValueError, match=r"shape \(32, 32, 3\) and the type uint8: pass .* of 4 channels of uint8"):
            encoder.transform(image[..., :3])


@pytest.mark.parametrize(
    ("to", "backbone", "options", "words"),
    [
        (
            "torchvision",
            "convnet",
            CONVNET,
            "torchvision's ResNets with their own stem.*one of safetensors, onnx, torch_export",
        ),
        ("moco_v2", "resnet18", {"stem": "cifar"}, ".*one of safetensors, onnx, torch_export"),
        ("deit", "resnet18", {}, "plain ViTs.*one of torchvision, timm, detectron2, moco_v2, moco_v3, safetensors"),
    ],
)
def test_an_unsupported_network_is_refused(
    tmp_path: Path, to: str, backbone: str, options: dict[str, Any], words: str
) -> None:
    path = saved(tmp_path / "x.pth", trained(backbone, options).state_dict())
    config = conversion(checkpoint=str(path), backbone=backbone, options=options, to=to, output=str(tmp_path / "y.pth"))
    with pytest.raises(ConfigError, match=f"to={to} supports {words}"):
        convert_encoder(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"to": ""}, "to='' must be one of torchvision, timm, detectron2"),
        ({"output": ""}, "output='' must .* output=encoder.onnx"),
        ({"output": "x.pth"}, r"output='x\.pth' must .* \.onnx for to=onnx"),
        ({"to": "moco_v2", "output": "x.pt"}, r"ends in \.pth\.tar or \.pth"),
        ({"device": "cuda"}, "device=cuda.* set device=cpu"),
        ({"pictures": 0}, "pictures=0 must be at least 1"),
        ({"data": SubjectDataConfig(hold_out=0.2)}, r"data\.hold_out=0\.2 has no effect in this command: remove it"),
        ({"run": ""}, "no encoder: set run=DIR"),
    ],
)
def test_invalid_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    check_convert(ConvertConfig(run="r", to="onnx", output="x.onnx"))
    with pytest.raises(ConfigError, match=words):
        check_convert(ConvertConfig(**({"run": "r", "to": "onnx", "output": "x.onnx"} | fields)))
