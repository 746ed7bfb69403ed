"""`python -m moco.segment`: a run, its files, resuming, and what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file

from moco.config import RunWarning
from moco.interop.encoder_file import save_encoder
from moco.models.backbones import build_backbone
from moco.runs.comparison import placed
from scripts.canvases import CLASSES, write_canvases
from tests.cli.conftest import Run
from tests.full_disk import full_at

SMALL = ("masks.root=c/train", "masks.eval_root=c/test", "masks.workers=0", "crop=16", "batch_size=4", "steps=6")
NAMED = f"masks.classes=[{','.join(CLASSES)}]"
ENCODER = ("checkpoint=plain.pt", "backbone=convnet", "+options.width=4", "device=cpu", "threads=1")


@pytest.fixture
def canvases(tmp_path: Path) -> Path:
    write_canvases(tmp_path / "c", 12, 3, side=24)
    torch.manual_seed(0)
    torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / "plain.pt")
    return tmp_path


def test_a_run_writes_results_weights_and_a_picture(canvases: Path, run: Run) -> None:
    status, out, err = run("segment", *ENCODER, *SMALL, NAMED, "seeds=2", "output=out", "lr=0.01")
    assert status == 0, err
    assert "12 images for training, 3 held out, 11 classes" in out
    entries = json.loads((canvases / "out/results.json").read_text())
    assert [each["encoder"] for each in entries] == ["pretrained", "untrained"]
    assert len({each[1:3] for each in placed(entries)}) == 1  # one row
    for each in entries:
        seeds = [one["mIoU"] for one in each["per_seed"]]
        assert each["figures"]["mIoU"] == pytest.approx(np.mean(seeds))
        assert len(seeds) == 2
        assert each["data"]["training"] == 12
        assert each["changed"] == {"crop": 16, "batch_size": 4, "lr": 0.01}  # without those in the protocol's name
        folder = Path(each["saved"])
        assert (folder / "network.safetensors").is_file()
        with Image.open(folder / "predictions.png") as picture:
            assert picture.size == (3 * 164, 3 * 164)  # three rows of image, mask, prediction
    before = {path: path.read_bytes() for path in (canvases / "out/segment").glob("*/network.safetensors")}
    status, out, _ = run("segment", *ENCODER, *SMALL, NAMED, "seeds=2", "output=out", "lr=0.01")
    assert status == 0
    assert out.count("already trained") == 4
    assert run("segment", *ENCODER, *SMALL, NAMED, "output=out", "lr=0.01", "steps=4")[0] == 0
    again = [load_file(path) for path in before]
    for found, content in zip(again, before.values(), strict=True):
        assert all(torch.equal(value, found[key]) for key, value in load(content).items())


def test_the_next_command_adds_seeds_and_keeps_the_finished_one(canvases: Path, run: Run) -> None:
    status, out, err = run("segment", *ENCODER, *SMALL, NAMED, "output=out", "encoders=[pretrained]", "steps=2")
    assert status == 0, err
    (line,) = [each for each in out.splitlines() if each.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: ").partition("  (")[0])
    assert words[:3] == ["python", "-m", "moco.segment"]
    status, out, err = run("segment", *words[3:])
    assert status == 0, err
    assert out.count("already trained") == 1
    assert "next: tensorboard --logdir out" in out
    assert list((canvases / "out").rglob("*tfevents*"))
    (_, entry) = json.loads((canvases / "out/results.json").read_text())
    assert len(entry["per_seed"]) == 3


def test_another_normalization_or_number_of_classes_is_another_training(canvases: Path, run: Run) -> None:
    settings = ("segment", *ENCODER, *SMALL, "encoders=[pretrained]", "output=out", "steps=2")
    names = ",".join(CLASSES)
    for more in ([NAMED], [NAMED, "mean=[0.2,0.2,0.2]", "std=[0.1,0.1,0.1]"], [f"masks.classes=[{names},more]"]):
        status, out, err = run(*settings, *more)
        assert status == 0, err
        assert "already trained" not in out
    assert len(list((canvases / "out/segment").glob("state_*.pt"))) == 3


def test_a_changed_mask_is_another_training(canvases: Path, run: Run) -> None:
    settings = ("segment", *ENCODER, *SMALL, NAMED, "encoders=[pretrained]", "output=out", "steps=2")
    assert run(*settings)[0] == 0
    mask = min((canvases / "c/train/masks").glob("*.png"))
    Image.fromarray(np.ones((24, 24), np.uint8)).save(mask)
    status, out, err = run(*settings)
    assert status == 0, err
    assert "already trained" not in out


def test_a_network_that_predicts_one_class_is_reported(canvases: Path, run: Run) -> None:
    two = ("masks.classes=[background,digit]", "lr=0.1", "head=linear")
    for split in ("train", "test"):  # every pixel but one is background
        for path in (canvases / "c" / split / "masks").glob("*.png"):
            mask = np.zeros((24, 24), np.uint8)
            mask[0, 0] = 1
            Image.fromarray(mask).save(path)
    status, out, err = run("segment", *ENCODER, *SMALL, *two, "encoders=[pretrained]", "output=out")
    assert status == 0, err
    assert "pretrained: every pixel is predicted as background: raise steps, or lr" in out


def test_other_encoders_are_compared_at_equal_steps(canvases: Path, run: Run) -> None:
    torch.manual_seed(5)
    augment = {"size": 32, "eval_resize": 36, "mean": [0.4] * 3, "std": [0.3] * 3}
    config = {"model": {"backbone": "convnet", "options": {"width": 6}}, "augment": augment}
    save_encoder(canvases / "wider.safetensors", build_backbone("convnet", {"width": 6}), config, 7)
    arguments = ("segment", *ENCODER, *SMALL, NAMED, "output=out", "steps=1")
    status, _, err = run(*arguments, "encoders=[pretrained,wider.safetensors]")
    assert status == 0, err
    entries = json.loads((canvases / "out/results.json").read_text())
    assert [each["options"]["width"] for each in entries] == [4, 6]
    assert len({each[1:3] for each in placed(entries)}) == 1  # one row
    with safe_open(Path(entries[1]["saved"]) / "network.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mean"]) == [0.4] * 3
    status, _, err = run(*arguments, "encoders=[pretrained,gone.pt]")
    assert status == 2
    assert "encoders=gone.pt: checkpoint=gone.pt does not exist" in err


def test_results_are_below_the_directory_of_the_configured_encoder(canvases: Path, run: Run) -> None:
    augment = {"size": 32, "eval_resize": 36, "mean": [0.4] * 3, "std": [0.3] * 3}
    for name in ("own", "other"):
        (canvases / name).mkdir()
        config = {"model": {"backbone": "convnet", "options": {"width": 4}}, "augment": augment}
        save_encoder(canvases / name / "encoder.safetensors", build_backbone("convnet", {"width": 4}), config, 7)
    arguments = ("segment", *SMALL, NAMED, "steps=1", "checkpoint=own/encoder.safetensors", "device=cpu", "threads=1")
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
        (["masks.root="], "masks.root is empty: set masks.root=DIR"),
        (["masks.root=gone"], "masks.root=gone is not a folder"),
        (["masks.eval_root="], "there are no held-out images: set masks.eval_root=DIR, or masks.hold_out=0.2"),
        (["masks.hold_out=0.2"], "masks.eval_root=c/test and masks.hold_out=0.2 both name held-out images"),
        (["masks.layout=voc", "masks.classes=[]"], "masks.eval_root=c/test is only for masks.layout=folder"),
        (["masks.layout=voc", "masks.classes=[]", "masks.eval_root="], "there is no ImageSets/Segmentation in it"),
        (["masks.classes=[a,b]"], "has a pixel"),
        (["batch_size=64"], "batch_size=64 exceeds the 12 images of the training split"),
        (["scale=[2,1]"], "must be a range: the smaller factor first"),
        (["output_stride=16"], "output_stride=16 needs ResNet-50"),
        (["output_stride=32"], "output_stride=32 needs ResNet-50"),
        (["output_stride=9"], "output_stride=9 must be 8, 16 or 32"),
        (["head=unet"], "head='unet' must be one of linear, fcn, fcn_moco, deeplabv3"),
        (["lr=1e30", "head=linear"], "lower lr=1e+30"),
        (["weight_decay=1e30", "head=linear"], "or weight_decay=1e+30"),
    ],
)
def test_what_cannot_run_is_one_sentence(canvases: Path, run: Run, overrides: list[str], message: str) -> None:
    status, _, err = run("segment", *ENCODER, *SMALL, NAMED, "output=out", *overrides)
    assert status in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_masks_of_one_class_are_refused_and_the_ignored_value_is_no_gap(canvases: Path, run: Run) -> None:
    """Binary masks often have the values 0 and 255, which is ignored by default."""

    def written(*values: int) -> tuple[int, str, str]:
        for path in (canvases / "c").glob("*/masks/*.png"):
            Image.fromarray(np.resize(np.array(values, np.uint8), (24, 24))).save(path)
        return run("segment", *ENCODER, *SMALL, "encoders=[untrained]", "output=out", "steps=1", *more)

    for more in ([], ["masks.classes=[background,digit]"]):
        status, _, err = written(0, 255)
        assert status == 2
        assert (
            f"one class only ({'background' if more else 0}), and 4,320 pixels without a class (masks.ignore=255)"
            in err
        )
    more = ["masks.ignore=1"]
    assert written(0, 1, 2)[0] == 0  # a warning about the value 1 would be an error here


def test_a_mask_that_cannot_be_used_is_no_fault_of_the_program(canvases: Path, run: Run) -> None:
    """The sentence names the mask; a traceback, or a check of the images, would not help."""
    (canvases / "c/train/masks/00000.png").write_bytes(b"")
    status, _, err = run("segment", *ENCODER, *SMALL, NAMED, "output=out")
    assert status == 1
    assert err.endswith("cannot read the mask c/train/masks/00000.png: the file is empty\n")
    Image.new("RGB", (24, 24)).save(canvases / "c/train/masks/00000.png")
    status, _, err = run("segment", *ENCODER, *SMALL, NAMED, "output=out")
    assert status == 1
    assert "holds colors" in err
    assert "MOCO_TRACEBACK" not in err


def test_the_same_command_on_other_data_does_not_resume(canvases: Path, run: Run) -> None:
    """The saved state is recognized by settings, weights and images."""
    arguments = ("segment", *ENCODER, *SMALL, NAMED, "encoders=[pretrained]", "save_every=2", "output=out")
    assert run(*arguments)[0] == 0
    write_canvases(canvases / "c", 13, 3, side=24)
    status, out, _ = run(*arguments)
    assert status == 0
    assert "resumed" not in out


def test_a_single_value_far_above_the_others_is_reported(canvases: Path, run: Run) -> None:
    mask = np.asarray(Image.open(canvases / "c/train/masks/00000.png")).copy()
    mask[0, 0] = 77
    Image.fromarray(mask).save(canvases / "c/train/masks/00000.png")
    message = r"up to 77, but no pixel has the value 2, 11, 12, 13, 14 and 62 more: correct the masks with the value 77"
    with pytest.warns(RunWarning, match=message):
        status, _, _ = run("segment", *ENCODER, *SMALL, "encoders=[untrained]", "output=out", "steps=1")
    assert status == 0


def test_the_results_are_printed_if_the_disk_becomes_full(
    canvases: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, "results.json")
    status, out, err = run("segment", *ENCODER, *SMALL, NAMED, "output=out", "encoders=[untrained]")
    assert status == 1
    assert "output=out/results.json cannot be written (No space left on device)" in err
    assert "each seed" in out
