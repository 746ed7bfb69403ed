"""Search among features: nearest neighbors, near-duplicates, outliers; results as JSON and as a gallery."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from moco.config import require
from moco.config.search import SearchConfig
from moco.data.base import Source
from moco.data.decode import ImageError
from moco.data.file_names import existing_path
from moco.data.keyed import SEARCH, permutation
from moco.data.pixel_format import preview
from moco.data.walk import IMAGE_FORMATS
from moco.distributed import is_rank_zero
from moco.evaluation.neighbors import duplicate_groups, nearest, outlier_scores, rows_with_neighbor
from moco.evaluation.subject import open_subject
from moco.files import atomic_write
from moco.reporting.contact_sheet import write_png
from moco.reporting.gallery import ImageSet, Section, Tile, write_html
from moco.retrieval.embed import compute
from moco.retrieval.queries import image_files, open_index, query_features
from moco.retrieval.store import Embedding, origin_of
from moco.runtime.console import log, progress_bar, summary_panel
from moco.runtime.device import compute_context, float64_device
from moco.runtime.output_directory import prepare_output

_GROUP_TILES = 24  # maximum number of tiles per group in the gallery
# Thresholds that a search for duplicates compares, and the number of images that it samples for this.
_THRESHOLDS, _THRESHOLD_SAMPLE = (0.999, 0.99, 0.95, 0.9, 0.85, 0.8), 1000
_SAMPLE = 8  # number of queries if neither query nor sample is set

Entry = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The result of a search in one mode. Entries and sections are computed while they are written."""

    title: str
    kind: str  # key of the entries in the JSON file: queries, groups, outliers
    entries: Iterable[Entry]
    sections: Iterable[Section]
    summary: Sequence[tuple[str, str]]
    note: str = ""


def search(config: SearchConfig) -> None:
    """Search as configured, and write the results."""
    with compute_context(config) as device:
        if config.index:
            index, out = open_index(config), Path(config.output or config.index)
        else:
            subject = open_subject(config)
            out = Path(config.output) if config.output else subject.output
            index = compute(config, subject, out / "features", device)
    if is_rank_zero():  # a search takes seconds; only the features, which take hours, use all ranks
        _search(config, index, out / "search", device)


def _search(config: SearchConfig, index: Embedding, out: Path, device: torch.device) -> None:
    count, encoder, origin = len(index.images), index.about["encoder"]["source"], origin_of(index.about)
    require(
        count > 1 or config.mode == "nearest",
        f"mode={config.mode} compares images, but {origin} contains only one: add more images",
    )
    prepare_output(out)
    modes = {"nearest": find_nearest, "duplicates": find_duplicates, "outliers": find_outliers}
    result = modes[config.mode](config, index, device)
    note = [("note", result.note)] if result.note else []
    # Before writing: the result stays visible if writing fails.
    summary_panel(result.title, [("images", f"{count:,} of {origin}"), *result.summary, *note])
    written = [out / f"{config.mode}.json"]
    head = {
        "mode": config.mode,
        "k": config.k,
        "threshold": config.threshold,
        "encoder": encoder,
        "features": str(index.folder),
        "root": index.about["pictures"]["root"],
        "more_roots": index.about["pictures"].get("more_roots", []),
        "pictures": count,
    }
    _write_json(written[0], head, result)
    if config.gallery != "none":
        written.append(out / f"{config.mode}.{config.gallery}")
        about = [f"{count:,} images of {origin}", f"encoder {encoder}", *([result.note] if result.note else [])]
        write = write_html if config.gallery == "html" else write_png
        write(written[1], result.title, " · ".join(about), result.sections)
    for path in written:
        log(f"written: {path}")


def _write_json(path: Path, head: dict[str, Any], result: Result) -> None:
    """Write one JSON object with one entry per line, because all entries may not fit in memory."""
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(head)[:-1] + f', "{result.kind}": [')
        for i, entry in enumerate(result.entries):
            file.write(("," if i else "") + "\n" + json.dumps(entry))
        file.write("\n]}\n")


