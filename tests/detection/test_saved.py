"""A saved detector finds the same objects, and other files are refused in one sentence."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moco.detection.network import DetectorSettings, build_detector
from moco.detection.saved import Detector, load_detector, save_detector
from moco.detection.training import predict
from moco.detection.views import ViewSettings
from moco.interop.encoder_file import ForeignFileError
from scripts.canvases import write_canvases
from tests.detection.examples import canvases, encoder_file
from tests.docs.pages import REPOSITORY, blocks

VIEWS = ViewSettings((40,), 40, 64, 0.5, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), False)


@pytest.mark.parametrize("form", ["mask_rcnn_c4", "retinanet"])
def test_a_saved_detector_finds_the_same_objects(form: str, tmp_path: Path) -> None:
    write_canvases(tmp_path, 1, 1, side=48)
    images = canvases(tmp_path / "test")
    settings = DetectorSettings(form, width=16)
    network = build_detector(encoder_file("resnet18"), settings, 10, seed=0, untrained=False)
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = 0.0  # type: ignore[union-attr]
    (expected,) = predict(network, images, range(1), VIEWS, 0)
    classes = tuple("abcdefghij")
    save_detector(tmp_path / "x.safetensors", Detector(network, classes, VIEWS), settings, "resnet18", {})
    loaded = load_detector(tmp_path / "x.safetensors")
    if hasattr(loaded.network, "roi_heads"):
        loaded.network.roi_heads.score_thresh = 0.0  # type: ignore[union-attr]
    found = loaded.find(images.images[0].path)
    assert loaded.classes == classes
    assert len(expected.scores) > 0 or form == "retinanet"
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(torch.from_numpy(getattr(found, name)), torch.from_numpy(getattr(expected, name)))
    assert found.masks == expected.masks


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [text for _, text in blocks(REPOSITORY / "docs/howto/detection.md", "python")]
    write_canvases(tmp_path / "CANVASES", 1, 1, side=48)
    settings = DetectorSettings("faster_rcnn_fpn", width=16)
    network = build_detector(encoder_file("resnet18"), settings, 10, seed=0, untrained=False)
    folder = tmp_path / "runs/canvases/detect/pretrained_faster_rcnn_fpn_300steps"
    folder.mkdir(parents=True)
    save_detector(
        folder / "detector.safetensors", Detector(network, tuple("abcdefghij"), VIEWS), settings, "resnet18", {}
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "detection.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"[a-j] 0\.\d+ \[.*\]", line) for line in lines)


def test_other_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        load_detector(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ForeignFileError, match="cannot be read as a detector of moco"):
        load_detector(path)
    settings = DetectorSettings("retinanet", width=8)
    network = build_detector(encoder_file("resnet18"), settings, 2, seed=0, untrained=False)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ForeignFileError, match=r"cannot be read as a detector of moco\.detect .*classes"):
        load_detector(path)
    save_detector(path, Detector(network, ("a",), VIEWS), settings, "resnet18", {})  # its weights are for two classes
    with pytest.raises(ForeignFileError, match=r"x\.safetensors does not fit the detector .*: .* have another shape"):
        load_detector(path)
    assert "head.classification_head.cls_logits.weight" in load_file(path)
