"""What a run's newest encoder makes of pictures: features, a map and groups, neighbors, attention.

Legend: M pictures, R references, D dimension, k neighbors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import require
from moco.config.report import ReportConfig
from moco.config.subject import SubjectConfig
from moco.data.decode import ImageError
from moco.data.keyed import REPORT, permutation
from moco.data.sources import Source
from moco.data.unreadable import find_unreadable
from moco.evaluation.features import evaluation_view, stream
from moco.evaluation.neighbors import nearest
from moco.evaluation.subject import EvalTransform, data_config, open_data, open_subject
from moco.interop.encoder_file import build
from moco.reporting.attention import class_attention, has_class_token, lit
from moco.reporting.gallery import Tile
from moco.reporting.points import LEAST, Map, clusters, coordinates
from moco.reporting.run_record import Run
from moco.runtime.console import progress_bar

MOST_CLUSTERS = 20  # where their number follows the classes


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a source with their features."""

    source: Source
    rows: NDArray[np.int64]  # (M,) of the source
    features: NDArray[np.float32]  # (M, D)
    unreadable: int = 0  # left out

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        return self.source.image(int(self.rows[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def label(self, i: int) -> str | None:
        labels = self.source.labels
        return None if labels is None else self.source.classes[int(labels[self.rows[i]])]

    def caption(self, i: int) -> str:
        label = self.label(i)
        return self.name(i) + (f" · {label}" if label is not None else "")

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.features).all())


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """A run's encoder, pictures to show and references to find their neighbors among."""

    backbone: nn.Module
    look: EvalTransform
    shown: Pictures
    references: Pictures
    training: int  # pictures of the training split
    held_out: bool  # whether the shown pictures were held out

    def what(self) -> str:
        """Which pictures are shown."""
        of_all = f" of {len(self.shown.source):,}" if len(self.shown) < len(self.shown.source) else ""
        return f"{len(self.shown):,}{of_all} {'held-out' if self.held_out else 'training'} pictures"


def compute_features(config: ReportConfig, run: Run, device: torch.device) -> ImageFeatures:
    """Opens the run's data and computes features of the pictures that the report draws.

    Raises:
        FileNotFoundError, ValueError: for data that is not there or does not fit; for a checkpoint that is odd.
    """
    # A resident folder would be decoded as a whole; some thousand pictures are wanted.
    data = replace(config.data, resident=bool(config.data.resident))
    judge = SubjectConfig(checkpoint=str(run.checkpoint), data=data, images_at_once=config.images_at_once)
    subject = open_subject(judge)
    require(
        data_config(judge, subject).name != "webdataset",
        f"run={run.path} was trained on a stream, of which no picture can be asked for: name others, data.name=folder "
        "data.root=IMAGES, or set pictures=0 for a report without",
    )
    try:
        sources = open_data(judge, subject)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; pictures=0 makes a report without pictures") from error
    backbone = build(subject.file).backbone.to(device)
    among = sources.bank or sources.train
    source = sources.held_out or among
    workers = data_config(judge, subject).workers

    def pictures(of: Source, count: int, what: str) -> Pictures:
        rows = permutation(config.seed, 0, len(of), REPORT)[: count or None]
        return _computed(backbone, of, rows, subject.look, device, config.images_at_once, workers, what)

    return ImageFeatures(
        backbone,
        subject.look,
        pictures(source, config.pictures, f"{run.name}: pictures"),
        pictures(among, config.references, f"{run.name}: references"),
        len(sources.train),
        sources.held_out is not None,
    )


def _computed(
    backbone: nn.Module,
    source: Source,
    rows: NDArray[np.int64],
    look: EvalTransform,
    device: torch.device,
    at_once: int,
    workers: int,
    what: str,
) -> Pictures:
    """Features of some pictures; those that cannot be read are left out and counted."""

    def features(of: Sequence[int]) -> NDArray[np.float32]:
        parts: list[Tensor] = []
        with progress_bar(what, quiet=False) as progress:
            shown = (look.size, look.resize, look.mean, look.std)
            for part in stream(backbone, source, of, *shown, device, at_once, workers):
                parts.append(part.cpu())
                progress(sum(map(len, parts)), len(of))
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    try:
        return Pictures(source, rows, features(rows.tolist()))
    except ImageError:
        bad = find_unreadable(source, rows.tolist())
        good = np.array([row for row in rows.tolist() if row not in bad], np.int64)
        if not len(good):
            raise
        return Pictures(source, good, features(good.tolist()), len(bad))


@dataclass(frozen=True, eq=False)
class Layout:
    """The shown pictures in a plane and in groups."""

    places: NDArray[np.float64]  # (M, 2)
    groups: dict[str, list[str]]  # "label" and "cluster": each picture's


def compute_layout(config: ReportConfig, seen: ImageFeatures) -> Layout | None:
    """The map; None where there is none to draw: too few pictures, or features that are not finite."""
    shown = seen.shown
    if config.map == "none" or len(shown) < LEAST or not shown.finite:
        return None
    labels = [shown.label(i) for i in range(len(shown))]
    count = config.clusters or (min(MOST_CLUSTERS, len(set(labels))) if labels[0] is not None else 10)
    with progress_bar(f"map ({config.map}) and groups", quiet=False) as progress:
        progress(0, 2)
        places = coordinates(shown.features, config.map, config.perplexity, config.seed)
        progress(1, 2)
        found = clusters(shown.features, count, config.seed)
        progress(2, 2)
    groups = {"label": [label for label in labels if label is not None]} if labels[0] is not None else {}
    return Layout(places, groups | {"cluster": [f"cluster {group + 1}" for group in found]})


def as_map(config: ReportConfig, seen: ImageFeatures, placed: Layout, numbers: Sequence[int]) -> Map:
    """The map as the page wants it; `numbers` are the pictures' in the page."""
    kind = {"tsne": "t-SNE", "umap": "UMAP"}[config.map]
    names = [seen.shown.name(i) for i in range(len(seen.shown))]
    return Map(f"{seen.what()}, {kind}", placed.places, names, numbers, placed.groups)


def neighbors(config: ReportConfig, seen: ImageFeatures) -> tuple[list[tuple[str, list[Tile]]], str]:
    """Some pictures with those nearest to them, and a sentence on how many share their label."""
    shown, among = seen.shown, seen.references
    queries = np.arange(min(config.queries, len(shown)))
    compute_layout = {int(row): i for i, row in enumerate(among.rows)} if among.source is shown.source else {}
    own = np.array([compute_layout.get(int(shown.rows[i]), -1) for i in queries], np.int64)
    scores, found = nearest(among.features, shown.features[queries], config.neighbours, own)
    sections, same = [], 0
    for i, near, values in zip(queries.tolist(), found.tolist(), scores.tolist(), strict=True):
        label = shown.label(i)
        tiles = [Tile(shown.image(i), "query", shown.caption(i), marked=True)]
        for row, score in zip(near, values, strict=True):
            alike = among.label(row) == label
            same += alike
            word = "" if label is None else "✓ same label" if alike else "✗ another label"
            tiles.append(Tile(among.image(row), f"{score:.3f}", among.caption(row), word))
        sections.append((shown.caption(i), tiles))
    said = (
        f"The {found.shape[1]} nearest of {len(among):,} training pictures by the backbone's features; the number "
        "is the cosine of the two (1: the same direction)."
    )
    if shown.label(0) is not None:
        said += f" {same} of the {found.size} neighbors below have their query's label."
    return sections, said


@torch.no_grad()
def attention(config: ReportConfig, seen: ImageFeatures, device: torch.device) -> tuple[list[Tile], str] | None:
    """What the class token attends to in the query pictures; None for a network that has none."""
    count = min(config.queries, len(seen.shown))
    if not count or not has_class_token(seen.backbone):
        return None
    look = seen.look
    views = torch.stack([evaluation_view(seen.shown.image(i), look.resize, look.size) for i in range(count)])
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (look.mean, look.std))
    maps = class_attention(seen.backbone, (views.to(device).float() / 255 - mean) / std)  # (count, side, side)
    if maps is None:
        return None
    tiles = []
    for i, each in enumerate(maps.cpu()):
        tiles.append(Tile(views[i], "picture", seen.shown.caption(i), marked=True))
        top = f"at most {100 * float(each.max()):.1f} % on a patch"
        tiles.append(Tile(lit(views[i], each), "attention", seen.shown.caption(i), top))
    patches = maps.shape[1] ** 2
    said = (
        f"The last block's attention from the class token to the {patches} patches, mean of the heads: the more "
        f"orange a patch, the more of it, in proportion to the picture's most attended one. Evenly spread, each "
        f"would get {100 / patches:.1f} %; of these pictures, patches got "
        f"{100 * float(maps.sum(dim=(1, 2)).mean()):.0f} % in all on average, and the class token the rest."
    )
    return tiles, said
