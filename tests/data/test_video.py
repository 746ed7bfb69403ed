"""Frames of videos: the exact frame at each time, in any order and process; upright, with square pixels."""

import itertools
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.config import ConfigError, DataConfig
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.video import video_of
from moco.data.video_file import turned
from moco.data.view import View
from moco.data.workers import in_order
from tests.data.images import names
from tests.data.videos import HEIGHT, WIDTH, frame_of, lossless, number_in, opened, write_video

pytest.importorskip("av", reason="data=video needs the extra `video`")
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("a.mp4", "mpeg4", {"b_frames": 2}),
    ("a.mp4", "libx264", {"b_frames": 3, "gop": 250}),
    ("a.mov", "mjpeg", {"pixels": "yuvj420p"}),
    ("a.mkv", "ffv1", {}),
    ("a.mkv", "libx264", {"b_frames": 3, "gop": 9}),
    ("a.mkv", "libx265", {"gop": 9, "options": {"x265-params": "log-level=none"}}),
    ("a.avi", "mpeg4", {}),
    ("a.avi", "mpeg4", {"b_frames": 2}),
    ("a.webm", "libvpx", {}),
    ("a.webm", "libvpx-vp9", {}),
    ("a.ts", "mpeg2video", {"b_frames": 2}),
    ("a.mpg", "mpeg2video", {"b_frames": 2}),
    ("a.wmv", "wmv2", {}),
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS)
def test_every_frame_is_exact_in_any_order(tmp_path: Path, name: str, codec: str, options: dict[str, Any]) -> None:
    write_video(tmp_path / name, 40, codec, **options)
    source = opened(tmp_path)
    assert names(source) == [f"{name}@{i / 25:.3f}" for i in range(40)]
    forward = [source.image(i) for i in range(40)]
    assert [number_in(each) for each in forward] == list(range(40))
    order = np.random.default_rng(0).permutation(40).tolist()
    assert all(torch.equal(source.image(i), forward[i]) for i in [*order, *range(0, 40, 6), *range(39, -1, -5)])


def test_pixels_are_those_that_were_written(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", **lossless())
    image = opened(tmp_path).image(11)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), frame_of(11))
    assert image.permute(1, 2, 0).is_contiguous()  # channels last in memory, as of decoded files
    gray = opened(tmp_path, channels=1).image(11)
    assert np.array_equal(gray[0].numpy(), frame_of(11)[..., 0])


@pytest.mark.parametrize(("interval", "frames"), [(1.0, (0, 25, 50)), (0.5, (0, 13, 25, 38, 50)), (0.04, range(60))])
def test_an_interval_gives_its_first_frame(tmp_path: Path, interval: float, frames: Any) -> None:
    write_video(tmp_path / "a.mp4", 60)
    source = opened(tmp_path, frame_interval=interval)
    assert [number_in(source.image(i)) for i in range(len(source))] == list(frames)


def test_a_variable_frame_rate_keeps_the_times(tmp_path: Path) -> None:
    times = [0, 20, 40, 1500, 1600, 5000, 5999, 6001]
    write_video(tmp_path / "a.mkv", len(times), "ffv1", times=times)
    every, seconds = opened(tmp_path), opened(tmp_path, frame_interval=1.0)
    assert names(every) == [f"a.mkv@{each / 1000:.3f}" for each in times]
    assert names(seconds) == ["a.mkv@0.000", "a.mkv@1.500", "a.mkv@5.000", "a.mkv@6.001"]
    assert [number_in(seconds.image(i)) for i in range(4)] == [0, 3, 5, 7]


def test_names_of_frames_lie_below_the_root_and_name_their_video(tmp_path: Path) -> None:
    write_video(tmp_path / "x@1" / "Kühe.MP4", 2)
    assert names(opened(tmp_path)) == ["x@1/Kühe.MP4@0.000", "x@1/Kühe.MP4@0.040"]
    assert [video_of(name) for name in names(opened(tmp_path))] == ["x@1/Kühe.MP4"] * 2
    assert [video_of(name) for name in ("a.mp4", "a.jpg", "a.mp4@1.000.jpg", "a@1.000", "digits/7")] == [""] * 5


