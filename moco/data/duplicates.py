"""Find images with the same content under several names. A split can then keep all copies on one side.

Content means the bytes of a file, or the pixels of an image in memory. Cheap fingerprints are compared first (the size
of a file, the checksum in a shard): only images with equal fingerprints are read.

Legend: N images.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moco.data.base import Progress, Source, in_threads
from moco.data.decode import ImageError
from moco.data.video import video_of
from moco.distributed import all_gather_object, rank, world_size
from moco.runtime.console import progress_bar

Rows = NDArray[np.int64]


def content_groups(source: Source, progress: Progress | None = None) -> Rows:
    """Return for each image the first image with the same content, (N,): itself for an image without an earlier copy.

    Collective: each rank reads a part. `progress` is called with (done, total). An unreadable image has no copy.
    """
    return _groups([source], source.content_fingerprints(), progress)


def split_groups(source: Source, progress: Progress | None = None) -> Rows:
    """Return for each image the first image of its group, (N,). A split must not divide a group.

    Copies of an image form a group, and so do the frames of a video, which are recognized by their names; shards keep
    the names. Collective, as `content_groups`.
    """
    copies, numbers, first = content_groups(source, progress), np.arange(len(source)), dict[str, int]()
    videos = numbers.copy()
    for i in range(len(source)):
        if video := video_of(source.name(i)):
            videos[i] = first.setdefault(video, i)
    if not first:
        return copies
    links = np.concatenate([numbers, numbers]), np.concatenate([copies, videos])
    graph = coo_array((np.ones(2 * len(source)), links), shape=(len(source), len(source)))
    _, group = connected_components(graph, directed=False)
    _, firsts = np.unique(group, return_index=True)
    found: Rows = firsts[group]
    return found


def copies_in(train: Source, held_out: Source, progress: Progress | None = None) -> Rows:
    """Return the rows of held-out images whose content is that of a training image. Collective, as `content_groups`."""
    first, second = train.content_fingerprints(), held_out.content_fingerprints()
    shared = np.intersect1d(first, second)  # copies within one of the two splits are not searched
    fingerprints = np.concatenate([first, second])
    alone = ~np.isin(fingerprints, shared)
    fingerprints[alone] = -1 - np.flatnonzero(alone)
    groups = _groups([train, held_out], fingerprints, progress)
    return np.flatnonzero(groups[len(train) :] < len(train))


def count_copies(train: Source, held_out: Source, heartbeat: Callable[[], None] = lambda: None) -> int:
    """Return the length of `copies_in`, with a progress bar; `heartbeat` is called regularly. Collective."""
    with progress_bar("comparing images", heartbeat) as progress:
        return len(copies_in(train, held_out, progress))


def copies_message(count: int, held_out: int) -> str:
    """Return the sentence about held-out images that are training images too."""
    return (
        f"{count:,} of the {held_out:,} held-out images are byte-identical to training images: the accuracy on them "
        "does not show how well new images are classified; remove these images from one of the two sets"
    )


def _groups(sources: Sequence[Source], fingerprints: Rows, progress: Progress | None) -> Rows:
    """Return for each image the first one with the same content, as rows (N,) over all sources in their order."""
    _, inverse, counts = np.unique(fingerprints, return_inverse=True, return_counts=True)
    rows: list[int] = np.flatnonzero(counts[inverse] > 1)[rank() :: world_size()].tolist()
    starts = np.cumsum([0, *map(len, sources)])

    def row_digest(row: int) -> bytes | None:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return _image_digest(sources[number], row - int(starts[number]))

    def own_digests() -> dict[int, bytes | None]:
        return dict(zip(rows, in_threads(row_digest, rows, progress), strict=True))

    gathered = {row: digest for part in all_gather_object(own_digests) for row, digest in part.items() if digest}
    groups, first = np.arange(len(fingerprints)), dict[bytes, int]()
    for row in sorted(gathered):
        groups[row] = first.setdefault(gathered[row], row)
    return groups


def _image_digest(source: Source, i: int) -> bytes | None:
    """Return 16 bytes of BLAKE2b of the content of image i; None if it cannot be read."""
    try:
        content = source.content(i)
        data = source.image(i).contiguous().numpy().tobytes() if content is None else content
    except ImageError:
        return None
    return hashlib.blake2b(data, digest_size=16).digest()
