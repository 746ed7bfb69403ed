"""`moco.pack` repairs a damaged folder, and refuses one with other labels in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moco.check_data import check_data
from moco.config import ConfigError, DataConfig, RunWarning
from moco.config.check_data import CheckDataConfig, check_check_data
from moco.config.pack import PackConfig
from moco.data import pack as stage
from moco.data import pack_output
from moco.data.sources import load_source
from moco.data.workers import in_order
from tests.data.packed import class_folders, packed
from tests.data.test_pack import Noting, everything
from tests.data.unreadable_files import encoded, noise


@pytest.mark.parametrize(
    ("files", "start"),  # of packing again: earlier images are kept
    [
        (["train-000002.tar"], 5),
        (["train.npy"], 0),
        (["skipped.csv"], 24),
        (["skipped.csv", "train-000001.tar", "train.npy"], 0),
    ],
)
def test_a_damaged_folder_is_repaired(
    files: list[str], start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folders(tmp_path / "train", count=24)
    (root / "cat" / "01bad.jpg").write_bytes(b"not an image")
    (root / "dog" / "99bad.jpg").write_bytes(b"none")  # the last: in no shard
    output = packed(tmp_path / "out", root, data_labels="folder", data_max_bad=0.1, short_side=16, shard_mb=0.008)
    before = everything(output)
    for number, name in enumerate(files):
        if number:
            (output / name).unlink()
        else:
            (output / name).write_bytes(before[name][:-1] + b"x")
    monkeypatch.setattr(stage, "in_order", calls := Noting(in_order))
    with pytest.warns(RunWarning, match=r"damaged \(SHA-256\): .*train|damaged \(SHA-256\): .*skipped"):
        packed(output, root, data_labels="folder", data_max_bad=0.1, short_side=16, shard_mb=0.008)
    assert "repaired" in capsys.readouterr().out
    assert everything(output) == before
    if start:
        assert calls.starts[0] >= start
    else:
        assert calls.starts == [0]
    packed(output, root, data_labels="folder", data_max_bad=0.1, short_side=16, shard_mb=0.008)
    assert "already packed" in capsys.readouterr().out


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    output = packed(tmp_path / "out", root)
    index = output / "index.json"
    index.write_text(index.read_text().replace('"pictures": 12', '"pictures": 13'))
    with pytest.raises(ValueError, match=r"index\.json is damaged: .*remove .*out and pack"):
        packed(output, root)


def interrupted(output: Path, root: Path) -> None:
    """Pack everything except the index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "finish", _no_disk)
        with pytest.raises(ValueError, match="cannot be written"):
            packed(output, root)
    assert len(list((output / "parts").glob("*.npz"))) >= 3


def _no_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_damaged_part_is_packed_again(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    complete = everything(packed(tmp_path / "complete", root))
    output = tmp_path / "out"
    interrupted(output, root)
    part = output / "parts" / "train-000001.npz"
    good = part.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(good), 12):
        data = bytearray(good)
        data[at : at + 4] = rng.bytes(4)
        part.write_bytes(data[: len(good)])
        packer = stage.Packer(
            PackConfig(DataConfig(), str(output)), "train", load_source(DataConfig("folder", str(root))).train
        )
        assert len(packer.parts) >= 1
        for file in packer.parts:  # the kept parts can be read
            pack_output.read_part(file)
    interrupted(output, root)
    (output / "parts" / "train-000001.npz").unlink()  # a gap
    packed(output, root)
    assert everything(output) == complete


def test_damaged_settings_of_an_unfinished_folder(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    interrupted(tmp_path / "out", root)
    file = tmp_path / "out" / "parts" / "settings.json"
    for text in (file.read_text().replace("0.012", "0.112"), "[]", "{}", "\udc80".encode("utf-8", "surrogatepass")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"settings\.json is damaged: remove .*out and start again"):
            packed(tmp_path / "out", root)


@pytest.mark.parametrize("finished", [True, False])
def test_other_labels_of_the_same_images_are_refused(finished: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b", "c", "d"]),
            "coarse": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    rows = {
        "image": [{"bytes": encoded(noise(i), "JPEG"), "path": None} for i in range(4)],
        "fine": [0, 1, 2, 3],
        "coarse": [0, 0, 1, 1],
    }
    root = tmp_path / "set"
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(root))

    def run(column: str) -> None:
        packed(tmp_path / "out", root, data_name="huggingface", data_label_column=column)

    if finished:
        run("fine")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "finish", _no_disk)
            with pytest.raises(ValueError, match="cannot be written"):
                run("fine")
    for other in ("coarse", "none"):
        with pytest.raises(ConfigError, match=rf"other labels or .* \(data\.label_column='fine'; now '{other}'\)"):
            run(other)
    run("fine")
    assert (tmp_path / "out" / "index.json").is_file()


def test_a_copy_is_checked_without_the_original_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "train")
    copy = Path(shutil.move(packed(tmp_path / "out", root), tmp_path / "copy"))
    shutil.rmtree(root)
    report = tmp_path / "report.json"
    config = CheckDataConfig(DataConfig("shards", str(copy)), str(report))
    check_check_data(config)
    check_data(config)
    assert "12 train images in 3 shards; every file is intact (SHA-256)" in " ".join(capsys.readouterr().out.split())
    assert json.loads(report.read_text())["damaged"] == []
    shard = copy / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (copy / "train.npy").unlink()
    with pytest.raises(
        ValueError, match=r"copy: 2 files are missing or damaged .*train\.npy.*: copy such files again, or run"
    ):
        check_data(config)
    assert sorted(json.loads(report.read_text())["damaged"]) == ["train-000001.tar", "train.npy"]
    config.stats = True
    with pytest.raises(ConfigError, match="stats=true needs the original images"):
        check_check_data(config)
