"""Graphs in ONNX and torch.export: the same features for any batch size, without this package."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.config import ConfigError
from moco.interop.exported import load_exported, load_onnx, save_exported, save_onnx
from tests.interop.networks import LOOK, VIT, trained

BATCH = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CONVNET = ("convnet", {"width": 2})
TINY_VIT = ("timm/vit_tiny_patch16_224", VIT)


@pytest.mark.parametrize(("backbone", "options"), [CONVNET, TINY_VIT])
def test_torch_export(tmp_path: Path, backbone: str, options: dict[str, int]) -> None:
    network = trained(backbone, options)
    path = tmp_path / "x.pt2"
    save_exported(path, network, LOOK)
    again, weights = load_exported(path)
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    for count in (1, 2, 5):
        torch.testing.assert_close(again(BATCH[:count]), network(BATCH[:count]), rtol=1e-5, atol=1e-6)
    extra = {"images.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["images.json"]) == LOOK


@pytest.mark.parametrize(("backbone", "options"), [CONVNET, TINY_VIT])
def test_onnx(tmp_path: Path, backbone: str, options: dict[str, int]) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    network = trained(backbone, options)
    path = tmp_path / "x.onnx"
    save_onnx(path, network, LOOK)
    assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]  # the weights are in it
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    assert json.loads(session.get_modelmeta().custom_metadata_map["images"]) == LOOK
    for count in (1, 2, 5):
        expected = network(BATCH[:count])
        (features,) = session.run(None, {"images": BATCH[:count].numpy()})
        np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert torch.equal(load_onnx(path)(BATCH[:count]), torch.from_numpy(features))


def test_a_missing_package_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"to=onnx .* pip install onnx onnxruntime onnxscript"):
        save_onnx(tmp_path / "x.onnx", trained(*CONVNET), LOOK)
    with pytest.raises(ConfigError, match=r"to=onnx .* pip install onnx onnxruntime onnxscript"):
        load_onnx(tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []
