"""A search through features: nearest pictures, groups of near-duplicates, outliers; a file of results, a gallery."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco.config import ConfigError, require
from moco.config.search import SearchConfig
from moco.data.decode import ImageError
from moco.data.keyed import SEARCH, permutation
from moco.data.sources import Source
from moco.data.walk import IMAGE_FORMATS
from moco.distributed import is_rank_zero
from moco.evaluation.neighbors import duplicate_groups, nearest, outlier_scores
from moco.evaluation.subject import open_subject
from moco.files import atomic_write
from moco.reporting.contact_sheet import write_png
from moco.reporting.gallery import Section, Tile, write_html
from moco.retrieval.embed import compute
from moco.retrieval.queries import files, open_index, query_features
from moco.retrieval.store import Embedding
from moco.runtime.console import progress_bar, summary_panel
from moco.runtime.device import compute_context

_GROUP_TILES = 24  # of a group in the gallery: the rest is counted

Entry = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a mode gives: for the file, for the gallery, for the terminal."""

    what: str  # what the entries are called in the file: queries, groups, outliers
    entries: Iterable[Entry]
    sections: Iterable[Section]
    summary: list[tuple[str, str]]
    note: str = ""


def search(config: SearchConfig) -> None:
    """See `moco.search.search`."""
    with compute_context(config) as device:
        if config.index:
            index, out = open_index(config), Path(config.output or config.index)
        else:
            subject = open_subject(config)
            out = Path(config.output) if config.output else subject.output
            index = compute(config, subject, out / "features", device)
    if is_rank_zero():  # comparing takes seconds where computing features takes hours
        _search(config, index, out / "search", device)


def _search(config: SearchConfig, index: Embedding, out: Path, device: torch.device) -> None:
    count = len(index.features)
    require(
        count > 1 or config.mode == "nearest", f"mode={config.mode} compares pictures, and there is one only: add more"
    )
    modes: dict[str, Callable[[], Found]] = {
        "nearest": lambda: _nearest(config, index, device),
        "duplicates": lambda: _duplicates(config, index, device),
        "outliers": lambda: _outliers(config, index, device),
    }
    found = modes[config.mode]()
    pictures, encoder = index.stored["pictures"], index.stored["encoder"]
    head = {
        "mode": config.mode,
        "k": config.k,
        "threshold": config.threshold,
        "encoder": encoder["source"],
        "features": str(index.folder),
        "root": pictures["root"],
        "pictures": count,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={out} cannot be written to: {error.strerror}") from error
    _write_entries(out / f"{config.mode}.json", head, found)
    written = [str(out / f"{config.mode}.json")]
    if config.gallery != "none":
        path = out / f"{config.mode}.{config.gallery}"
        write = write_html if config.gallery == "html" else write_png
        about = f"{count:,} pictures of {pictures['root'] or pictures['name']} · encoder {encoder['source']}"
        write(path, _title(config), about + (f" · {found.note}" if found.note else ""), found.sections)
        written.append(str(path))
    rows = [("pictures", f"{count:,} of {pictures['root'] or pictures['name']}"), *found.summary]
    rows += [("note", found.note)] if found.note else []
    summary_panel(_title(config), [*rows, ("written", "\n".join(written))])


def _title(config: SearchConfig) -> str:
    return {
        "nearest": "Most similar pictures",
        "duplicates": f"Near-duplicates (similarity of {config.threshold:g} and above)",
        "outliers": f"Outliers (mean similarity to the {config.k} nearest)",
    }[config.mode]


def _write_entries(path: Path, head: Entry, found: Found) -> None:
    """One JSON object, an entry a line: entries are many, and are never all in memory."""
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(head)[:-1] + f', "{found.what}": [')
        for i, entry in enumerate(found.entries):
            file.write(("," if i else "") + "\n" + json.dumps(entry))
        file.write("\n]}\n")


def _nearest(config: SearchConfig, index: Embedding, device: torch.device) -> Found:
    if config.query:
        names, rows, features = query_features(config, index, device)
    else:
        order = permutation(config.seed, 0, len(index.features), SEARCH)
        rows = order[: config.sample or 8]
        names = [_name(index, int(row)) for row in rows]
        features = index.features[rows]
    scores, found = nearest(index.features, features, config.k, rows, device=device)

    def entries() -> Iterator[Entry]:
        for name, near, values in zip(names, found, scores, strict=True):
            yield {
                "query": name,
                "neighbours": [_entry(index, int(r), similarity=float(s)) for r, s in zip(near, values, strict=True)],
            }

    def sections() -> Iterator[Section]:
        for i, name in enumerate(names):
            own = partial(index.source.image, int(index.ids[rows[i]])) if rows[i] >= 0 else None
            image = _readable(own or partial(files([name]).image, 0))
            caption = _caption(index, int(rows[i])) if rows[i] >= 0 else name
            tiles = [_tile(index, int(r), f"{s:.3f}") for r, s in zip(found[i], scores[i], strict=True)]
            yield Section(name, [Tile(image, "query", caption, marked=True), *tiles])

    return Found("queries", entries(), sections(), [("queries", str(len(names))), ("neighbours", str(found.shape[1]))])


def _duplicates(config: SearchConfig, index: Embedding, device: torch.device) -> Found:
    with progress_bar("comparing pictures", quiet=False) as progress:
        found = duplicate_groups(index.features, config.threshold, device=device, progress=progress)
    groups = [_best_first(index, rows) for rows in found]  # each: rows and their similarities to the first

    def entries() -> Iterator[Entry]:
        for rows, scores in groups:
            pictures = [
                _entry(index, int(row), similarity=float(score), **_size(index, int(row)))
                for row, score in zip(rows, scores, strict=True)
            ]
            yield {"keep": pictures[0]["path"], "pictures": pictures}

    def sections() -> Iterator[Section]:
        for rows, scores in groups[: config.show]:
            shown = rows[:_GROUP_TILES]
            more = f", {len(shown)} of them shown" if len(rows) > len(shown) else ""
            tiles = [
                _tile(index, int(row), f"{score:.3f}" if i else "keep", _measures(index, int(row)), marked=not i)
                for i, (row, score) in enumerate(zip(shown, scores[:_GROUP_TILES], strict=True))
            ]
            yield Section(f"{len(rows)} pictures{more}", tiles)

    count = len(index.features)
    notes = ["Each figure is the similarity to the picture to keep."] if groups else ["None found."]
    if groups and len(groups[0][0]) > max(2, count // 4):
        notes.append(
            f"One group holds {len(groups[0][0]):,} of {count:,} pictures: "
            f"threshold={config.threshold:g} is too low for this encoder."
        )
    if len(groups) > config.show:
        notes.append(f"The gallery has {config.show} of {len(groups):,} groups.")
    extra = sum(len(rows) - 1 for rows, _ in groups)
    summary = [("groups", f"{len(groups):,}"), ("could go", f"{extra:,} pictures, keeping the best of each group")]
    return Found("groups", entries(), sections(), summary, " ".join(notes))


def _best_first(index: Embedding, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A group and its similarities to the picture to keep: that one first, then the most similar.

    To keep is what has most pixels; of those the largest file, then the first.
    """
    sizes = [_size(index, int(row)) for row in rows]
    best = max(range(len(rows)), key=lambda i: (sizes[i]["width"] * sizes[i]["height"], sizes[i]["bytes"], -i))
    others = np.delete(rows, best)
    scores, at = nearest(index.features[others], index.features[rows[best : best + 1]], len(others))
    return np.append(rows[best], others[at[0]]), np.append(1.0, scores[0])


def _outliers(config: SearchConfig, index: Embedding, device: torch.device) -> Found:
    k = min(config.k, len(index.features) - 1)
    with progress_bar("comparing pictures", quiet=False) as progress:
        scores = outlier_scores(index.features, k, device=device, progress=progress)
    order = np.argsort(scores, kind="stable")

    def entries() -> Iterator[Entry]:
        for row in order:
            yield _entry(index, int(row), similarity=float(scores[row]))

    def sections() -> Iterator[Section]:
        shown = order[: config.show]
        yield Section(
            f"the {len(shown)} loneliest of {len(order):,}, the loneliest first",
            [_tile(index, int(row), f"{scores[row]:.3f}") for row in shown],
        )

    low, middle = float(scores[order[0]]), float(np.median(scores))
    summary = [("loneliest", f"{_name(index, int(order[0]))}: {low:.3f}"), ("median", f"{middle:.3f}")]
    return Found("outliers", entries(), sections(), summary, f"Median similarity {middle:.3f}.")


def _name(index: Embedding, row: int) -> str:
    return index.source.name(int(index.ids[row]))


def _class(index: Embedding, row: int) -> str | None:
    labels = index.source.labels
    return None if labels is None else index.source.classes[int(labels[index.ids[row]])]


def _entry(index: Embedding, row: int, **values: Any) -> Entry:
    label = _class(index, row)
    return {"row": row, "path": _name(index, row)} | ({} if label is None else {"class": label}) | values


def _caption(index: Embedding, row: int) -> str:
    label = _class(index, row)
    return _name(index, row) + (f" · {label}" if label is not None else "")


def _tile(index: Embedding, row: int, headline: str, detail: str = "", marked: bool = False) -> Tile:
    image = _readable(partial(index.source.image, int(index.ids[row])))
    return Tile(image, headline, _caption(index, row), detail, marked)


def _readable(load: Callable[[], Tensor]) -> Tensor | None:
    """A picture, or None if it went after its features were computed."""
    try:
        return load()
    except ImageError:
        return None


def _size(index: Embedding, row: int) -> dict[str, int]:
    """Width, height and bytes of a picture's file (its header alone is read), or of the picture in memory."""
    source: Source = index.source
    i = int(index.ids[row])
    path = source.path(i)
    if path is None:
        height, width = source.image(i).shape[-2:]
        return {"width": width, "height": height, "bytes": 3 * width * height}
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
        return {"width": width, "height": height, "bytes": Path(path).stat().st_size}
    except OSError:
        return {"width": 0, "height": 0, "bytes": 0}


def _measures(index: Embedding, row: int) -> str:
    size = _size(index, row)
    return f"{size['width']} × {size['height']} · {size['bytes'] / 1000:,.0f} kB"
