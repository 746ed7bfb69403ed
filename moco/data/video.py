"""Frames of video files as images: at most one per `data.frame_interval` seconds of each file.

The files, their labels and splits are those of a folder of images (`moco.data.folder`), with videos in the place of
images. The times of all frames are read when the data set is opened; a frame is decoded on request.

Legend: N images, F files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.config import DataConfig
from moco.config.base import require
from moco.data.base import Source, Sources, entries_digest, in_threads, labels_at
from moco.data.decode import ImageError, to_gray
from moco.data.folder import FolderSource, open_folder
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.video_file import FRAME_TIMES, VideoFrame, VideoTimes, av, read_frame, read_times
from moco.data.walk import VIDEO_ENDINGS, size_and_time
from moco.runtime.console import progress_bar

# A frame of the data set. A file with a fault has one more row, whose field `file` is (-1 - number of the file).
ROW = np.dtype([("file", "i4"), *FRAME_TIMES.descr])
_NAME = re.compile(rf"(.+(?:{'|'.join(map(re.escape, VIDEO_ENDINGS))}))@\d+\.\d+", re.IGNORECASE | re.DOTALL)


class VideoFile(NamedTuple):
    """The properties of a file that its frames share."""

    stamp: tuple[int, int]  # size and modification time
    first: int = 0  # presentation time of its first frame, in units of the time base
    time_base: Fraction = Fraction(1)  # seconds
    digits: int = 3  # decimal places of the times in names
    kind: str = ""  # kind and reason of its fault, as in an `ImageError`; "" if it has none
    reason: str = ""


@dataclass(frozen=True, eq=False)
class VideoSource(Source):
    """Frames of video files, each decoded on request."""

    files: FolderSource  # the videos; `labels` below are those of the frames
    about: Sequence[VideoFile]  # (F,)
    rows: NDArray[np.void]  # (N,) of `ROW`
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB
    multi_labels: NDArray[np.bool_] | None = None  # see `Source`
    draws: tuple[tuple[int, int], ...] = ()  # see `Source`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        pixels = torch.from_numpy(self.frame(i).pixels).permute(2, 0, 1)  # (3, H, W)
        return pixels if self.pixel_format.channels == 3 else to_gray(pixels)

    def frame(self, i: int) -> VideoFrame:
        """Decode frame i, in color.

        Raises:
            ImageError: if it cannot be read.
        """
        file, pts, key, seek = self.rows[i].tolist()
        try:
            if file < 0:
                about = self.about[-1 - file]
                raise ImageError("", about.kind, about.reason)
            return read_frame(self.files.path(file), self.about[file].stamp, pts, key, seek)
        except ImageError as error:
            sentence = f"cannot read image {self.name_with_path(i)}: {error.reason}"
            raise ImageError(sentence, error.kind, error.reason) from error

    def file_of(self, i: int) -> str:
        """Return the path of the video of image i."""
        return self.files.path(self._file(i))

    def bytes_if_first(self, i: int) -> int:
        """Return the size of the video of frame i if it is the first frame of the video, else 0."""
        file = self.rows["file"]
        return 0 if i and file[i] == file[i - 1] else self.about[file[i]].stamp[0]

    def name(self, i: int) -> str:
        return f"{self.files.name(self._file(i))}{self._time(i)}"

    def name_with_path(self, i: int) -> str:
        """Return the name of image i with the absolute path of its video."""
        return f"{self.file_of(i)}{self._time(i)}"

    def _file(self, i: int) -> int:
        file = int(self.rows["file"][i])
        return file if file >= 0 else -1 - file

    def _time(self, i: int) -> str:
        """Return the end of the name of image i, such as "@12.500"; "" for the row that stands for a file's fault."""
        file, pts = int(self.rows["file"][i]), int(self.rows["pts"][i])
        if file < 0:
            return ""
        about = self.about[file]
        seconds = (pts - about.first) * about.time_base.numerator / about.time_base.denominator
        return f"@{seconds:.{about.digits}f}"

    def content_fingerprints(self) -> NDArray[np.int64]:
        """Return a number per frame, from its time and the size of its video: equal in copies of a video."""
        sizes = np.array([each.stamp[0] for each in self.about], np.int64)
        numbers: NDArray[np.int64] = (sizes[self.rows["file"]] << 31 ^ self.rows["pts"]) & np.iinfo(np.int64).max
        return np.where(self.rows["file"] < 0, super().content_fingerprints(), numbers)

    def left_out(self) -> Mapping[str, int]:
        return self.files.ignored

    def subset(self, rows: NDArray[np.int64]) -> "VideoSource":
        labels, multi_labels = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        return replace(self, rows=self.rows[rows], labels=labels, multi_labels=multi_labels, draws=())

    def content_digest(self) -> str:
        entries = ([self.name(i), *self.about[self._file(i)].stamp] for i in range(len(self)))
        return entries_digest(entries, pixel_format=self.pixel_format)


