"""A saved segmentation network predicts the same classes, and other files are refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moco.interop.encoder_file import ForeignFileError
from moco.segmentation.crop import CropSettings
from moco.segmentation.masks import MaskedImages
from moco.segmentation.network import HEADS, SegmentationNetwork, build_network, with_output_stride
from moco.segmentation.saved import Segmenter, load_segmenter, save_segmenter
from moco.segmentation.training import predict
from tests.detection.examples import encoder_file
from tests.docs.pages import REPOSITORY, blocks

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
CLASSES = ("background", *"0123456789")


def network(head: str = "linear", bn: str = "sync", frozen: bool = False) -> SegmentationNetwork:
    return build_network(encoder_file("resnet18"), head, 11, seed=0, untrained=False, frozen=frozen, bn=bn)


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("bn", "frozen"), [("sync", False), ("frozen", False), ("sync", True)])
def test_a_saved_network_predicts_the_same_classes(head: str, bn: str, frozen: bool, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    Image.new("L", (56, 40)).save(tmp_path / "mask.png")
    trained = network(head, bn, frozen)
    images = MaskedImages(((str(image), str(tmp_path / "mask.png")),), CLASSES, np.arange(256, dtype=np.int16))
    (expected, _) = next(predict(trained, images, range(1), CropSettings(32, (1, 1), 0, MEAN, STD), 0))
    save_segmenter(tmp_path / "x.safetensors", Segmenter(trained, CLASSES, MEAN, STD), head, "resnet18", {})
    loaded = load_segmenter(tmp_path / "x.safetensors")
    found = loaded.find(image)
    assert loaded.classes == CLASSES
    assert found.shape == (40, 56)
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 1
    assert not loaded.network.training


def test_the_dilation_of_output_stride_is_saved(tmp_path: Path) -> None:
    file = with_output_stride(encoder_file("resnet50"), 16)
    trained = build_network(file, "linear", 11, seed=0, untrained=False, frozen=False, bn="sync")
    path = tmp_path / "x.safetensors"
    save_segmenter(path, Segmenter(trained, CLASSES, MEAN, STD), "linear", "resnet50", file.options)
    loaded = load_segmenter(path).network
    assert isinstance(loaded, SegmentationNetwork)
    with torch.no_grad():
        assert loaded.feature_map(torch.zeros(1, 3, 64, 64)).shape[2:] == (4, 4)


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [text for _, text in blocks(REPOSITORY / "docs/howto/segmentation.md", "python")]
    write_image(tmp_path / "CANVASES/test/images/00000.png")
    folder = tmp_path / "runs/canvases/segment/pretrained_fcn_200steps"
    folder.mkdir(parents=True)
    segmenter = Segmenter(network("fcn"), CLASSES, MEAN, STD)
    save_segmenter(folder / "network.safetensors", segmenter, "fcn", "resnet18", {})
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "segmentation.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _ in lines} <= {*CLASSES}
    assert sum(int(count) for _, count in lines) == 40 * 56


def test_other_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        load_segmenter(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ForeignFileError, match=r"cannot be read as a network of moco\.segment"):
        load_segmenter(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ForeignFileError, match=r"cannot be read as a network of moco\.segment .*classes"):
        load_segmenter(path)
    save_segmenter(path, Segmenter(network(), CLASSES[:2], MEAN, STD), "linear", "resnet18", {})  # of eleven classes
    with pytest.raises(ForeignFileError, match=r"x\.safetensors does not fit .* have another shape"):
        load_segmenter(path)
    for head, mean in (("unet", MEAN), ("linear", (0.5, 0.5))):
        save_segmenter(path, Segmenter(network(), CLASSES, mean, STD), head, "resnet18", {})
        with pytest.raises(ForeignFileError, match=r"cannot be read as a network of moco\.segment"):
            load_segmenter(path)
