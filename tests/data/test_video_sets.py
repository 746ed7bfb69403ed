"""Videos as a data set: labels and splits by file, packing, checking, and the commands that read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.check_data import check_data
from moco.config import DataConfig
from moco.config.check_data import CheckDataConfig
from moco.data.check import suggest
from moco.data.duplicates import copies_in, split_groups
from moco.data.opening import opening_lines
from moco.data.sources import load_source
from moco.data.video import VideoSource, video_of
from moco.evaluation.seen import held_out_seen
from moco.evaluation.subsets import SubsetError, split_each_class
from moco.interop.encoder_file import EncoderFile
from tests.data.images import names
from tests.data.packed import packed
from tests.data.videos import lossless, number_in, opened, two_classes, write_video

pytest.importorskip("av", reason="data=video needs the extra `video`")


def test_folders_are_classes_and_eval_root_is_held_out(tmp_path: Path) -> None:
    train, test = (
        two_classes(tmp_path / "train", 2, 3, **lossless()),
        two_classes(tmp_path / "test", 1, 3, **lossless()),
    )
    config = DataConfig("video", str(train), labels="folder", eval_root=str(test), frame_interval=0)
    sources = load_source(config)
    assert sources.bank is sources.train
    assert sources.train.classes == ("cat", "dog")
    assert sources.train.labels is not None
    assert sources.train.labels.tolist() == [0] * 6 + [1] * 6
    assert sources.held_out is not None
    assert sources.held_out.labels is not None
    assert sources.held_out.labels.tolist() == [0] * 3 + [1] * 3
    assert names(sources.held_out)[:2] == ["cat/0.mkv@0.000", "cat/0.mkv@0.040"]
    assert copies_in(sources.train, sources.held_out).tolist() == list(range(6))  # each shows a training video
    trained_on = EncoderFile("", "", "", {}, {}, config={"data": {"name": "video", "root": str(test)}})
    assert held_out_seen(config, 0.0, trained_on, sources.held_out)
    assert not held_out_seen(config, 0.0, trained_on, sources.train)


def test_a_label_file_has_one_row_per_video(tmp_path: Path) -> None:
    for i in range(3):
        write_video(tmp_path / f"{i}.mkv", 2, **lossless())
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\n0.mkv,cat,train\n1.mkv,dog,train\n2.mkv,dog,test\n")
    sources = load_source(DataConfig("video", str(tmp_path), label_file=str(table), frame_interval=0))
    assert sources.train.labels is not None
    assert sources.train.labels.tolist() == [0, 0, 1, 1]
    assert sources.held_out is not None
    assert names(sources.held_out) == ["2.mkv@0.000", "2.mkv@0.040"]
    table.write_text("path,label,split\n0.mkv,cat,train\n1.mkv,dog,train\n2.mkv,,unused\n")
    sources = load_source(DataConfig("video", str(tmp_path), label_file=str(table), frame_interval=0))
    assert (len(sources.train), sources.held_out) == (4, None)
    assert "not used: split unused (1 file)" in opening_lines(sources)
    table.write_text("path,label\n0.mkv,cat|dog\n1.mkv,dog\n2.mkv,\n")
    several = load_source(DataConfig("video", str(tmp_path), label_file=str(table), label_separator="|")).train
    assert several.multi_labels is not None
    assert several.multi_labels.tolist() == [[True, True], [False, True], [False, False]]


def test_weights_count_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a" / "x.mp4", 6)
    write_video(tmp_path / "b" / "y.mp4", 4)
    (tmp_path / "b" / "z.mp4").touch()
    source = opened(tmp_path / "a", more_roots=[str(tmp_path / "b")], weights=[1.0, 3.0])
    assert names(source)[5:8] == ["0/x.mp4@0.200", "1/y.mp4@0.000", "1/y.mp4@0.040"]
    assert source.draws == ((6, 6), (5, 15))
    assert number_in(source.image(7)) == 1
    two_classes(tmp_path / "c", 1, 2), two_classes(tmp_path / "d", 1, 2)
    config = DataConfig("video", str(tmp_path / "c"), labels="folder", eval_root=str(tmp_path / "d"), weights=[2.0])
    assert load_source(config).train.draws == ((2, 4),)  # the first frame of each video


def test_a_split_does_not_divide_a_video(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "videos", 3, 4, **lossless())
    (root / "cat" / "copy.mkv").write_bytes((root / "cat" / "0.mkv").read_bytes())
    fields: dict[str, Any] = {"labels": "folder", "frame_interval": 0.0}
    source = opened(root, **fields)
    resident = load_source(DataConfig("video", str(root), resident=True, **fields)).train
    shards = packed(tmp_path / "packed", root, data_name="video", data_labels="folder", data_frame_interval=0.0)
    for each in (source, resident, load_source(DataConfig("shards", str(shards))).train):
        assert names(each) == names(source)
        groups = split_groups(each)
        videos = [video_of(name).replace("copy", "0") for name in names(source)]  # a copy belongs to its original
        assert [videos[i] for i in groups.tolist()] == videos
        assert len(set(groups.tolist())) == len(set(videos)) == 6
        assert each.labels is not None
        rest, held = split_each_class(each.labels, 0.3, 0, 1, groups)
        assert not {videos[i] for i in rest} & {videos[i] for i in held}
        assert set(each.labels[held].tolist()) == {0, 1}
    end = source.subset(np.arange(len(source))[::-1])  # the last frames are copies of no later ones
    assert len(split_groups(end)) == len(source)
    one = source.subset(np.arange(4))
    with pytest.raises(SubsetError, match="frames of one video"):
        split_each_class(np.zeros(4, np.int64), 0.3, 0, 1, split_groups(one))


def test_packed_frames_have_the_same_pixels_and_names(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mkv", 5, **lossless())
    (tmp_path / "videos" / "b.mkv").touch()
    source = opened(tmp_path / "videos")
    shards = packed(
        tmp_path / "packed", tmp_path / "videos", data_name="video", data_frame_interval=0.0, data_max_bad=0.2
    )
    images = load_source(DataConfig("shards", str(shards))).train
    assert names(images) == names(source)[:5]
    assert all(torch.equal(images.image(i), source.image(i)) for i in range(5))
    assert "b.mkv,empty" in (shards / "skipped.csv").read_text()
    small = packed(
        tmp_path / "small",
        tmp_path / "videos",
        data_name="video",
        data_frame_interval=0.0,
        data_max_bad=0.2,
        short_side=32,
    )
    assert load_source(DataConfig("shards", str(small))).train.image(3).shape == (3, 32, 64)


def test_check_data_counts_frames_and_lists_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "videos"
    write_video(root / "a.mp4", 10, aspect=2)
    write_video(root / "b.mkv", 10, **lossless())
    (root / "c.avi").touch()
    (root / "d.jpg").touch()
    output = tmp_path / "report.json"
    data = DataConfig("video", str(root), frame_interval=0.2, workers=0)
    with pytest.raises(ValueError, match=r"1 of the 5 training images cannot be read"):
        check_data(CheckDataConfig(data, str(output), stats=True))
    report = json.loads(output.read_text())
    assert (report["pictures"], report["ignored"]) == (5, {".jpg": 1})
    assert report["formats"] == {"mpeg4 yuv420p": 2, "ffv1 bgr0": 2}
    assert report["unreadable"]["empty"]["files"][0]["path"] == str(root / "c.avi")
    assert report["odd"]["oblong pixels"]["files"][1]["path"] == f"{root / 'a.mp4'}@0.200"
    assert report["bytes"] == sum((root / name).stat().st_size for name in ("a.mp4", "b.mkv"))
    assert len(report["stats"]["mean"]) == 3
    assert "5 images" in capsys.readouterr().out


def test_check_data_suggests_to_pack_videos() -> None:
    data = DataConfig("video", "CLIPS", labels="folder", frame_interval=0.5)
    packing = suggest(data, 5000, 40_000)[0]
    assert packing.startswith("next: python -m moco.pack")
    for override in (
        "data=video",
        "data.root=CLIPS",
        "data.frame_interval=0.5",
        "data.labels=folder",
        "short_side=256",
    ):
        assert override in packing
    few = suggest(data, 50, 40_000)[-1]
    assert "moco.embed" in few
    assert "data=video data.root=CLIPS data.frame_interval=0.5" in few


def test_a_subset_keeps_names_and_faults(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 4)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    subset = opened(tmp_path).subset(np.array([4, 1]))
    assert isinstance(subset, VideoSource)
    assert names(subset) == ["b.mp4", "a.mp4@0.040"]
    assert (subset.content_fingerprints() < 0).tolist() == [True, False]
