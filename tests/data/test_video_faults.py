"""Videos that cannot be read, or only in part: each fault is one unreadable image, and the other frames are used."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.data.decode import FAULTS, ImageError
from moco.data.unreadable import find_unreadable, image_or_substitute
from moco.data.video import VideoSource
from tests.data.images import names
from tests.data.videos import av, number_in, opened, write_video

pytest.importorskip("av", reason="data=video needs the extra `video`")


def music(path: Path, video: bool = False) -> None:
    """Write a file with sound only; with `video`, it has a video stream without frames."""
    with av.open(str(path), "w") as container:
        if video:
            container.add_stream("ffv1", rate=25, width=64, height=64, pix_fmt="yuv420p").codec_context.open()
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def playlist(path: Path) -> None:
    """Write a list that names another video, as if it were a video."""
    other = write_video(path.parent / "other" / "secret.ts", codec="mpeg2video")
    other.rename(other.with_suffix(".hidden"))
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:9", "#EXTINF:9,", str(other.with_suffix(".hidden")), "#EXT-X-ENDLIST"]
    path.write_text("\n".join(lines))


def header_only(path: Path) -> None:
    """Write a video of which only the header is there."""
    data = write_video(path, codec="ffv1").read_bytes()
    path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # the first cluster of Matroska


UNUSABLE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a.mp4": (Path.touch, "empty", "the file is empty"),
    "b.mp4": (lambda path: path.write_text("no video" * 99), "damaged", "it is damaged, or no MP4, MOV"),
    "c.m4v": (music, "no image", "it has no video stream"),
    "d.mp4": (playlist, "damaged", "it is damaged, or no MP4, MOV"),
    "e.mkv": (header_only, "damaged", "it is damaged, or no MP4, MOV"),
    "g.mkv": (lambda path: music(path, video=True), "empty", "it has a video stream, but no frame"),
    "f.mp4": (lambda path: path.symlink_to("gone.mp4"), "broken link", "a link to gone.mp4"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_is_one_unreadable_image(tmp_path: Path, name: str) -> None:
    write, kind, reason = UNUSABLE[name]
    write(tmp_path / name)
    write_video(tmp_path / "z.mp4", 3)
    source = opened(tmp_path)
    assert names(source) == [name, *(f"z.mp4@{i / 25:.3f}" for i in range(3))]
    with pytest.raises(ImageError, match=reason) as caught:
        source.image(0)
    assert (caught.value.kind, "\n" in str(caught.value)) == (kind, False)
    assert kind in FAULTS
    assert str(tmp_path / name) in str(caught.value)
    assert list(find_unreadable(source, range(4))) == [0]
    unreadable: dict[int, str] = {}
    assert image_or_substitute(source, 0, unreadable)[0] in (1, 2, 3)
    assert list(unreadable) == [0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"movflags": "faststart"}),
        ("a.mov", {"movflags": "faststart", "b_frames": 2}),
        ("a.avi", {}),
        ("a.mkv", {"rate": 1, "codec": "ffv1"}),
        ("a.webm", {"rate": 1, "codec": "libvpx-vp9"}),
    ],
)
def test_a_missing_end_is_one_unreadable_image_after_the_frames_that_are_there(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = write_video(tmp_path / name, 60, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    source = opened(tmp_path)
    *frames, last = names(source)
    assert last == name
    assert 5 <= len(frames) < 55
    unreadable = find_unreadable(source, range(len(source)))
    assert unreadable[len(frames)].kind == "truncated"
    assert "its end is missing" in unreadable[len(frames)].reason
    readable = [i for i in range(len(frames)) if i not in unreadable]  # the decoder may need packets that are missing
    assert len(readable) >= len(frames) - 2
    assert [number_in(source.image(i)) for i in readable] == readable


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damage_in_the_middle_concerns_frames_until_the_next_keyframe(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / "a.mp4", 40, codec, gop=5, size=(256, 128))
    intact, whole = opened(tmp_path), path.read_bytes()
    images = [intact.image(i) for i in range(40)]
    noise = np.random.default_rng(1).integers(0, 256, 60, np.uint8).tobytes()
    middle = whole.index(b"mdat") + 4 + (whole.index(b"moov") - whole.index(b"mdat")) // 2
    path.write_bytes(whole[:middle] + noise + whole[middle + 60 :])
    source = opened(tmp_path)
    assert names(source) == names(intact)
    unreadable = find_unreadable(source, range(40))
    assert {error.kind for error in unreadable.values()} == {"damaged"}
    assert 1 <= len(unreadable) <= 10
    assert max(unreadable) - min(unreadable) < 10
    order = np.random.default_rng(0).permutation(40).tolist()
    for i in order:  # the same ones in any order, and the others have their pixels
        if i in unreadable:
            with pytest.raises(ImageError):
                source.image(i)
        else:
            assert torch.equal(source.image(i), images[i])


def test_a_file_that_changed_since_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    source = opened(tmp_path)
    write_video(path, 5)
    with pytest.raises(ImageError, match=r"a\.mp4@1\.000.*(not those found|ends before)"):
        source.image(25)
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.image(25)
    assert isinstance(source, VideoSource)


def test_a_digest_follows_names_files_and_interval(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    first = opened(tmp_path).content_digest()
    assert opened(tmp_path).content_digest() == first
    assert opened(tmp_path, frame_interval=0.5).content_digest() != first
    write_video(path, 30, numbers=range(50, 80))
    assert opened(tmp_path).content_digest() != first


def test_a_video_with_too_many_pixels_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", 2, size=(128, 64))
    write_video(tmp_path / "b.mp4", 2, aspect=Fraction(3))
    monkeypatch.setattr("moco.data.video_file.MAX_PIXELS", 2 * 128 * 64)
    source = opened(tmp_path)
    assert names(source)[:2] == ["a.mp4@0.000", "a.mp4@0.040"]
    with pytest.raises(ImageError, match="384 x 64 square pixels") as caught:
        source.image(2)
    assert caught.value.kind == "too large"
    monkeypatch.setattr("moco.data.video_file.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="128 x 64 pixels, and at most 100 are read"):
        opened(tmp_path).image(0)