def find_nearest(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Find the images that are most similar to the query files, or to a sample of the index."""
    images = index.images
    if config.query:
        rows, features = query_features(config, index, device)
        names = [existing_path(name) for name in config.query]
    else:
        rows = permutation(config.seed, 0, len(images), SEARCH)[: config.sample or _SAMPLE]
        names = [images.name(int(row)) for row in rows]
        features = images.features[rows]
    scores, found = nearest(images.features, features, config.k, rows, device=float64_device(device))

    def entries() -> Iterator[Entry]:
        for name, near, similarities in zip(names, found.tolist(), scores.tolist(), strict=True):
            neighbors = [_entry(images, row, similarity=each) for row, each in zip(near, similarities, strict=True)]
            yield {"query": name, "neighbours": neighbors}

    def sections() -> Iterator[Section]:
        for name, row, near, similarities in zip(names, rows.tolist(), found.tolist(), scores.tolist(), strict=True):
            if row >= 0:
                query = _tile(images, row, "query", marked=True)
            else:
                query = Tile(
                    _image_or_none(image_files([name], images.source.pixel_format), 0), "query", name, marked=True
                )
            tiles = [_tile(images, each, f"{score:.3f}") for each, score in zip(near, similarities, strict=True)]
            yield Section(name, [query, *tiles])

    summary = [("queries", str(len(names))), ("neighbors", f"{found.shape[1]} per query")]
    return Result("Nearest neighbors", "queries", entries(), sections(), summary)


def find_duplicates(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Find groups. A group is an image to keep and the images whose similarity to it is at least `threshold`."""
    images, device = index.images, float64_device(device)
    with progress_bar("comparing images") as progress:
        near = rows_with_neighbor(images.features, config.threshold, device=device, progress=progress)
    with progress_bar("forming groups") as progress:
        order = _best_first(images, near)
        found = duplicate_groups(images.features, order, config.threshold, device=device, progress=progress)
    groups = [list(zip(rows.tolist(), scores.tolist(), strict=True)) for rows, scores in found]

    def entries() -> Iterator[Entry]:
        for group in groups:
            members = [_entry(images, row, similarity=score, **image_size(images, row)) for row, score in group]
            yield {"keep": members[0]["path"], "pictures": members}

    def sections() -> Iterator[Section]:
        for group in groups[: config.show]:
            tiles: list[Tile] = []
            for row, score in group[:_GROUP_TILES]:
                size = image_size(images, row)
                detail = f"{size['width']} × {size['height']} · {size['bytes'] / 1000:,.0f} kB"
                tile = _tile(images, row, f"{score:.3f}" if tiles else "keep", detail, marked=not tiles)
                same = bool(tiles) and _same_thumbnail(tiles[0].image, tile.image)
                tiles.append(replace(tile, headline=f"{tile.headline} · same thumbnail") if same else tile)
            more = f", {len(tiles)} of them shown" if len(group) > len(tiles) else ""
            yield Section(f"{len(group)} images{more}", tiles)

    extra = sum(len(group) - 1 for group in groups)
    advice = ", not counting those to keep: look at each group before you remove any"
    summary = [
        ("groups", f"{len(groups):,}"),
        ("duplicates", f"{extra:,} images" + (advice if extra else "")),
        ("by threshold", _by_threshold(config, images, device)),
    ]
    title = f"Near-duplicates (cosine similarity at least {config.threshold:g})"
    note = _duplicates_note(config, [len(group) for group in groups], len(images))
    return Result(title, "groups", entries(), sections(), summary, note)


def find_outliers(config: SearchConfig, index: Embedding, device: torch.device) -> Result:
    """Sort the images by their mean similarity to their k nearest neighbors, the lowest first."""
    images, k = index.images, min(config.k, len(index.images) - 1)
    with progress_bar("comparing images") as progress:
        scores = outlier_scores(images.features, k, device=float64_device(device), progress=progress)
    order = np.argsort(scores, kind="stable").tolist()
    shown, first, median = order[: config.show], order[0], float(np.median(scores))
    entries = (_entry(images, row, similarity=float(scores[row])) for row in order)

    def sections() -> Iterator[Section]:
        heading = f"{len(shown)} of {len(order):,} images, the most dissimilar first"
        yield Section(heading, [_tile(images, row, f"{scores[row]:.3f}") for row in shown])

    summary = [("most dissimilar", f"{images.name(first)}: {scores[first]:.3f}")]
    title = f"Outliers (mean cosine similarity to the {k} nearest neighbors)"
    note = f"The median similarity is {median:.3f}; an outlier is far below it."
    return Result(title, "outliers", entries, sections(), summary, note)


def _by_threshold(config: SearchConfig, images: ImageSet, device: torch.device) -> str:
    """Return as text, for several thresholds, how many images of a sample have a neighbor of at least this similarity.

    How similar two different images are depends on the encoder, so no threshold fits all encoders.
    """
    rows = permutation(config.seed, 0, len(images), SEARCH)[:_THRESHOLD_SAMPLE]
    similarities, _ = nearest(images.features, images.features[rows], 1, rows, device=device)
    thresholds = sorted({config.threshold, *_THRESHOLDS}, reverse=True)
    counts = [f"{int((similarities >= each).sum()):,} at {each:g}" for each in thresholds]
    sampled = " sampled" * (len(rows) < len(images))
    return f"of {len(rows):,}{sampled} images, {', '.join(counts)} have another image of at least this similarity"


def _duplicates_note(config: SearchConfig, sizes: Sequence[int], count: int) -> str:
    """Return advice about the groups; `sizes` are their numbers of images in descending order."""
    lower = "lower threshold= to find edited copies"
    if not sizes:
        return f"None found at threshold={config.threshold:g}: {lower}, and look at the images before you remove any."
    notes = [
        "Each number is the similarity to the image to keep, and depends on the encoder: after training on few images, "
        "different images can reach the threshold. Look at the images before you remove any. Raise threshold= if a "
        f"group holds different images; {lower}. 'same thumbnail' marks images that look the same at 16 x 16 pixels. "
        "After removing images, compute the features again, with another output=."
    ]
    if sizes[0] > max(2, count // 4):
        notes.append(
            f"One group contains {sizes[0]:,} of {count:,} images: threshold={config.threshold:g} is too low for "
            "this encoder; choose a higher one from the line 'by threshold' that the command prints."
        )
    if len(sizes) > config.show:
        notes.append(f"The gallery shows {config.show} of {len(sizes):,} groups.")
    return " ".join(notes)


def _best_first(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort rows: the image with the most pixels first, then the image with the largest file, then the lower row."""
    sizes = {row: image_size(images, row) for row in rows.tolist()}
    best = sorted(sizes, key=lambda row: (-sizes[row]["width"] * sizes[row]["height"], -sizes[row]["bytes"], row))
    return np.array(best, np.int64)


def _same_thumbnail(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two images (3, H, W), scaled to 16 x 16 pixels, differ by at most 16 of 255 in every value.

    Among 250 photographs, the largest difference was at least 76 between any two different ones, and at most 15 between
    a photograph and its copy at 40 % of its width and height, or as a JPEG of quality 40.
    """
    if first is None or second is None:
        return False
    one, other = (
        interpolate(each[None].float(), (16, 16), mode="bilinear", antialias=True) for each in (first, second)
    )
    return bool((one - other).abs().max() <= 16)


def _entry(images: ImageSet, row: int, **values: Any) -> Entry:
    classes, multi_label = images.classes(row), images.source.multi_labels is not None
    named = {"classes": classes} if multi_label else {} if classes is None else {"class": classes[0]}
    return {"row": row, "path": images.name(row)} | named | values


def _tile(images: ImageSet, row: int, headline: str, detail: str = "", marked: bool = False) -> Tile:
    return Tile(_image_or_none(images.source, int(images.rows[row])), headline, images.caption(row), detail, marked)


def _image_or_none(source: Source, i: int) -> Tensor | None:
    """Load an image; None if its file was removed or damaged after the features were computed."""
    try:
        return preview(source.image(i), source.pixel_format.preview)
    except ImageError:
        return None


def image_size(images: ImageSet, row: int) -> dict[str, int]:
    """Return width, height and bytes of an image: from the header of its file, or from the image in memory.

    All three are 0 if the image cannot be read.
    """
    path = images.source.path(int(images.rows[row]))
    try:
        if path is not None:
            # PIL cannot open arrays (.npy) and some TIFFs
            with contextlib.suppress(UnidentifiedImageError), Image.open(path, formats=IMAGE_FORMATS) as image:
                return {"width": image.width, "height": image.height, "bytes": Path(path).stat().st_size}
        stored = images.pixels(row)  # (C, H, W)
        size = stored.nbytes if path is None else Path(path).stat().st_size
        return {"width": stored.shape[2], "height": stored.shape[1], "bytes": size}
    except Exception:  # the file was removed or damaged; PIL raises many kinds of errors
        return {"width": 0, "height": 0, "bytes": 0}
