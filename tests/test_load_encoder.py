"""`load_encoder` on every readable format: its features are those of moco.embed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.config.convert import ENDINGS, ConvertConfig
from moco.config.embed import EmbedConfig
from moco.interop.convert import convert_encoder
from moco.interop.encoder_file import read_encoder, save_encoder
from moco.interop.foreign import _NOTEBOOK_CHILDREN, LAYOUTS, NOTEBOOK, PLAIN, Layout
from moco.models.backbones import build_backbone
from moco.retrieval.embed import embed
from tests.evaluation.runs import trained as trained_run
from tests.interop.networks import VIT, prefixed, saved, trained
from tests.interop.test_hub import encoder_file

GRAPHS = ("detectron2", "onnx", "torch_export")  # written for other programs
TINY = "timm/vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, shape in enumerate([(40, 36, 3), (36, 60, 3), (50, 37)]):  # the last one is gray
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / f"{i}.png")
    return folder


def check(source: Path, images: Path, output: Path, sized: bool = True, **network: Any) -> None:
    """Compare the features of both, with the images' size from the file or a given one."""
    field = "run" if (source / "checkpoints").is_dir() else "checkpoint"
    given: dict[str, Any] = {field: str(source), "device": "cpu", "threads": 1, **network}
    config = EmbedConfig(output=str(output), **given)
    config.data.name, config.data.root, config.data.labels, config.data.workers = "folder", str(images), "none", 0
    config.images.size, config.images.resize = size, resize = (32, 36) if sized else (None, None)
    embed(config)
    encoder = moco.load_encoder(source, size=size, resize=resize, **network)
    prepared = torch.stack([encoder.transform(Image.open(each)) for each in sorted(images.iterdir())])
    expected = np.load(output / "features.npy")
    assert expected.std() > 1e-3
    np.testing.assert_allclose(encoder(prepared).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("layout", [*LAYOUTS, PLAIN], ids=lambda layout: layout.name)
def test_every_layout_of_other_projects(layout: Layout, images: Path, tmp_path: Path) -> None:
    options = {"stem": "cifar"} if layout == NOTEBOOK else {}
    state = trained(options=options).state_dict()
    if layout == NOTEBOOK:
        numbers = {name: number for number, name in _NOTEBOOK_CHILDREN.items()}
        state = {f"{numbers[name.split('.')[0]]}.{name.partition('.')[2]}": each for name, each in state.items()}
        state |= {"9.weight": torch.zeros(128, 512), "9.bias": torch.zeros(128)}  # the last layer tells the numbering
    path = saved(tmp_path / "x.pth", prefixed(layout.encoder, state))
    assert read_encoder(path, backbone="resnet18").layout == layout.name
    check(path, images, tmp_path / "out", backbone="resnet18")


@pytest.mark.parametrize("kind", ["run", "checkpoint", "encoder.safetensors"])
def test_every_file_of_moco(kind: str, images: Path, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run")
    source = run if kind == "run" else next((run / "checkpoints").glob("*.pt"))
    if kind == "encoder.safetensors":
        source = encoder_file(tmp_path / kind, options={"width": 2})
    check(source, images, tmp_path / "out", sized=False)


@pytest.mark.slow
@pytest.mark.parametrize("to", [to for to in ENDINGS if to not in GRAPHS])
def test_every_format_of_moco_convert(to: str, images: Path, tmp_path: Path) -> None:
    vit = to == "deit"
    network: dict[str, Any] = {"backbone": TINY, "options": VIT} if vit else {"backbone": "resnet18"}
    source = encoder_file(tmp_path / "source" / "encoder.safetensors", network["backbone"], network.get("options"))
    output = tmp_path / f"converted{ENDINGS[to][0]}"
    convert_encoder(ConvertConfig(checkpoint=str(source), to=to, output=str(output), pictures=2))
    states_network = to in ("safetensors", "hub", "moco_v2", "moco_v3")
    check(output, images, tmp_path / "out", **({} if states_network else network))


@pytest.mark.parametrize("to", GRAPHS)
def test_other_programs_files_are_refused_in_a_sentence(to: str, tmp_path: Path) -> None:
    path = tmp_path / f"encoder{ENDINGS[to][0]}"
    path.write_bytes(b"\x80\x04N." if to == "detectron2" else b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=str(path)) as caught:
        moco.load_encoder(path, backbone="resnet18")
    assert "\n" not in str(caught.value)


def test_four_channels_of_sixteen_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_backbone("convnet", {"width": 2, "channels": 4})
    about = {
        "model": {"backbone": "convnet", "options": {"width": 2}},
        "augment": {"size": 16, "eval_resize": 20, "mean": [0.5] * 4, "std": [0.29] * 4},
        "data": {"name": "folder", "root": "scenes", "channels": 4, "dtype": "uint16"},
    }
    save_encoder(tmp_path / "encoder.safetensors", network, about, 1)
    scenes = np.random.default_rng(0).integers(0, 2**16, (3, 24, 30, 4), dtype=np.uint16)
    (tmp_path / "scenes").mkdir()
    for i, scene in enumerate(scenes):
        np.save(tmp_path / "scenes" / f"{i}.npy", scene)
    config = EmbedConfig(checkpoint=str(tmp_path / "encoder.safetensors"), output=str(tmp_path / "out"), device="cpu")
    config.data.root, config.data.workers = str(tmp_path / "scenes"), 0
    embed(config)
    encoder = moco.load_encoder(tmp_path / "encoder.safetensors")
    features = encoder(torch.stack([encoder.transform(scene) for scene in scenes])).detach().numpy()
    np.testing.assert_allclose(features, np.load(tmp_path / "out" / "features.npy"), rtol=1e-6, atol=1e-6)