SIGNS = [each for each in itertools.product((-1, 0, 1), repeat=4) if abs(np.linalg.det(np.reshape(each, (2, 2)))) == 1]
ORIENTATIONS = [(a, b, c, d) for a, b, c, d in SIGNS if (a == 0) == (d == 0) == (b != 0) == (c != 0)]


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_a_display_matrix_moves_each_pixel_as_ffmpeg_defines(matrix: tuple[int, int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3))
    a, b, c, d = matrix
    places = {(x, y): (a * x + c * y, b * x + d * y) for x in range(5) for y in range(3)}
    left, top = (min(place[axis] for place in places.values()) for axis in (0, 1))
    shown = turned(image, matrix)
    assert all((shown[y1 - top, x1 - left] == image[y, x]).all() for (x, y), (x1, y1) in places.items())


def test_rotated_videos_are_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "plain.mp4", 3)
    try:
        for degrees in (90, 180, -90):
            write_video(tmp_path / f"{degrees}.mp4", 3, degrees=degrees)
    except AttributeError:
        pytest.skip("this PyAV cannot write a rotation")
    images = {name.split(".")[0]: opened(tmp_path).image(i) for i, name in enumerate(names(opened(tmp_path)))}
    for degrees in (90, 180, -90):
        assert torch.equal(images[str(degrees)], torch.rot90(images["plain"], degrees // 90, (1, 2)))


def test_oblong_pixels_become_square(tmp_path: Path) -> None:
    write_video(tmp_path / "tall.mp4", 9, aspect=Fraction(1, 2))
    write_video(tmp_path / "wide.mp4", 9, aspect=Fraction(2))
    source = opened(tmp_path)
    shapes = {name.split(".")[0]: source.image(i).shape[1:] for i, name in enumerate(names(source))}
    assert shapes == {"tall": (2 * HEIGHT, WIDTH), "wide": (HEIGHT, 2 * WIDTH)}
    assert [number_in(source.image(i)) for i in range(18)] == [*range(9), *range(9)]


def test_threads_and_processes_read_the_same_pixels(tmp_path: Path) -> None:
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", 24, b_frames=2)
    source = opened(tmp_path)
    one = [source.image(i) for i in range(48)]  # this process now has a file open, which workers must not share
    many = list(in_order(source.image, range(48), 2, "data.workers"))
    assert all(map(torch.equal, one, many))
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: source.image(i)})) for i in range(0, 48, 7)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(one[i], image) for i, image in found.items())


def test_views_do_not_depend_on_workers_and_resuming(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 24)
    source, plan, views = opened(tmp_path), Plan(24, 8, epochs=2, seed=3), [View(size=16)] * 2

    def read(workers: int, start: int = 0) -> list[Batch]:
        return list(batches(source, plan, views, torch.device("cpu"), workers, start))

    alone, several, resumed = read(0), read(2), read(1, start=4)
    assert len(alone) == 6
    for first, second in [*zip(alone, several, strict=True), *zip(alone[4:], resumed, strict=True)]:
        assert torch.equal(first.index, second.index)
        assert all(map(torch.equal, first.views, second.views))


def test_without_pyav_a_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"data\.name=video needs av: pip install av \(extra 'video'\)"):
        load_source(DataConfig("video", str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": 4}, r"data\.channels=4 data\.dtype=uint8"),
        ({"dtype": "uint16"}, r"data\.channels=3 data\.dtype=uint16"),
        ({"frame_interval": -1.0}, r"data\.frame_interval=-1\.0 must be at least 0"),
        ({"name": "folder", "frame_interval": 2.0}, r"data\.frame_interval=2.0 works with data\.name=video"),
        ({"eval_root": "x"}, r"data\.eval_root='x' needs labels"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    write_video(tmp_path / "a.mp4", 2)
    with pytest.raises(ValueError, match=sentence):
        load_source(DataConfig(**({"name": "video", "root": str(tmp_path)} | fields)))


def test_folders_without_videos_or_images_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no videos: found 1 \.jpg; videos are files that end in \.mp4"):
        opened(tmp_path)
    (tmp_path / "a.jpg").rename(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match=r"holds no images: found 1 \.mp4.*data=video uses the frames"):
        load_source(DataConfig("folder", str(tmp_path)))
