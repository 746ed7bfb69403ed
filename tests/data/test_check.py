"""`moco.check_data` finds and counts every planted fault, and reports whether a run would end."""

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco.api import train_config
from moco.check_data import check_data
from moco.cli import run_command
from moco.config import ConfigError, DataConfig
from moco.config.check_data import CheckDataConfig
from moco.config.recommended import BUDGET
from moco.data import check as module
from moco.data import image_facts as image_facts_module
from moco.data.check import suggest
from moco.data.decode import FAULTS, ImageError
from moco.data.image_facts import ODDITIES, image_facts
from moco.files import WriteError
from tests.data.images import write_image
from tests.data.unreadable_files import encoded, folder, forbid, noise, odd_files, tiff, unreadable_files
from tests.full_disk import full_at

OF_VIDEOS = {"rotated", "oblong pixels", "interlaced"}


def test_an_error_about_a_split_names_a_file_of_that_split(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 1)):
        for i in range(count):
            for label in "ab":
                write_image(tmp_path / split / label / f"{i}.png", i)
    (tmp_path / "train/a/0.png").write_bytes(b"no image")
    for label in "ab":
        whole = (tmp_path / "test" / label / "0.png").read_bytes()
        (tmp_path / "test" / label / "0.png").write_bytes(whole[: len(whole) // 2])
    where = {"root": str(tmp_path / "train"), "labels": "folder", "eval_root": str(tmp_path / "test")}
    checked(tmp_path / "report.json", r"none of the 2 held-out images can be read \(\S+/test/a/0\.png: ", **where)


def checked(output: Path, error: str = "", **data: Any) -> dict[str, Any]:
    """Return the report; `error` is the pattern of the expected error, "" if none is expected."""
    config = CheckDataConfig(DataConfig(name="folder", **({"workers": 0} | data)), str(output))
    if error:
        with pytest.raises(ValueError, match=error) as caught:
            check_data(config)
        assert "\n" not in str(caught.value)
    else:
        check_data(config)
    report: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return report


def names(entry: dict[str, Any]) -> list[str]:
    return [Path(each["path"]).name for each in entry["files"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_planted_fault_is_found(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "images", odd=True)
    for name in ("notes.txt", "Makefile", ".hidden.png", "phone.HEIC"):
        (root / name).write_text("x")
    (root / "bands.tif").write_bytes(tiff(8, 8, bands=13))
    (root / "circle").symlink_to(root / "circle")
    (root / "nowhere.png").symlink_to(root / "gone.png")
    (root / "up").symlink_to(tmp_path)
    report = checked(
        tmp_path / "report.json", r"9 of the 30 training images .*report\.json", root=str(root), workers=workers
    )
    wanted: dict[str, list[str]] = {"broken link": ["circle", "nowhere.png"], "unsupported": ["bands.tif"]}
    for name, (_, kind) in (unreadable_files() | odd_files()).items():
        wanted.setdefault(kind, []).append(name)
    assert set(wanted) == (set(FAULTS) | set(ODDITIES)) - {"unreadable", "huge", *OF_VIDEOS}  # in tests of their own
    found = report["unreadable"] | report["odd"]
    assert {kind: sorted(names(entry)) for kind, entry in found.items()} == {
        kind: sorted(each) for kind, each in wanted.items()
    }
    assert all(entry["count"] == len(entry["files"]) for entry in found.values())
    assert report["pictures"] == 30
    assert report["unreadable"]["broken link"]["files"] == [
        {"path": str(root / "nowhere.png"), "reason": f"a link to {root}/gone.png: No such file or directory"},
        {"path": str(root / "circle"), "reason": f"a link to {root}/circle, ignored"},
    ]
    assert report["ignored"] == {".txt": 1, "without ending": 1, "hidden": 1, ".heic": 1}
    assert report["formats"]["JPEG CMYK"] == 1
    assert sum(report["formats"].values()) == 21
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in wanted)
    assert "ignored: .txt" in printed
    assert "to use .heic, convert to JPEG or PNG" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file/report.json", "file is a file, not a folder"),
        ("/proc/report.json", "No such file or directory"),
        ("/dev/full", "a device or pipe, not a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_image_is_read(
    output: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.delattr(module, "load_source")
    data = DataConfig(name="folder", root=str(folder(tmp_path / "images")), workers=0)
    with pytest.raises(ConfigError, match=rf"^output={output} cannot be written \({reason}\): set output=FILE"):
        check_data(CheckDataConfig(data, output))


def test_the_findings_are_printed_if_the_disk_becomes_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "images", unreadable=False)
    full_at(monkeypatch, "report.json")
    with pytest.raises(WriteError, match=r"^.*report\.json cannot be written \(No space left on device\)"):
        checked(tmp_path / "report.json", root=str(root))
    printed = capsys.readouterr().out
    assert "PNG RGB" in printed
    megabytes = sum(each.stat().st_size for each in root.rglob("*.png")) / 1e6
    assert f"{megabytes:.2f} MB" in printed
    assert "written" not in printed


def test_a_folder_without_faults_passes(tmp_path: Path) -> None:
    report = checked(
        tmp_path / "out/report.json", root=str(folder(tmp_path / "images", unreadable=False)), resident=True
    )
    assert report["unreadable"] == report["odd"] == report["ignored"] == {}
    assert report["formats"] == {"PNG RGB": 6}
    assert report["sizes"]["frequent"] == {"40 x 30": 6}
    assert report["sizes"]["width"] == [40] * 5
    assert report["sizes"]["height"] == [30] * 5
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "images").iterdir())


def test_obstacles_depend_on_the_data_fields(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=19, unreadable=False)
    (root / "unreadable.png").write_bytes(b"")
    output = tmp_path / "report.json"
    checked(
        output, r"1 of the 20 training images .*set data\.on_bad_image=replace data\.max_bad=0\.05\)", root=str(root)
    )
    checked(output, root=str(root), on_bad_image="replace", max_bad=0.05)
    checked(output, r"or set data\.max_bad=0\.05\)", root=str(root), on_bad_image="replace", max_bad=0.04)
    (root / "unreadable.png").unlink()
    noise(height=31).save(root / "tall.png")
    checked(output, root=str(root))
    checked(output, "the training images have 2 sizes: data.resident=true needs one", root=str(root), resident=True)


def test_obstacles_name_the_fields_that_read_intact_images(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    root = folder(tmp_path / "images", good=2, unreadable=False)
    tifffile.imwrite(root / "bands.tif", np.ones((4, 9, 9), np.uint16), photometric="minisblack", planarconfig=2)
    found = r"1 of the 3 training .*bands\.tif: .*set data\.channels=4 data\.dtype=uint16.*; otherwise repair"
    checked(tmp_path / "report.json", found, root=str(root))
    checked(tmp_path / "report.json", found, root=str(root), on_bad_image="replace")


def test_duplicates_and_images_in_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / part).mkdir(parents=True)
    for number, name in enumerate(("train/a/1", "train/a/2", "train/b/3", "test/a/4", "test/b/5", "test/b/6")):
        noise(number).save(tmp_path / f"{name}.png")
    for copy, of in (("train/b/9", "train/a/1"), ("test/a/1", "train/a/1"), ("test/a/7", "test/b/5")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{of}.png").read_bytes())
    report = checked(tmp_path / "report.json", root="train", labels="folder", eval_root="test")
    entry = report["duplicates"]
    groups = sorted([os.path.relpath(path, tmp_path) for path in group] for group in entry["groups"])
    assert groups == [["test/a/7.png", "test/b/5.png"], ["train/a/1.png", "train/b/9.png", "test/a/1.png"]]
    assert (entry["count"], entry["held_out_in_training"]) == (3, 1)
    assert "test/a/7.png = test/b/5.png" in capsys.readouterr().out


def test_an_unreadable_held_out_image_is_an_obstacle(tmp_path: Path) -> None:
    for part in ("train/a", "train/b", "test/a", "test/b"):
        folder(tmp_path / part, good=1, unreadable=False)
    (tmp_path / "test/b/00.png").write_bytes(b"")
    where = {"root": str(tmp_path / "train"), "labels": "folder", "eval_root": str(tmp_path / "test")}
    checked(tmp_path / "report.json", "1 of the 2 held-out images cannot be read", **where)


def test_files_beyond_the_limit_are_counted_but_not_listed(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=1, unreadable=False)
    for i in range(40):
        (root / f"unreadable{i:02}.png").write_bytes(b"")
    config = CheckDataConfig(DataConfig(name="folder", root=str(root), workers=2), str(tmp_path / "r.json"), listed=3)
    with pytest.raises(ValueError, match="40 of the 41"):
        check_data(config)
    entry = json.loads((tmp_path / "r.json").read_text())["unreadable"]["empty"]
    assert (entry["count"], names(entry)) == (40, ["unreadable00.png", "unreadable01.png", "unreadable02.png"])


def test_missing_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = image_facts(str(tmp_path / "gone.png"))
    assert (facts.fault, facts.reason) == ("unreadable", "No such file or directory")

    def denied(self: Path) -> bytes:  # the tests may run as root, who can read any file
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    facts = image_facts(str(tmp_path / "secret.png"))
    assert (facts.fault, facts.reason) == ("unreadable", "Permission denied")


def test_a_folder_that_cannot_be_listed_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "images", good=2)
    folder(root / "closed", good=1, unreadable=False)
    forbid(monkeypatch, root / "closed")
    words = r"1 folder cannot be read \(give this user .*; 7 of the 9 training images"
    report = checked(tmp_path / "report.json", words, root=str(root))
    entry = report["unreadable"]
    assert entry["unreadable folder"]["files"] == [{"path": str(root / "closed"), "reason": "Permission denied"}]
    assert entry["empty"]["count"] == 1
    clean = folder(tmp_path / "clean", unreadable=False)
    forbid(monkeypatch, clean)
    with pytest.raises(ValueError, match=r"data\.root=.* cannot be listed: \."):
        check_data(CheckDataConfig(DataConfig(name="folder", root=str(clean))))


def test_huge_and_sixteen_bit_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(image_facts_module, "HUGE", 1199)
    assert image_facts(str(tmp_path / "a.png")).odd == ("huge",)
    gray = np.full((9, 9), 40_000, np.uint16)
    (tmp_path / "b.tif").write_bytes(encoded(Image.fromarray(gray), "TIFF"))
    assert image_facts(str(tmp_path / "b.tif")).odd == ("16 bits",)


def test_a_worker_that_dies_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "images", good=2, unreadable=False)
    monkeypatch.setattr(module, "image_facts", _die)
    checked(tmp_path / "r.json", r"data\.workers=1.*00\.png \.\.\. 01\.png", root=str(root), workers=1)


