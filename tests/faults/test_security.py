"""Attacks through files and names: none of them runs code, starts a program or exhausts memory."""

import ast
import contextlib
import csv
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file

from moco.check_data import check_data
from moco.config import DataConfig
from moco.config.check_data import CheckDataConfig
from moco.config.pack import PackConfig
from moco.data.decode import ImageError, decode
from moco.data.image_facts import image_facts
from moco.data.pack import pack
from moco.data.pixel_format import RGB
from moco.data.sources import load_source
from moco.data.unreadable import UnreadableImages
from moco.data.walk import IMAGE_ENDINGS, IMAGE_FORMATS
from moco.evaluation.features import EvalTransform, Inference, pixels, stream
from moco.interop.encoder_file import build, read_encoder
from moco.reporting.gallery import ImageSet
from moco.retrieval.queries import image_files
from moco.retrieval.search import image_size
from moco.runs import checkpoint
from moco.runs.checkpoint import CheckpointError
from tests.data.unreadable_files import encoded, folder, noise, odd_files
from tests.faults import runs
from tests.faults.runs import REPOSITORY

NASTY = [
    "$(touch EVIL)",
    "`touch EVIL`",
    "; touch EVIL",
    "| touch EVIL",
    "&& touch EVIL",
    "'\"; touch EVIL; '",
    "a\nb",
]
CODE = sorted((REPOSITORY / "moco").rglob("*.py")) + sorted((REPOSITORY / "scripts").rglob("*.py"))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch EVIL",)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks create their file in this directory."""
    monkeypatch.chdir(tmp_path)


def untouched(folder: Path) -> bool:
    return not any(each.name == "EVIL" for each in folder.rglob("*"))


# ---- code in files ----


@pytest.mark.slow
def test_a_pickle_with_code_among_the_checkpoints_is_skipped_and_not_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.to_the_end(run, "epochs=1", "checkpoint.keep_last=1")
    for step in (90, 91):
        torch.save({"step": step, "sha256": "0", "config": Evil()}, run / "checkpoints" / f"step_{step:08d}.pt")
    (run / "checkpoints" / "step_00000092.pt").write_bytes(pickle.dumps(Evil()))
    runs.to_the_end(run, "epochs=1", "checkpoint.keep_last=1")
    assert runs.output(run).count("using the previous checkpoint") == 3
    assert untouched(tmp_path)
    os.system("touch EVIL")
    assert not untouched(tmp_path)  # this test would notice it


def valid_checkpoint(config: dict[str, Any], path: Path) -> Path:
    """Write a checkpoint with a valid digest, as an attacker can with this code."""
    method = {"encoder.backbone.weight": torch.ones(2), "encoder.head.0.weight": torch.ones(2)}
    return checkpoint.save(path, 1, {"step": 1, "config": config, "method": method, "history": []}, keep_last=1)


