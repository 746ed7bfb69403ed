"""The modes of a search: nearest neighbors, near-duplicates and outliers among the features of an index."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco.config.search import SearchConfig
from moco.data.decode import ImageError
from moco.data.keyed import SEARCH, permutation
from moco.data.walk import IMAGE_FORMATS
from moco.evaluation.neighbors import duplicate_groups, nearest, outlier_scores
from moco.reporting.gallery import Section, Tile
from moco.retrieval.queries import image_files, query_features
from moco.retrieval.store import Embedding
from moco.runtime.console import progress_bar

_GROUP_TILES = 24  # at most, tiles per group in the gallery
_SAMPLE = 8  # queries without query and sample

Entry = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The result of a mode. Entries and sections are computed while they are written."""

    title: str
    kind: str  # key of the entries in the JSON file: queries, groups, outliers
    entries: Iterable[Entry]
    sections: Iterable[Section]
    summary: Sequence[tuple[str, str]]
    note: str = ""


def find_nearest(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Find the images that are most similar to the query files, or to a sample of the index."""
    if config.query:
        rows, features = query_features(config, index, device)
        names = list(config.query)
    else:
        rows = permutation(config.seed, 0, len(index), SEARCH)[: config.sample or _SAMPLE]
        names = [index.name(int(row)) for row in rows]
        features = index.features[rows]
    scores, found = nearest(index.features, features, config.k, rows, device=device)

    def entries() -> Iterator[Entry]:
        for name, near, similarities in zip(names, found.tolist(), scores.tolist(), strict=True):
            entries = [_entry(index, row, similarity=each) for row, each in zip(near, similarities, strict=True)]
            yield {"query": name, "neighbours": entries}

    def sections() -> Iterator[Section]:
        for name, row, near, similarities in zip(names, rows.tolist(), found.tolist(), scores.tolist(), strict=True):
            load = partial(index.image, row) if row >= 0 else partial(image_files([name]).image, 0)
            query = Tile(_readable(load), "query", index.caption(row) if row >= 0 else name, marked=True)
            tiles = [_tile(index, each, f"{score:.3f}") for each, score in zip(near, similarities, strict=True)]
            yield Section(name, [query, *tiles])

    summary = [("queries", str(len(names))), ("neighbors", f"{found.shape[1]} per query")]
    return Result("Nearest neighbors", "queries", entries(), sections(), summary)


def find_duplicates(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Find groups of images that are linked by similarities of at least `threshold`."""
    with progress_bar("comparing images", quiet=False) as progress:
        found = duplicate_groups(index.features, config.threshold, device=device, progress=progress)
    groups = [_best_first(index, rows) for rows in found]

    def entries() -> Iterator[Entry]:
        for rows, scores in groups:
            images = [
                _entry(index, row, similarity=score, **image_size(index, row))
                for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
            yield {"keep": images[0]["path"], "pictures": images}

    def sections() -> Iterator[Section]:
        for rows, scores in groups[: config.show]:
            tiles = []
            for i, (row, score) in enumerate(zip(rows[:_GROUP_TILES].tolist(), scores.tolist(), strict=False)):
                size = image_size(index, row)
                detail = f"{size['width']} × {size['height']} · {size['bytes'] / 1000:,.0f} kB"
                tiles.append(_tile(index, row, f"{score:.3f}" if i else "keep", detail, marked=not i))
            more = f", {len(tiles)} of them shown" if len(rows) > len(tiles) else ""
            yield Section(f"{len(rows)} images{more}", tiles)

    extra = sum(len(rows) - 1 for rows, _ in groups)
    summary = [("groups", f"{len(groups):,}"), ("redundant", f"{extra:,} images, if the best of each group is kept")]
    title = f"Near-duplicates (cosine similarity at least {config.threshold:g})"
    return Result(title, "groups", entries(), sections(), summary, _duplicates_note(config, found, len(index)))


def find_outliers(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Sort the images by their mean similarity to their k nearest neighbors, the lowest first."""
    k = min(config.k, len(index) - 1)
    with progress_bar("comparing images", quiet=False) as progress:
        scores = outlier_scores(index.features, k, device=device, progress=progress)
    order = np.argsort(scores, kind="stable").tolist()

    def entries() -> Iterator[Entry]:
        for row in order:
            yield _entry(index, row, similarity=float(scores[row]))

    def sections() -> Iterator[Section]:
        shown = order[: config.show]
        title = f"{len(shown)} of {len(order):,} images, the most dissimilar first"
        yield Section(title, [_tile(index, row, f"{scores[row]:.3f}") for row in shown])

    first, median = order[0], float(np.median(scores))
    summary = [("most dissimilar", f"{index.name(first)}: {scores[first]:.3f}"), ("median", f"{median:.3f}")]
    title = f"Outliers (mean cosine similarity to the {k} nearest neighbors)"
    return Result(title, "outliers", entries(), sections(), summary, f"Median similarity {median:.3f}.")


def _duplicates_note(config: SearchConfig, groups: Sequence[NDArray[np.int64]], count: int) -> str:
    notes = ["Each number is the similarity to the image to keep."] if groups else ["None found."]
    if groups and len(groups[0]) > max(2, count // 4):
        notes.append(
            f"One group contains {len(groups[0]):,} of {count:,} images: threshold={config.threshold:g} is too low for "
            "this encoder."
        )
    if len(groups) > config.show:
        notes.append(f"The gallery shows {config.show} of {len(groups):,} groups.")
    return " ".join(notes)


def _best_first(index: Embedding, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return a group with the image to keep first, then by similarity to it; and these similarities.

    The image to keep has the most pixels; among equals the largest file; among equals it is the first.
    """
    sizes = [image_size(index, int(row)) for row in rows]
    best = max(range(len(rows)), key=lambda i: (sizes[i]["width"] * sizes[i]["height"], sizes[i]["bytes"], -i))
    others = np.delete(rows, best)
    scores, at = nearest(index.features[others], index.features[rows[best : best + 1]], len(others))
    return np.append(rows[best], others[at[0]]), np.append(1.0, scores[0])


def _entry(index: Embedding, row: int, **values: Any) -> Entry:
    label = index.label(row)
    return {"row": row, "path": index.name(row)} | ({} if label is None else {"class": label}) | values


def _tile(index: Embedding, row: int, headline: str, detail: str = "", marked: bool = False) -> Tile:
    return Tile(_readable(partial(index.image, row)), headline, index.caption(row), detail, marked)


def _readable(load: Callable[[], Tensor]) -> Tensor | None:
    """Load an image; None if it has been removed or damaged since its features were computed."""
    try:
        return load()
    except ImageError:
        return None


def image_size(index: Embedding, row: int) -> dict[str, int]:
    """Return width, height and bytes of an image file, of which only the header is read, or of an image in memory."""
    i = int(index.ids[row])
    path = index.source.path(i)
    if path is None:
        height, width = index.source.image(i).shape[-2:]
        return {"width": width, "height": height, "bytes": 3 * width * height}
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
        return {"width": width, "height": height, "bytes": Path(path).stat().st_size}
    except OSError:
        return {"width": 0, "height": 0, "bytes": 0}
