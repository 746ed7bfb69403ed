"""Images with features of a run's newest encoder: their map, clusters, neighbors and attention.

Legend: S image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import ConfigError
from moco.config.report import ReportConfig
from moco.config.subject import SubjectConfig
from moco.data.decode import ImageError
from moco.data.keyed import REPORT, permutation
from moco.data.pixel_format import per_channel, preview, to_float
from moco.data.sources import Source
from moco.data.unreadable import find_unreadable
from moco.evaluation.features import EvalTransform, Inference, evaluation_view, stream
from moco.evaluation.neighbors import nearest
from moco.evaluation.subject import data_config, open_data, open_subject
from moco.interop.encoder_file import build
from moco.reporting.attention import class_attention, overlay
from moco.reporting.gallery import ImageSet, Tile
from moco.reporting.image_map import FEWEST, Map, clusters, coordinates
from moco.reporting.run_record import Run
from moco.runtime.console import progress_bar

_MOST_CLUSTERS = 20  # if config.clusters is not set: one per class, up to this number
_CLUSTERS = 10  # number of clusters if the images have no labels


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """A run's encoder, the images in the report, and the reference images among which neighbors are searched."""

    backbone: nn.Module
    transform: EvalTransform
    shown: ImageSet
    references: ImageSet
    held_out: bool  # whether the shown images are held out
    unreadable: int  # number of unreadable images, which are left out of `shown`


def compute_features(config: ReportConfig, run: Run, device: torch.device) -> ImageFeatures:
    """Open the run's data and compute features of the images to show and of the reference images.

    Raises:
        FileNotFoundError, ValueError: for missing or unsuitable data, or an invalid checkpoint.
    """
    # Unless the user sets data.resident, use false instead of the run's value: the report needs a few thousand images,
    # and true would decode all of them.
    data = replace(config.data, resident=bool(config.data.resident))
    encoder = SubjectConfig(checkpoint=str(run.checkpoint), data=data, images_at_once=config.images_at_once)
    subject = open_subject(encoder)
    try:
        data_used = data_config(encoder, subject)
        sources = open_data(encoder, subject)
    except (FileNotFoundError, ConfigError) as error:
        kind = ConfigError if isinstance(error, ConfigError) else FileNotFoundError
        raise kind(f"{error}; or set pictures=0 for a report without images") from error
    backbone = build(subject.file).backbone.to(device)
    references = sources.bank or sources.train
    source = sources.held_out or references

    def sample(source: Source, count: int, title: str) -> ImageSet:
        rows = permutation(config.seed, 0, len(source), REPORT)[: count or None].tolist()

        def features(rows: Sequence[int]) -> ImageSet:
            inference = Inference(device, config.images_at_once, data_used.workers)
            parts: list[Tensor] = []
            with progress_bar(f"{run.name}: {title}") as progress:
                for part in stream(backbone, source, rows, subject.transform, inference):
                    parts.append(part.cpu())
                    progress(sum(map(len, parts)), len(rows))
            return ImageSet(source, np.array(rows, np.int64), torch.cat(parts).numpy())

        try:
            return features(rows)
        except ImageError:
            unreadable = find_unreadable(source, rows)
            if len(unreadable) == len(rows):
                raise
            return features([row for row in rows if row not in unreadable])

    shown = sample(source, config.pictures, "images")
    compared = sample(references, config.references, "references")
    held_out, unreadable = sources.held_out is not None, min(config.pictures, len(source)) - len(shown)
    return ImageFeatures(backbone, subject.transform, shown, compared, held_out, unreadable)


