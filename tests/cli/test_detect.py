"""`python -m moco.detect`: a run, its files, resuming, and what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from moco.config import RunWarning
from moco.interop.encoder_file import save_encoder
from moco.models.backbones import build_backbone
from moco.runs.comparison import placed
from scripts.canvases import write_canvases
from tests.cli.conftest import Run
from tests.full_disk import full_at, full_disk

DATA = ("boxes.root=c/train/images", "boxes.file=c/train/boxes.json", "boxes.eval_root=c/test/images")
SIZES = ("sizes=[32]", "eval_size=32", "max_size=48", "width=8", "box_samples=16", "anchor_samples=16")
SMALL = (*DATA, "boxes.eval_file=c/test/boxes.json", "boxes.workers=0", *SIZES)
STEPS = ("batch_size=2", "steps=6")
ENCODER = ("checkpoint=plain.pt", "backbone=convnet", "+options.width=4", "device=cpu", "threads=1")


@pytest.fixture
def canvases(tmp_path: Path) -> Path:
    write_canvases(tmp_path / "c", 8, 3, side=32)
    for seed, name in enumerate(("plain.pt", "other.pt")):
        torch.manual_seed(seed)
        torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / name)
    return tmp_path


def test_a_run_writes_results_weights_and_a_picture(canvases: Path, run: Run) -> None:
    arguments = ("detect", *ENCODER, *SMALL, *STEPS, "output=out", "detector=mask_rcnn_fpn", "steps=2")
    status, out, err = run(*arguments, "seeds=2", "encoders=[pretrained,untrained]")
    assert status == 0, err
    assert "8 images with" in out
    assert "10 classes: 0, 1, 2, 3, 4 and 5 more" in out
    entries = json.loads((canvases / "out/results.json").read_text())
    assert [each["encoder"] for each in entries] == ["pretrained", "untrained"]
    assert len({each[1:3] for each in placed(entries)}) == 1  # one row
    for each in entries:
        assert set(each["figures"]) >= {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "AP_half_width95"}
        assert each["figures"]["AP"] == pytest.approx(np.mean([one["AP"] for one in each["per_seed"]]))
        assert len(each["per_seed"]) == 2
        folder = Path(each["saved"])
        assert "roi_heads.mask_predictor.mask_fcn_logits.weight" in load_file(folder / "detector.safetensors")
        with Image.open(folder / "predictions.png") as picture:
            assert picture.size == (2 * 164, 3 * 164)  # three rows of truth and prediction
    status, out, _ = run(*arguments, "seeds=2", "encoders=[pretrained,untrained]")
    assert status == 0
    assert out.count("already trained") == 4
    assert "next: python -m moco.detect" in out


def test_the_next_command_adds_seeds_and_keeps_the_finished_one(canvases: Path, run: Run) -> None:
    status, out, err = run("detect", *ENCODER, *SMALL, *STEPS, "output=out", "encoders=[pretrained]", "steps=2")
    assert status == 0, err
    (line,) = [each for each in out.splitlines() if each.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: ").partition("  (")[0])
    assert words[:3] == ["python", "-m", "moco.detect"]
    status, out, err = run("detect", *words[3:])
    assert status == 0, err
    assert out.count("already trained") == 1
    assert "next: tensorboard --logdir out" in out
    assert list((canvases / "out").rglob("*tfevents*"))
    (_, entry) = json.loads((canvases / "out/results.json").read_text())
    assert len(entry["per_seed"]) == 3


def test_other_encoders_are_compared_at_equal_steps(canvases: Path, run: Run) -> None:
    arguments = ("detect", *ENCODER, *SMALL, *STEPS, "output=out", "steps=1")
    status, _, err = run(*arguments, "encoders=[pretrained,gone/encoder.safetensors]")
    assert status == 2
    assert "encoders=gone/encoder.safetensors: checkpoint=gone/encoder.safetensors does not exist" in err
    for name, width in (("same", 4), ("wider", 6)):  # a file that names its network, which may be another one
        torch.manual_seed(width)
        augment = {"size": 32, "eval_resize": 36, "mean": [0.4] * 3, "std": [0.3] * 3}
        config = {"model": {"backbone": "convnet", "options": {"width": width}}, "augment": augment}
        backbone = build_backbone("convnet", {"width": width})
        save_encoder(canvases / f"{name}.safetensors", backbone, config, 7)
    status, out, err = run(*arguments, "encoders=[pretrained,same.safetensors,wider.safetensors]")
    assert status == 0, err
    assert "wider.safetensors: wider.safetensors: convnet" in out
    entries = json.loads((canvases / "out/results.json").read_text())
    assert [each["options"]["width"] for each in entries] == [4, 4, 6]
    assert [each["step"] for each in entries] == [0, 7, 7]
    folders = {each["saved"] for each in entries}
    assert len(folders) == 3
    for folder in folders:
        with safe_open(Path(folder) / "detector.safetensors", "pt") as file:
            views = json.loads(file.metadata()["views"])
        assert views["mean"] == ([0.485, 0.456, 0.406] if "pretrained" in folder else [0.4] * 3)


def test_results_are_below_the_directory_of_the_configured_encoder(canvases: Path, run: Run) -> None:
    augment = {"size": 32, "eval_resize": 36, "mean": [0.4] * 3, "std": [0.3] * 3}
    for name in ("own", "other"):
        (canvases / name).mkdir()
        config = {"model": {"backbone": "convnet", "options": {"width": 4}}, "augment": augment}
        save_encoder(canvases / name / "encoder.safetensors", build_backbone("convnet", {"width": 4}), config, 7)
    arguments = ("detect", *SMALL, *STEPS, "steps=1", "checkpoint=own/encoder.safetensors", "device=cpu", "threads=1")
    status, _, err = run(*arguments, "encoders=[other/encoder.safetensors]")
    assert status == 0, err
    assert [each["encoder"] for each in json.loads((canvases / "own/results.json").read_text())] == [
        "other/encoder.safetensors"
    ]
    assert not (canvases / "other/results.json").exists()
    status, _, err = run(*arguments, "encoders=[other/encoder.safetensors,./other/encoder.safetensors]")
    assert (status, "twice" in err) == (2, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["boxes.root="], "boxes.root is empty: set boxes.root=DIR"),
        (["boxes.root=gone"], "boxes.root=gone is not a folder"),
        (["boxes.file="], "boxes.file is empty: set boxes.file=FILE.json"),
        (["boxes.file=gone.json"], "boxes.file=gone.json does not exist"),
        (["boxes.file=c/train/images/00000.png"], "boxes.file=c/train/images/00000.png is not a json in COCO's"),
        (["boxes.eval_file="], "there are no held-out images: set boxes.eval_file=FILE.json, or boxes.hold_out=0.2"),
        (["boxes.hold_out=0.2"], "boxes.eval_file=c/test/boxes.json and boxes.hold_out=0.2 both name held-out images"),
        (["boxes.layout=voc"], "boxes.file=c/train/boxes.json is for boxes.layout=json, not voc"),
        (["boxes.root=c/test/images"], "images do not exist, such as"),
        (["batch_size=64"], "batch_size=64 exceeds the 8 training images with boxes: lower it"),
        (["max_size=16"], "max_size=16 is below a size of 32: raise it"),
        (["precise_bn=1000"], "precise_bn=1000 exceeds steps="),
        (["precise_bn=1", "bn=frozen"], "precise_bn=1 has no effect with bn=frozen"),
        (["detector=yolo"], "detector='yolo' must be one of faster_rcnn_fpn, faster_rcnn_c4"),
        (["detector=faster_rcnn_c4"], "detector=faster_rcnn_c4 needs the four stages of a ResNet"),
        (
            ["anchor_sizes=[1,8,8,8]"],
            "1.0 must be at least 2",
        ),  # torchvision would round its sides to 0
        (["anchor_sizes=[8]"], "anchor_sizes=[8.0] must hold a size for each of the 4 levels"),
        (["lr=1e30"], "lower lr=1e+30"),
        (["weight_decay=1e30"], "or weight_decay=1e+30"),
    ],
)
def test_what_cannot_run_is_one_sentence(canvases: Path, run: Run, overrides: list[str], message: str) -> None:
    status, _, err = run("detect", *ENCODER, *SMALL, *STEPS, "output=out", *overrides)
    assert status in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_a_full_disk_is_one_sentence(canvases: Path, run: Run) -> None:
    with full_disk(100_000):
        status, _, err = run("detect", *ENCODER, *SMALL, *STEPS, "output=full")
    assert (status, "Traceback" in err, len(err.strip().splitlines())) == (1, False, 1), err


def test_held_out_images_that_are_training_images_are_counted(canvases: Path, run: Run) -> None:
    train = ["boxes.eval_root=c/train/images", "boxes.eval_file=c/train/boxes.json"]
    more = ("steps=1", "encoders=[untrained]", "output=same", *train)
    with pytest.warns(RunWarning, match="8 of the 8 held-out images are training images, too"):
        status, _, err = run("detect", *ENCODER, *SMALL, *STEPS, *more)
    assert status == 0, err
    (entry,) = json.loads((canvases / "same/results.json").read_text())
    assert entry["data"]["held_out_in_training"] == 8


def test_boxes_that_were_left_out_are_recorded(canvases: Path, run: Run) -> None:
    for split, count in (("train", 2), ("test", 1)):
        path = canvases / f"c/{split}/boxes.json"
        content = json.loads(path.read_text())
        for each in content["annotations"][:count]:
            each["bbox"][2] = 0
        path.write_text(json.dumps(content))
    arguments = ("detect", *ENCODER, *SMALL, *STEPS, "steps=1", "encoders=[untrained]", "output=out")
    status, _, err = run(*arguments)
    assert status == 2
    assert "c/train/boxes.json: 2 of " in err
    with pytest.warns(RunWarning, match="leaves out"):
        assert run(*arguments, "boxes.bad_boxes=drop")[0] == 0
    entries = json.loads((canvases / "out/results.json").read_text())
    data = entries[0]["data"]
    assert (data["training_boxes_left_out"], data["held_out_boxes_left_out"]) == (2, 1)
    assert "without 2 bad training boxes and 1 held-out ones" in placed(entries)[0].data
    for name in ("training_boxes_left_out", "held_out_boxes_left_out"):
        del data[name]
    assert len(placed(entries + json.loads((canvases / "out/results.json").read_text()))) == 1  # of an earlier version


def test_the_same_command_on_other_boxes_or_images_does_not_resume(canvases: Path, run: Run) -> None:
    """The saved state is recognized by settings, weights, boxes and images."""
    arguments = ("detect", *ENCODER, *SMALL, *STEPS, "encoders=[pretrained]", "steps=1", "output=out")
    assert run(*arguments)[0] == 0
    path = canvases / "c/train/boxes.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    for added in ([], [{"id": 99, "name": "another class"}]):
        content["categories"] += added
        path.write_text(json.dumps(content))
        status, out, _ = run(*arguments)
        assert status == 0
        assert "already trained" not in out
    image = min((canvases / "c/train/images").iterdir())
    with Image.open(image) as picture:
        inverted = ImageOps.invert(picture.convert("RGB"))
    inverted.save(image)
    assert "already trained" not in run(*arguments)[1]


def test_the_results_are_printed_if_the_disk_becomes_full(
    canvases: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, "results.json")
    status, out, err = run("detect", *ENCODER, *SMALL, *STEPS, "steps=1", "output=out", "encoders=[untrained]")
    assert status == 1
    assert "output=out/results.json cannot be written (No space left on device)" in err
    assert "of each seed" in out
