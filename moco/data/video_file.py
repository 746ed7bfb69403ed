"""Read one video file: the times of all frames without decoding, and the pixels of single frames.

A frame is found by seeking to the last keyframe before it and decoding from there, so its pixels do not depend on what
was read before. Only the video demuxers in `DEMUXERS` may open a file: others, such as the demuxer of playlists, would
open any file or address that is written in the content.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moco.config.base import optional_module, require
from moco.data.decode import MAX_PIXELS, ImageError, check_readable

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,mxf"
# For each frame, in units of the stream's time base: its presentation time, that of the keyframe from which it is
# decoded, and the decoding time of this keyframe, to which the demuxer must seek.
FRAME_TIMES = np.dtype([("pts", "i8"), ("key", "i8"), ("seek", "i8")])
_EARLIEST = np.iinfo(np.int64).min  # a time before that of every frame
# A requested time is the time of a packet, and some packets give no frame: then the next frame is used, if it follows
# within this many seconds.
LATE = Fraction(1, 2)


class VideoTimes(NamedTuple):
    """The frames of a file; `kind` and `reason` describe its fault, as in an `ImageError`, or are "" without one."""

    frames: NDArray[np.void]  # of `FRAME_TIMES`, one per frame, in the order of presentation
    time_base: Fraction = Fraction(1)  # seconds
    kind: str = ""
    reason: str = ""


class VideoFrame(NamedTuple):
    """A decoded frame."""

    pixels: NDArray[np.uint8]  # (H, W, 3), upright, with square pixels
    form: str  # codec and pixel format, such as "h264 yuv420p"
    odd: tuple[str, ...]  # its unusual properties, keys of `moco.data.image_facts.ODDITIES`


def av() -> Any:
    """Import PyAV; raise ConfigError if it is not installed, or too old to give the index of a file."""
    module = optional_module("av", "data.name=video", "video")
    version = str(module.__version__)
    require(int(version.split(".")[0]) >= 17, f"data.name=video needs av 17 or newer, not {version}: pip install -U av")
    return module


def read_times(path: str) -> VideoTimes:
    """Read the times of all frames. This reads the file from start to end, but decodes nothing."""
    nothing = np.empty(0, FRAME_TIMES)
    try:
        container, video = _open(path)
    except ImageError as error:
        return VideoTimes(nothing, kind=error.kind, reason=error.reason)
    with container:
        matroska = "matroska" in container.format.name
        rows, packets, last, fault = list[tuple[int, int, int]](), 0, None, ""
        ends = dict[int, int]()  # the end of each stream, in the time base of the stream
        keys: list[tuple[int, int]] = []  # pts and dts of the last two keyframes
        try:
            for packet in container.demux(video, *(container.streams.audio if matroska else ())):
                number, pts = packet.stream_index, packet.pts
                if pts is not None:
                    ends[number] = max(ends.get(number, 0), pts + (packet.duration or 0))
                # The packet that ends the stream has no times.
                if number != video.index or (pts is None and packet.dts is None):
                    continue
                packets, last = packets + 1, packet
                if pts is None or not packet.size:  # the second field of an interlaced frame, or an empty packet
                    continue
                if packet.is_keyframe:
                    keys = [*keys[-1:], (pts, pts if packet.dts is None else packet.dts)]
                # A frame that is presented before the newest keyframe is decoded from the keyframe before that one.
                usable = [key for key in keys if key[0] <= pts]
                if usable and not packet.is_discard:
                    rows.append((pts, *usable[-1]))
        except av().FFmpegError as error:
            fault = f"it cannot be read to its end ({error.strerror})"
        cut = last is not None and last.is_corrupt
        if last is not None and cut:
            rows = [row for row in rows if row[0] != last.pts]
        end = max((value * container.streams[number].time_base for number, value in ends.items()), default=Fraction())
        # The index of MP4 and MOV lists all frames. The header of Matroska states the duration.
        short = cut or ("mov" in container.format.name and packets < len(video.index_entries))
        stated = Fraction(container.duration or 0, av().time_base) if matroska else end
        every = np.array(rows, FRAME_TIMES)
        frames = every[np.unique(every["pts"], return_index=True)[1]]
        longest = int(np.diff(frames["pts"], prepend=frames["pts"][:1]).max(initial=0)) * video.time_base
        if not fault and (short or end < stated - 1 - longest):  # the last frame can be shown for a long time
            fault = f"its end is missing: {packets:,} frames are there, until {float(end):.1f} s"
        if not len(frames):
            kind = "damaged" if fault or packets else "empty"
            return VideoTimes(frames, kind=kind, reason=fault or "it has a video stream, but no frame with a time")
        return VideoTimes(frames, video.time_base, "truncated" if fault else "", fault)


def _open(path: str) -> tuple[Any, Any]:
    """Return the container and its video stream; raise ImageError if the file has no video stream that can be read."""
    check_readable(path)
    only = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        container = av().open(f"file:{path}", options=only, metadata_errors="replace")
    except av().FFmpegError as error:
        known = "MP4, MOV, MKV, WebM, AVI, MPEG, WMV, FLV, OGV or MXF"
        reason = f"it is damaged, or no {known} file ({error.strerror})"
        raise _refusal(path, "damaged", reason) from error
    video = container.streams.best("video")
    if video is None or video.disposition & av().stream.Disposition.attached_pic:  # the cover art of an audio file
        container.close()
        raise _refusal(path, "no image", "it has no video stream")
    if video.codec_context is None or not video.width:
        container.close()
        raise _refusal(path, "unsupported", "its video codec is unknown")
    if video.width * video.height > MAX_PIXELS:
        size = f"{video.width} x {video.height} pixels"
        container.close()
        raise _too_large(path, size)
    # Loader processes decode in parallel. Threads of the decoder would not survive the fork of a process.
    video.codec_context.thread_count = 1
    video.codec_context.options = {"err_detect": "crccheck+explode"}  # errors instead of guessed pixels
    return container, video


def _refusal(path: str, kind: str, reason: str) -> ImageError:
    return ImageError(f"cannot read video {path}: {reason}", kind, reason)


def _too_large(path: str, size: str) -> ImageError:
    reason = f"its frames have {size}, and at most {MAX_PIXELS:,} are read: scale the video down or remove it"
    return _refusal(path, "too large", reason)


class _Decoder:
    """An open file. It seeks to a frame's keyframe, unless decoding has passed the keyframe but not yet the frame."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._container, self._video = _open(path)
        self._reformatter = av().video.reformatter.VideoReformatter()
        self._frames: Iterator[Any] = iter(())
        self._frame: Any = None  # the newest decoded frame
        # The latest requested time, and the latest times of a decoded and of a damaged frame.
        self._wanted = self._reached = self._damaged = _EARLIEST

    def frame(self, pts: int, key: int, seek: int) -> Any:
        """Return the first frame at or after the time `pts`, decoded from the keyframe `key`; see `FRAME_TIMES`."""
        from_key = key > self._reached or pts < self._wanted
        if from_key:
            self._frames, self._reached, self._damaged = self._frames_from(key, seek), key - 1, _EARLIEST
        self._wanted = pts
        while self._reached < pts:
            frame = next(self._frames, None)
            if frame is None:
                raise _refusal(self.path, "truncated", "it ends before this time")
            if frame.pts is not None and frame.pts > self._reached:
                self._frame, self._reached = frame, frame.pts
                self._damaged = frame.pts if frame.is_corrupt else self._damaged
        if (self._reached - pts) * self._video.time_base > LATE:
            raise _refusal(self.path, "damaged", f"it has no frame within {float(LATE)} s after this time")
        if self._damaged >= key:  # the frame may refer to the damaged one
            if from_key:
                raise _refusal(self.path, "damaged", "the frame, or one to which it may refer, is incomplete")
            self._reached = _EARLIEST
            return self.frame(pts, key, seek)
        return self._frame

    def _frames_from(self, key: int, seek: int) -> Iterator[Any]:
        """Yield the frames from keyframe `key` on."""
        self._container.seek(seek, stream=self._video)
        packets = self._container.demux(self._video)
        found = next((each for each in packets if each.is_keyframe and each.pts is not None and each.pts >= key), None)
        if found is None or found.pts > key:  # the demuxer went too far: read from the start
            self._container.close()
            self._container, self._video = _open(self.path)
            packets = self._container.demux(self._video)
            found = next((each for each in packets if each.is_keyframe and each.pts == key), None)
        if found is None:
            raise _refusal(self.path, "damaged", "its frames are not those found when the data set was opened")
        for packet in itertools.chain([found], packets):
            # Before the requested frame, skip frames to which no other frame refers: usually half of all frames.
            unused = packet.pts is not None and packet.pts < self._wanted
            self._video.codec_context.skip_frame = "NONREF" if unused else "DEFAULT"
            yield from packet.decode()

    def pixels(self, frame: Any) -> VideoFrame:
        """Convert a frame to RGB, upright and with square pixels."""
        width, height, aspect = frame.width, frame.height, self._video.sample_aspect_ratio or Fraction(1)
        if aspect > 1:  # one side is enlarged, so that no detail is lost
            width = round(width * aspect)
        else:
            height = round(height / aspect)
        if width * height > MAX_PIXELS:
            raise _too_large(self.path, f"{width} x {height} square pixels")
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        matrix = _display_matrix(frame)
        upright = np.ascontiguousarray(turned(rgb.to_ndarray(), matrix))
        found = {"rotated": matrix != _UPRIGHT, "oblong pixels": aspect != 1, "interlaced": frame.interlaced_frame}
        form = f"{self._video.codec_context.name} {frame.format.name}"
        return VideoFrame(upright, form, tuple(name for name, is_so in found.items() if is_so))