def compute_map(config: ReportConfig, images: ImageFeatures) -> Map | None:
    """Compute the map; None if it is disabled, if there are too few images, or if a feature is not finite."""
    shown, method = images.shown, {"tsne": "t-SNE", "umap": "UMAP"}.get(config.map)
    if method is None or len(shown) < FEWEST or not shown.finite:
        return None
    labels = [label for i in range(len(shown)) if (label := shown.label(i)) is not None]
    count = config.clusters or (min(_MOST_CLUSTERS, len(set(labels))) if labels else _CLUSTERS)
    with progress_bar(f"map ({config.map}) and clusters") as progress:
        progress(0, 2)
        places = coordinates(shown.features, config.map, config.perplexity, config.seed)
        progress(1, 2)
        found = clusters(shown.features, count, config.seed)
        progress(2, 2)
    groups = {"label": labels} if labels else {}
    groups["cluster"] = [f"cluster {group + 1}" for group in found]
    total = f" of {len(shown.source):,}" if len(shown) < len(shown.source) else ""
    title = f"{len(shown):,}{total} {'held-out' if images.held_out else 'training'} images, {method}"
    return Map(title, places, [shown.name(i) for i in range(len(shown))], groups)


def neighbors(config: ReportConfig, images: ImageFeatures) -> tuple[list[tuple[str, list[Tile]]], str]:
    """Return titles and tiles of query images with their nearest references, and a caption."""
    shown, references = images.shown, images.references
    queries = np.arange(min(config.queries, len(shown)))
    position_of = {int(row): i for i, row in enumerate(references.rows)} if references.source is shown.source else {}
    exclude = np.array([position_of.get(int(shown.rows[i]), -1) for i in queries], np.int64)
    scores, found = nearest(references.features, shown.features[queries], config.neighbours, exclude)
    yes, no, shared = "same", "different", "have their query's label"
    if shown.source.multi_labels is not None:
        yes, no, shared = "a common", "no common", "share a label with their query"
    sections, same_label = [], 0
    for i, near, similarities in zip(queries.tolist(), found.tolist(), scores.tolist(), strict=True):
        classes = shown.classes(i)
        tiles = [Tile(shown.image(i), "query", shown.caption(i), marked=True)]
        for row, similarity in zip(near, similarities, strict=True):
            same = bool(set(classes or ()) & set(references.classes(row) or ()))
            same_label += same
            mark = "" if classes is None else f"✓ {yes} label" if same else f"✗ {no} label"
            tiles.append(Tile(references.image(row), f"{similarity:.3f}", references.caption(row), mark))
        sections.append((shown.caption(i), tiles))
    caption = (
        f"Each query image with its {found.shape[1]} nearest neighbors among {len(references):,} training images. The "
        "number is the cosine similarity of the backbone features (1: same direction)."
    )
    if shown.label(0) is not None:
        caption += f" {same_label} of the {found.size} neighbors below {shared}."
    return sections, caption


@torch.no_grad()
def attention(config: ReportConfig, images: ImageFeatures, device: torch.device) -> tuple[list[Tile], str] | None:
    """Return tiles of the query images with their attention maps, and a caption.

    None if there are no query images, or if `class_attention` returns None for the network.
    """
    count, transform = min(config.queries, len(images.shown)), images.transform
    if not count:
        return None
    crops = [evaluation_view(images.shown.pixels(i), transform.resize, transform.size) for i in range(count)]
    views = torch.stack(crops)  # (count, C, S, S)
    mean, std = (per_channel(each, device) for each in (transform.mean, transform.std))
    maps = class_attention(images.backbone, (to_float(views.to(device)) - mean) / std)  # (count, side, side)
    if maps is None:
        return None
    tiles = []
    for i, each in enumerate(maps.cpu()):
        caption, peak = images.shown.caption(i), 100 * float(each.max())
        seen = preview(views[i], images.shown.source.pixel_format.preview)
        tiles.append(Tile(seen, "image", caption, marked=True))
        tiles.append(Tile(overlay(seen, each), "attention", caption, f"at most {peak:.1f} % on a patch"))
    patches = maps.shape[1] ** 2
    explanation = (
        f"Attention of the class token to the {patches} patches in the last block, averaged over heads. The stronger "
        "the orange, the higher the attention, relative to the most attended patch of the image. Uniform attention "
        f"would be {100 / patches:.1f} % per patch. On average, all patches together receive "
        f"{100 * float(maps.sum(dim=(1, 2)).mean()):.0f} %; the rest goes to the class token and to "
        "other special tokens, if there are any."
    )
    return tiles, explanation
