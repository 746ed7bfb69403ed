"""Small video files whose frames carry their numbers in their pixels."""

import importlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moco.config import DataConfig
from moco.data.sources import load_source
from moco.data.video import VideoSource

try:
    av: Any = importlib.import_module("av")
except ImportError:  # the modules of tests are skipped, see `pytest.importorskip` there
    av = None

BITS, SIDE = 8, 16  # a frame shows the bits of its number as columns of black or white, each so many pixels wide
WIDTH, HEIGHT = BITS * SIDE, 64


def frame_of(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """Return the frame that shows a number, (H, W, 3); its lower half is darker, so that it has a top."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    frame = np.repeat(np.array(bits, np.uint8), width // BITS)[None, :, None].repeat(height, 0).repeat(3, 2)
    frame[height // 2 :] //= 2
    return frame


def number_in(image: torch.Tensor) -> int:
    """Return the number that an image (C, H, W) shows, whatever its size."""
    upper = image[:, : image.shape[1] // 2].float().mean(dim=(0, 1))  # (W,)
    return sum(int(each.mean() > 127) << bit for bit, each in enumerate(upper.chunk(BITS)))


def write_video(path: Path, count: int = 20, codec: str = "mpeg4", numbers: Sequence[int] = (), **given: Any) -> Path:
    """Write a video of `count` frames, 25 per second.

    Args:
        path: its ending is the format.
        count: number of frames.
        codec: skips the test if this PyAV cannot encode it.
        numbers: what the frames show; by default 0, 1, 2, ...
        given: `times` in milliseconds; `rate` (frames per second), `gop` (frames per keyframe), `b_frames`, `size`
            (width, height), `pixels` (pixel format), `aspect` (of a pixel), `options` (of the codec), `degrees`
            (counterclockwise), `movflags`.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path.parent.mkdir(parents=True, exist_ok=True)
    times, pixels, rate = given.get("times"), given.get("pixels", "yuv420p"), given.get("rate", 25)
    options = {"movflags": given["movflags"]} if "movflags" in given else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options=given.get("options", {}))
        stream.width, stream.height = given.get("size", (WIDTH, HEIGHT))
        stream.pix_fmt, stream.gop_size = pixels, given.get("gop", 7)
        stream.codec_context.max_b_frames = given.get("b_frames", 0)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if "aspect" in given:
            stream.codec_context.sample_aspect_ratio = given["aspect"]
        if "degrees" in given:
            stream.set_display_rotation(given["degrees"])
        for i, number in enumerate(numbers or range(count)):
            array = frame_of(number, stream.width, stream.height)
            frame = av.VideoFrame.from_ndarray(array, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def opened(root: Path, **fields: Any) -> VideoSource:
    """Return the training images of a folder of videos, by default all frames."""
    source = load_source(DataConfig("video", str(root), **({"frame_interval": 0.0} | fields))).train
    assert isinstance(source, VideoSource)
    return source


def two_classes(root: Path, per_class: int = 3, count: int = 8, **given: Any) -> Path:
    """Write cat/0.mkv, ..., dog/0.mkv, ..., each with other frames."""
    for number, name in enumerate(("cat", "dog")):
        for i in range(per_class):
            first = 10 * (number * per_class + i)
            write_video(root / name / f"{i}.mkv", numbers=range(first, first + count), **given)
    return root


def lossless(**given: Any) -> Mapping[str, Any]:
    """Return the arguments of a video whose frames have the written pixels."""
    return {"codec": "ffv1", "pixels": "bgr0", **given}