_UPRIGHT = (1, 0, 0, 1)  # the display matrix of a frame that is shown as it is stored


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return the signs of (a, b, c, d) of FFmpeg's matrix: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return _UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    swapped = abs(b) > abs(a)  # rotated by about 90 degrees
    return (0, int(np.sign(b)), int(np.sign(c)), 0) if swapped else (int(np.sign(a)), 0, 0, int(np.sign(d)))


def turned(image: NDArray[Any], matrix: tuple[int, int, int, int]) -> NDArray[Any]:
    """Return an image (H, W, 3) as its display matrix shows it, (H, W, 3) or (W, H, 3); see `_display_matrix`."""
    a, b, c, d = matrix
    if b:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


_kept = threading.local()  # one open file per thread, because the next frame is often of the same file


def read_frame(path: str, stamp: tuple[int, int], pts: int, key: int, seek: int) -> VideoFrame:
    """Decode one frame.

    Args:
        path: the file.
        stamp: its size and modification time, which distinguish it from an earlier file with the same path.
        pts, key, seek: see `FRAME_TIMES`.

    Raises:
        ImageError: if the file is damaged, or no longer has a frame near the time `pts`.
    """
    wanted = (os.getpid(), path, stamp)  # a forked process shares the position in the file with its parent
    known, decoder = getattr(_kept, "decoder", (None, None))
    _kept.decoder = (None, None)  # kept again only if nothing fails
    if known != wanted or decoder is None:
        decoder = _Decoder(path)
    try:
        found = decoder.pixels(decoder.frame(pts, key, seek))
    except av().FFmpegError as error:
        raise _refusal(path, "damaged", f"the decoder failed ({error.strerror})") from error
    _kept.decoder = (wanted, decoder)
    return found
