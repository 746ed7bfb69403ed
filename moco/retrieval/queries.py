"""Open the index of a search, and compute the features of its query images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moco.config import DataConfig, require
from moco.config.quoting import override
from moco.config.search import SearchConfig
from moco.data.base import names_digest
from moco.data.decode import ImageError
from moco.data.file_names import existing_path, other_forms
from moco.data.opening import open_sources
from moco.data.pixel_format import PixelFormat
from moco.data.recorded import recorded_data
from moco.data.sources import FolderSource
from moco.evaluation.features import EvalTransform, Inference, stream
from moco.evaluation.subject import open_subject, weights_digest
from moco.files import resolved
from moco.interop.encoder_file import EncoderFile, read_encoder
from moco.interop.image_size import fit_to_size
from moco.plugins import naming_plugins
from moco.reporting.gallery import ImageSet
from moco.retrieval.embed import build_network
from moco.retrieval.store import Embedding, open_embedding, origin_of, read_about
from moco.runtime.precision import PRECISIONS


def open_index(config: SearchConfig) -> Embedding:
    """Open the output of moco.embed in `config.index`; its images may have moved to another data.root.

    Raises:
        ConfigError: if the data set now contains other images.
    """
    about = read_about(Path(config.index))
    given = config.data.overrides()
    data = recorded_data(about["data"], given, f"index={config.index}", trusted=True) | given
    with naming_plugins(f"index={config.index}", about):
        # Unreadable images need not stop the search: no row of the index refers to them.
        sources = open_sources(DataConfig(**data), bank_size=0, keep_unreadable=True)
    source = getattr(sources, about["pictures"]["split"])
    fields = "data.root and data.more_roots to the folders" if data.get("more_roots") else "data.root to the folder"
    require(
        source is not None and names_digest(source) == about["pictures"]["sha256"],
        f"index={config.index} belongs to other images than {origin_of(about)} contains now: run moco.embed again with "
        f"another output, or after removing {config.index}; or set {fields} of its images",
    )
    return open_embedding(Path(config.index), source)


def query_features(config: SearchConfig, index: Embedding, device: torch.device) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the row of each query in the index, (Q,), and the features of all Q queries, (Q, D).

    The row of a query that is not in the index is -1.

    Raises:
        FileNotFoundError, ImageError: for a missing or unreadable query.
    """
    queries = [existing_path(name) for name in config.query]
    rows = _rows_of_queries(index.images, queries)
    known, about = rows >= 0, index.about
    for name, row in zip(queries, rows, strict=True):
        if row < 0 and not Path(name).is_file():
            state = "is a folder" if Path(name).is_dir() else "does not exist"
            fix = "name an image file, or an image of the index by its path in the table that moco.embed wrote"
            if len(config.query) > 1:
                example = override("query", ["a, b.jpg"])
                fix += f"; a comma separates entries: put a path with a comma in quotes, {example}"
            raise FileNotFoundError(f"query={name} {state}: {fix}")
    features = np.zeros((len(rows), about["dimension"]), index.images.features.dtype)
    features[known] = index.images.features[rows[known]]
    outside = [name for name, row in zip(queries, rows, strict=True) if row < 0]
    if outside:
        network = build_network(_encoder(config, index), about["features"], about["normalize"], device)
        transform = EvalTransform(**about["look"])
        every, files = range(len(outside)), image_files(outside, index.images.source.pixel_format)
        try:
            inference = Inference(device, config.images_at_once, precision=PRECISIONS[about.get("precision", "fp32")])
            parts = list(stream(network, files, every, transform, inference))
        except ImageError as error:
            raise ImageError(f"query: {error}") from error
        features[~known] = torch.cat(parts).cpu().numpy()
    return rows, features


def _rows_of_queries(images: ImageSet, queries: list[str]) -> NDArray[np.int64]:
    """Return for each query its row in the index, or -1. A query is a file, or the name of an image in the index."""
    positions = {str(resolved(file)): i for i, file in enumerate(queries)}
    by_name = {name: i for i, name in enumerate(queries) if not Path(name).is_file()}
    form_of = other_forms(by_name, (images.name(row) for row in range(len(images))))
    by_name = {form_of.get(name, name): i for name, i in by_name.items()}
    names = {Path(file).name for file in queries}
    found = np.full(len(queries), -1)
    for row, i in enumerate(images.rows):
        if by_name and (at := by_name.get(images.source.name(int(i)))) is not None:
            found[at] = row
        file = Path(images.source.path(int(i)) or "")
        if file.name in names and (at := positions.get(str(resolved(file)))) is not None:
            found[at] = row
    return found


def image_files(names: list[str], pixel_format: PixelFormat) -> FolderSource:
    """Return image files as a source with this pixel format."""
    paths = np.array([str(Path(name).absolute()).encode("utf-8", "surrogateescape") for name in names])
    return FolderSource("", paths, pixel_format=pixel_format)


def _encoder(config: SearchConfig, index: Embedding) -> EncoderFile:
    """Read the encoder of the index, from its recorded file or from the configured one."""
    about = index.about["encoder"]
    if config.run or config.checkpoint:
        file = open_subject(config).file
    else:
        path = Path(about["source"])
        require(path.is_file(), f"index={config.index}: its encoder {path} does not exist; set checkpoint=FILE")
        file = read_encoder(path, about["weights"], about["backbone"], about["options"])
        file = fit_to_size(file, index.about["look"]["size"], f"index={config.index}: images.size")
    fix = "name the encoder of the index, or remove run and checkpoint"
    if not (config.run or config.checkpoint):
        fix = "the file has changed since: compute the index again with moco.embed, or set checkpoint=FILE"
    require(
        weights_digest(file, index.about["features"]) == about["sha256"],
        f"index={index.folder} was made with another encoder ({about['source']}, step {about['step']}) than "
        f"{file.source}: {fix}",
    )
    return file