@pytest.mark.parametrize(
    "backbone",
    [
        {"backbone": "resnet18", "options": {"_target_": "os.system", "command": "touch EVIL"}},
        {"backbone": {"_target_": "os.system", "command": "touch EVIL"}, "options": {}},
        {"backbone": "os.system", "options": {"command": "touch EVIL"}},
        {"backbone": "timm/os.system", "options": {}},
        {"backbone": "timm/resnet18", "options": {"checkpoint_path": "evil.pt"}},
        {"backbone": "timm/resnet18", "options": {"pretrained": True}},
        {"backbone": "timm/hf_hub:evil/model", "options": {}},
        {"backbone": "timm/local-dir:evil", "options": {}},
    ],
)
def test_the_configuration_in_a_checkpoint_cannot_name_code(backbone: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    model = {"head_layers": 1, "head_hidden": 0, "dim": 2, "bn": "batch", "bn_group_size": 2} | backbone
    with pytest.raises((ValueError, TypeError)):
        build(read_encoder(valid_checkpoint({"model": model}, tmp_path / "there")))
    assert untouched(tmp_path)


def test_safetensors_metadata_is_text(tmp_path: Path) -> None:
    about = {
        "backbone": "os.system",
        "options": '{"command": "touch EVIL"}',
        "images": "{}",
        "config": "{}",
        "step": "1",
    }
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors", about)
    with pytest.raises(ValueError, match=r"os\.system"):
        build(read_encoder(tmp_path / "x.safetensors"))
    assert untouched(tmp_path)


# ---- code in configurations ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "+model.options._target_=os.system",
        "+model._target_=os.system",
        "+_target_=os.system",
        "+augment.second._target_=os.system",
        "+hydra.callbacks.evil={_target_: subprocess.call, _args_: [[touch, EVIL]]}",
        "model.backbone=os.system",
        "experiment=../../../evil",
    ],
)
def test_an_override_cannot_name_code(override: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (status,) = runs.wait(runs.start(run, override))
    assert status in (1, 2), runs.output(run)
    assert "Traceback" not in runs.output(run)
    assert len(runs.output(run).strip().splitlines()) == 1
    assert untouched(tmp_path)


# ---- names ----


@pytest.mark.slow
def test_names_of_images_and_runs_do_not_reach_a_shell(tmp_path: Path) -> None:
    """Train on files with shell commands as names, into a run with such a name."""
    root = tmp_path / "images $(touch EVIL)"
    root.mkdir()
    for number, name in enumerate(NASTY):
        for copy in range(4):
            noise(4 * number + copy, 16, 16).save(root / f"{copy}{name.replace('/', '_')}.png")
    broken = root / f"9{NASTY[0]}.png"
    broken.write_bytes(b"")
    run = tmp_path / "run $(touch EVIL) `touch EVIL`; touch EVIL"
    given = ["data=folder", f"data.root='{root}'", "data.workers=1", "data.on_bad_image=replace", "data.max_bad=0.2"]
    given += ["batch_size=16", "model.bn_group_size=8", "epochs=2", "method.queue_size=16"]
    (status,) = runs.wait(runs.start(run, *given))
    assert status == 0, runs.output(run)
    assert untouched(tmp_path)


def test_a_name_cannot_forge_a_line_of_a_table(tmp_path: Path) -> None:
    """Quotes, commas and line ends stay inside of their field. A formula stays one: see docs/reliability.md."""
    names = ['a",1,forged\n2,"b.png', "=HYPERLINK(1).png", "c,d.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    noise().save(tmp_path / "good.png")
    source = load_source(DataConfig("folder", str(tmp_path))).train
    unreadable = UnreadableImages(source, tmp_path / "bad_images.csv", max_fraction=0.9)
    unreadable.note({i: "empty" for i in range(len(source)) if source.name(i) in names})
    unreadable.synchronize()
    with (tmp_path / "bad_images.csv").open(newline="") as file:
        assert sorted(row["path"] for row in csv.DictReader(file)) == sorted(names)


# ---- programs that an image could start ----

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"


def odd_tiff(compression: int, strip: bytes) -> bytes:
    """A TIFF of 40 x 40 gray pixels whose header states this compression."""
    tags = [(256, 40), (257, 40), (258, 8), (259, compression), (262, 1), (273, 8), (277, 1), (278, 40)]
    tags.append((279, len(strip)))
    strip += bytes(len(strip) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install programs under the names that PIL calls, and return the file that they create."""
    mark, programs = tmp_path / "EVIL", tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "djpeg", "xdg-open", "display"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # PIL searches for it once per process
    return mark


def test_an_image_starts_no_program(ghostscript: Path, tmp_path: Path) -> None:
    """PIL would pass a PostScript file named .jpg to Ghostscript. Try everywhere that images are read."""
    root = folder(tmp_path / "images", good=9, unreadable=False)
    (root / "zz.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(ImageError, match="no known image format") as refused:
        decode(root / "zz.jpg")
    assert refused.value.kind == "no image"
    assert image_facts(str(root / "zz.jpg")).fault == "no image"

    data = DataConfig(name="folder", root=str(root), workers=1, max_bad=0.5)
    with pytest.raises(ValueError, match="1 of the 10 training images cannot be read"):
        check_data(CheckDataConfig(data, str(tmp_path / "report.json")))
    found = json.loads((tmp_path / "report.json").read_text())["unreadable"]
    assert [Path(each["path"]).name for each in found["no image"]["files"]] == ["zz.jpg"]

    pack(PackConfig(data, str(tmp_path / "packed")))
    with (tmp_path / "packed" / "skipped.csv").open(newline="") as file:
        assert [(row["path"], row["kind"]) for row in csv.DictReader(file)] == [("zz.jpg", "no image")]

    source = load_source(DataConfig("folder", str(root))).train
    images = ImageSet(source, np.arange(10), np.zeros((10, 2), np.float32))
    assert image_size(images, 9) == {"width": 0, "height": 0, "bytes": 0}
    with pytest.raises(ImageError, match="no known image format"):
        list(
            stream(
                pixels, image_files([str(root / "zz.jpg")], RGB), [0], EvalTransform(8), Inference(torch.device("cpu"))
            )
        )

    for compression in (1, 2, 3, 5, 6, 7, 8, 32773, 34676, 34712, 34925, 50000, 50001, 60000):
        (root / "odd.tif").write_bytes(odd_tiff(compression, POSTSCRIPT))
        with contextlib.suppress(ImageError):
            decode(root / "odd.tif")
    assert not ghostscript.exists()
    with contextlib.suppress(OSError), Image.open(root / "zz.jpg") as image:
        image.load()
    assert ghostscript.exists()  # this test would notice it


def test_every_listed_format_can_be_read(tmp_path: Path) -> None:
    """Each file name extension with its format, and formats under another extension."""
    names = Image.registered_extensions()
    assert {names[ending] for ending in IMAGE_ENDINGS} == set(IMAGE_FORMATS)
    stereo = io.BytesIO()
    noise().save(stereo, "MPO", save_all=True, append_images=[noise(1)])
    readable = {name: data for name, (data, _) in odd_files().items()} | {"stereo.jpg": stereo.getvalue()}
    readable |= {f"plain{ending}": encoded(noise(), names[ending]) for ending in IMAGE_ENDINGS}
    for name, data in readable.items():
        (tmp_path / name).write_bytes(data)
        assert decode(tmp_path / name).shape[0] == 3, name
        assert image_facts(str(tmp_path / name)).fault == "", name


# ---- bombs ----


@pytest.mark.parametrize("read", [checkpoint.load, read_encoder])
def test_a_zip_bomb_is_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "step_00000001.pt"
    torch.save({"weight": torch.zeros(10_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for each in plain.infolist():
            packed.writestr(each.filename, plain.read(each))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match=r"would unpack to 40,\d+,\d+ bytes, more than its size"):
        read(path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    """Reading all elements of this tensor would take a terabyte."""
    torch.save({"weight": torch.zeros(1).expand(2**38), "sha256": "0"}, tmp_path / "step_00000001.pt")
    with pytest.raises(CheckpointError, match=r"shape \(274877906944,\) is larger than its bytes"):
        checkpoint.load(tmp_path / "step_00000001.pt")


# ---- calls that this project must not contain ----


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(each.func), each) for each in ast.walk(tree) if isinstance(each, ast.Call)]


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), "")


def forbidden(name: str, call: ast.Call) -> bool:
    return (
        (name.endswith("Image.open") and keyword(call, "formats") != "IMAGE_FORMATS")
        or keyword(call, "shell") not in ("", "False")
        or keyword(call, "allow_pickle") not in ("", "False")
        or name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        or name in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "marshal.loads")
        or (name == "torch.load" and keyword(call, "weights_only") != "True")
        or name in ("hydra.utils.instantiate", "hydra.utils.call", "instantiate")
    )


def test_no_shell_no_unpickling_no_evaluation() -> None:
    assert [path.name for path in CODE if "from PIL.Image import" in path.read_text()] == []
    trees = {path.name: ast.parse(path.read_text()) for path in CODE}
    assert [(file, name) for file, tree in trees.items() for name, call in calls(tree) if forbidden(name, call)] == []
    assert forbidden(*calls(ast.parse("torch.load(path, weights_only=False)"))[0])
