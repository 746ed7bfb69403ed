"""What a search stands on: features with their pictures, and the features of the pictures it asks for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moco.config import DataConfig, require
from moco.config.search import SearchConfig
from moco.data.base import names_digest
from moco.data.decode import ImageError
from moco.data.opening import open_sources
from moco.data.sources import FolderSource
from moco.evaluation.features import stream
from moco.evaluation.subject import open_subject, weights_digest
from moco.interop.encoder_file import EncoderFile, read_encoder
from moco.retrieval.embed import network_of
from moco.retrieval.store import Embedding, open_embedding, read_about


def open_index(config: SearchConfig) -> Embedding:
    """The output of moco.embed that `index` names, with its pictures, which may have moved to another data.root."""
    stored = read_about(Path(config.index))
    sources = open_sources(DataConfig(**(stored["data"] | config.data.overrides())), bank_size=0)
    source = getattr(sources, stored["pictures"]["split"])
    require(
        source is not None and names_digest(source) == stored["pictures"]["sha256"],
        f"index={config.index} was made of other pictures than are in {stored['pictures']['root'] or 'the data set'} "
        "now: make it anew with moco.embed, or set data.root to where they are",
    )
    return open_embedding(Path(config.index), source)


def query_features(
    config: SearchConfig, index: Embedding, device: torch.device
) -> tuple[list[str], NDArray[np.int64], NDArray[Any]]:
    """Names, rows (-1 for a picture that is not of the index) and features of the query files.

    Raises:
        FileNotFoundError, ImageError: for a query that is not there, or no picture.
    """
    for name in config.query:
        if not Path(name).is_file():
            raise FileNotFoundError(f"query={name} does not exist: name a picture file")
    rows = _rows_of_files(index, [Path(name) for name in config.query])
    outside = [name for name, row in zip(config.query, rows, strict=True) if row < 0]
    look, stored = index.stored["look"], index.stored
    features = np.zeros((len(rows), stored["dimension"]), index.features.dtype)
    own = np.array([row >= 0 for row in rows])
    features[own] = index.features[[row for row in rows if row >= 0]]
    if outside:
        network = network_of(_encoder(config, index), stored["features"], stored["normalize"], device)
        shown = (look["size"], look["resize"], look["mean"], look["std"])
        every = range(len(outside))
        try:
            parts = list(stream(network, files(outside), every, *shown, device, config.images_at_once))
        except ImageError as error:
            raise ImageError(f"query: {error}") from error
        features[~own] = torch.cat(parts).cpu().numpy()
    return list(config.query), np.array(rows), features


def _rows_of_files(index: Embedding, files: list[Path]) -> list[int]:
    """The row of each file that is one of the index's own, -1 for the others."""
    wanted = {str(path.resolve()): i for i, path in enumerate(files)}
    names = {path.name for path in files}
    rows = [-1] * len(files)
    for row, i in enumerate(index.ids):
        path = index.source.path(int(i))
        if path is not None and Path(path).name in names and (at := wanted.get(str(Path(path).resolve()))) is not None:
            rows[at] = row
    return rows


def files(names: list[str]) -> FolderSource:
    """Picture files anywhere."""
    return FolderSource("", np.array([str(Path(name).absolute()).encode("utf-8", "surrogateescape") for name in names]))


def _encoder(config: SearchConfig, index: Embedding) -> EncoderFile:
    """The encoder that made the index, from its file or the one that is named now.

    Raises:
        ConfigError: if the file is gone, or is another encoder.
    """
    stored = index.stored["encoder"]
    if config.run or config.checkpoint:
        file = open_subject(config).file
    else:
        path = Path(stored["source"])
        require(
            path.is_file(), f"{path}, the encoder of index={config.index}, is not there any more: set checkpoint=FILE"
        )
        file = read_encoder(path, stored["weights"], stored["backbone"], stored["options"])
    require(
        weights_digest(file, index.stored["features"]) == stored["sha256"],
        f"index={index.folder} was made by another encoder ({stored['source']}, step {stored['step']}) than "
        f"{file.source}: name that one, or leave run and checkpoint out",
    )
    return file