def open_video(config: DataConfig, keep_unlistable: bool = False) -> Sources:
    """Open the frames of a folder of videos; see `moco.data.folder.scan` for `keep_unlistable`.

    For each file that cannot be read to its end, the source has one more image. This image has the name of the file and
    is unreadable.

    Raises:
        ConfigError: without PyAV, or for other channels than gray or RGB in 8 bits.
        FileNotFoundError, ValueError: as for a folder of images.
    """
    av()
    format_ = f"data.channels={config.channels} data.dtype={config.dtype}"
    fits = PixelFormat(config.channels, config.dtype).is_8bit_gray_or_rgb
    require(fits, f"{format_}: frames of videos are read as uint8 with 3 channels, or with 1 (gray): set one of these")
    return open_folder(config, keep_unlistable).changed(partial(_frames, config))


def _frames(config: DataConfig, files: Source) -> VideoSource:
    """Return the frames of the given files."""
    assert isinstance(files, FolderSource)
    interval = Fraction(str(config.frame_interval))
    with progress_bar("reading the times of frames") as progress:
        found = in_threads(lambda file: _read(files.path(file), file, interval), range(len(files)), progress, at_once=1)
    rows = np.concatenate([rows for _, rows in found])
    of_file = np.where(rows["file"] < 0, -1 - rows["file"], rows["file"])  # (N,)
    drawn, first = list[tuple[int, int]](), 0
    for (count, _), weight in zip(files.draws, config.weights, strict=False):
        images = int(((of_file >= first) & (of_file < first + count)).sum())
        drawn.append((images, max(1, round(weight * images))))
        first += count
    return VideoSource(
        files,
        [about for about, _ in found],
        rows,
        labels_at(files.labels, of_file),
        files.classes,
        multi_labels=labels_at(files.multi_labels, of_file),
        draws=tuple(drawn),
    )


def _read(path: str, number: int, interval: Fraction) -> tuple[VideoFile, NDArray[np.void]]:
    """Return the properties of a file, and its rows."""
    stamp, times = size_and_time(path), read_times(path)
    chosen = at_most_one_per(interval, times)
    rows = np.zeros(len(chosen) + bool(times.kind), ROW)
    for name in FRAME_TIMES.names or ():
        rows[name][: len(chosen)] = chosen[name]
    rows["file"] = number
    rows["file"][len(chosen) :] = -1 - number
    if not len(chosen):
        return VideoFile(stamp, kind=times.kind, reason=times.reason), rows
    pts = times.frames["pts"]
    close = len(pts) > 1 and int(np.diff(pts).min()) * times.time_base < Fraction(1, 1000)
    about = VideoFile(stamp, int(pts[0]), times.time_base, 6 if close else 3, times.kind, times.reason)
    return about, rows


def at_most_one_per(interval: Fraction, times: VideoTimes) -> NDArray[np.void]:
    """Return the first frame of each `interval` of seconds, counted from the first frame of the file; 0: all frames."""
    if not interval or not len(times.frames):
        return times.frames
    ticks = interval / times.time_base
    since: Iterable[int] = (times.frames["pts"] - times.frames["pts"][0]).tolist()
    _, first = np.unique([each * ticks.denominator // ticks.numerator for each in since], return_index=True)
    return times.frames[first]


def video_of(name: str) -> str:
    """Return the video of a frame by the frame's name; "" for the name of another image."""
    found = _NAME.fullmatch(name) if "@" in name else None
    return found[1] if found else ""