def _die(path: str, *_: object) -> None:
    os._exit(9)


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "images", good=1, unreadable=False)
    name = os.fsdecode(b"[red]caf\xe9.png")
    (root / name).write_bytes(b"")
    report = checked(tmp_path / "report.json", "1 of the 2", root=str(root))
    assert names(report["unreadable"]["empty"]) == [name]
    assert "[red]caf\\udce9.png" in capsys.readouterr().out


def test_other_data_sets_are_refused(tmp_path: Path) -> None:
    for data, words in (
        (DataConfig(name="cifar10"), "folder, imagenet"),
        (DataConfig(name="webdataset", root="a.tar"), r"data\.name='webdataset' must be one of"),
        (DataConfig(name="folder", workers=-1), "-1"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_data(CheckDataConfig(data))
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*found nothing"):
        check_data(CheckDataConfig(DataConfig(name="folder", root=str(tmp_path))))
    assert issubclass(ImageError, ValueError)  # which the commands print as one sentence


def test_the_report_of_another_folder_is_not_replaced_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        folder(tmp_path / name, good=2, unreadable=False)
    monkeypatch.chdir(tmp_path)
    ends = []
    for root in ("a", str(tmp_path / "a"), "b", "b"):
        check_data(CheckDataConfig(DataConfig(name="folder", root=root, workers=0)))
        printed = " ".join(capfd.readouterr().out.split())
        ends.append(printed.partition("with the files of each kind")[2].partition(" 2 images are too few")[0])
    assert ends == ["", "", f"; it replaced the report of {tmp_path / 'a'}", ""]
    Path("check_data.json").write_text("[1]")
    check_data(CheckDataConfig(DataConfig(name="folder", root="b", workers=0)))
    assert "it replaced a file that was no report" in " ".join(capfd.readouterr().out.split())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "images", good=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moco.check_data", "data.root=images"])
    with pytest.raises(SystemExit) as caught:
        run_command("check_data", CheckDataConfig, check_data)
    assert caught.value.code == 1
    printed = capfd.readouterr()
    assert printed.err.startswith("moco: ")
    assert "7 of the 9 training images cannot be read" in printed.err
    assert printed.err.count("\n") == 1
    assert "bomb.png" in printed.out
    assert (tmp_path / "check_data.json").is_file()
    assert f"written: {tmp_path / 'check_data.json'}, with the files of each kind" in " ".join(printed.out.split())


def test_a_folder_without_faults_gets_a_training_command_that_fits_it() -> None:
    data = DataConfig(name="folder", root="my images", labels="folder")
    command, time = suggest(data, 250, BUDGET)
    assert "experiment=moco_v2_small epochs=160 method.queue_size=64" in command
    assert "'data.root=\"my images\"'" in command
    assert "data.labels=folder" in command
    assert "10 minutes" in time
    for images in (20, 60, 199):  # no training command beside the advice against it
        advice, command = suggest(data, images, BUDGET)
        assert "published" in advice
        assert command.startswith("next: python -m moco.embed checkpoint=FILE backbone=resnet18 ")
        assert "data=folder 'data.root=\"my images\"'" in command
    assert "moco_v2_folder" in suggest(data, 10**6, BUDGET)[0]
    command, time = suggest(data, 250, BUDGET, drawn=1000)  # with data.weights an epoch draws each image four times
    assert "epochs=40 " in command
    assert "10 minutes" in time


def test_values_with_a_large_offset_get_no_brightness() -> None:
    data = DataConfig(name="folder", root="kelvin", channels=1, dtype="float32")
    command, _, reason = suggest(data, 250, BUDGET, {"mean": [280.0], "std": [10.7]})
    assert command.endswith(" augment.brightness=0")
    assert "standard deviation" in reason
    assert "augment.size=64 augment.eval_resize=72 " in command  # views for which the time holds
    assert "brightness" not in suggest(data, 250, BUDGET, {"mean": [0.5], "std": [0.2]})[0]
    assert suggest(data, 100, BUDGET, {"mean": [0.5], "std": [0.2]})[-1].startswith("100 images are few: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"root": "data"},  # the default of the schema, but not of the recipe
        {"root": "a", "more_roots": ["b", "my c"], "weights": [1.0, 0.5, 3.0], "labels": "folder", "eval_root": "e"},
        {"root": "a", "label_file": "x.csv", "label_separator": ";", "split": "fit", "eval_split": "hold"},
        {"root": "a", "on_bad_image": "replace", "max_bad": 0.2, "resident": True, "bits": 12, "workers": 0},
        {"root": "a", "channels": 4, "dtype": "uint8", "preview": [2, 1, 0]},
        {"root": "a", "channels": 1},
    ],
)
def test_the_next_commands_repeat_all_fields_of_the_data(fields: dict[str, Any]) -> None:
    data = DataConfig(name="folder", **fields)
    channels = data.channels
    for images in (250, 10**6):
        (line, *_) = suggest(data, images, BUDGET, {"mean": [0.5] * channels, "std": [0.25] * channels})
        overrides = shlex.split(line.partition(" moco.train ")[2])
        composed = train_config(overrides)
        assert asdict(composed.data) == asdict(data)
        assert composed.augment.mean == [0.5] * channels
    if channels == 3:
        arguments = shlex.split(suggest(data, 20, BUDGET)[1].partition(" moco.embed ")[2])
        named = {each.partition("=")[0] for each in arguments if each.startswith("data.")}
        training_only = {"weights", "on_bad_image", "max_bad"}
        assert named == {f"data.{name}" for name in fields if name not in training_only}
        assert ("on_bad_image=skip" in arguments) == (data.on_bad_image == "replace")


def test_weights_and_splits_enter_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [folder(tmp_path / name, good=count, unreadable=False) for name, count in (("a", 200), ("b", 100))]
    checked(tmp_path / "report.json", root=str(roots[0]), more_roots=[str(roots[1])], weights=[1.0, 3.0])
    printed = " ".join(capsys.readouterr().out.split())
    assert "300 images, " in printed
    assert "epochs=80 " in printed  # 40,000 / (200 + 3 * 100)
    for i, split in enumerate(("train", "test")):
        for label in ("cat", "dog"):
            folder(tmp_path / split / label, good=2 + i, unreadable=False)
    report = checked(
        tmp_path / "report.json",
        root=str(tmp_path / "train"),
        labels="folder",
        eval_root=str(tmp_path / "test"),
    )
    assert report["splits"] == {"training": 4, "held_out": 6}
    assert "4 training + 6 held-out images, " in " ".join(capsys.readouterr().out.split())


def test_images_that_all_fail_name_the_reason(tmp_path: Path) -> None:
    """No value of data.max_bad would help."""
    folder(tmp_path / "images", good=3, unreadable=False)
    reason = r"none of the 3 training images can be read \(.*0\.png: .*data\.channels=2\)"
    checked(tmp_path / "report.json", reason, root=str(tmp_path / "images"), channels=2)


@pytest.mark.parametrize("output", [".", "/", "images"])
def test_a_folder_as_the_report_is_refused_before_images_are_read(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "images", good=1, unreadable=False)
    with pytest.raises(
        ConfigError, match=rf"output={output} is a folder: name a file, e\.g\. output=.*check_data\.json"
    ):
        check_data(CheckDataConfig(DataConfig(name="folder", root="images"), output=output))
