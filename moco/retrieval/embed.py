"""Compute features of any images and write them to files: in bounded memory, resumable, on any number of ranks.

The rows are divided into chunks of `images_at_once` rows. Any rank may compute a chunk, always in one forward pass.
Therefore the written bytes depend neither on interruptions nor on the number of processes.

Legend: D dimension.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import require
from moco.config.embed import EmbedConfig
from moco.data.base import names_digest
from moco.data.decode import ImageError
from moco.data.sources import Source
from moco.data.unreadable import find_unreadable
from moco.distributed import all_gather_object, is_rank_zero, on_rank_zero, rank, world_size
from moco.evaluation import subject as subjects
from moco.evaluation.features import Inference, stream
from moco.files import write_json
from moco.interop.encoder_file import EncoderFile, ForeignFileError, build
from moco.plugins import recorded
from moco.retrieval.store import PARTIAL, PROGRESS, About, Embedding, begin, finish, open_embedding, origin_of
from moco.retrieval.table import check_table
from moco.runtime.console import log, log_next, progress_bar, summary_panel
from moco.runtime.device import compute_context
from moco.runtime.next_command import command, computing_as, named_images
from moco.runtime.output_directory import FEATURES, lock_directory
from moco.runtime.precision import PRECISIONS
from moco.runtime.preemption import keeping


def embed(config: EmbedConfig) -> None:
    """Compute and write the features of the configured images, and print a summary."""
    with compute_context(config) as device:
        subject = subjects.open_subject(config)
        folder = Path(config.output) if config.output else subject.output / "features"
        embedding = compute(config, subject, folder, device)
        if is_rank_zero():
            _summarize(embedding, config)


def _summarize(embedding: Embedding, config: EmbedConfig) -> None:
    folder, (rows, dimension) = embedding.folder, embedding.images.features.shape
    skipped = len(embedding.about["unreadable"])
    summary_panel(
        f"{rows:,} images of {origin_of(embedding.about)}",
        [
            ("encoder", f"{embedding.about['encoder']['source']}, {config.features}"),
            ("features", f"{folder / FEATURES}: {rows:,} × {dimension}, {config.dtype}"),
            ("computed", "now" if embedding.computed else "nothing: already complete"),
            ("rows", str(folder / f"index.{config.table}")),
            ("unreadable", f"{skipped:,} skipped, see {folder / 'unreadable.csv'}" if skipped else "none"),
        ],
    )
    images = named_images(*(embedding.about["data"][name] for name in ("name", "root")))
    for search in ({"sample": 8}, {"mode": "duplicates"}):
        log_next(command("moco.search", computing_as(config), index=str(folder), **images, **search))


def compute(config: EmbedConfig, subject: subjects.Subject, folder: Path, device: torch.device) -> Embedding:
    """Compute the missing features of an output folder, and open the folder. Collective.

    Raises:
        ConfigError: if the folder contains something else, the disk is too small, or the split does not exist.
        ImageError: for an unreadable image, unless on_bad_image=skip.
        FloatingPointError: for features that are not finite in the configured dtype.
    """
    data = subjects.data_config(config, subject)
    source = getattr(subjects.open_data(config, subject), config.split)
    require(source is not None, f"split={config.split} does not exist in data.name={data.name}: set split=train")
    check_table(source, config.table, data.label_separator)  # now, not after hours
    network = build_network(subject.file, config.features, config.normalize, device)
    work = _Work(config, subject, source, network, device)
    about = _about(work)
    state: About | None = {"done": 0}
    stop_note = keeping("finished features", lambda: state is None or state["done"] > 0)
    with stop_note, ExitStack() as locks:  # rank 0 holds the lock
        on_rank_zero(lambda: bool(locks.enter_context(lock_directory(folder, "output"))))
        state = on_rank_zero(lambda: begin(folder, about))
        if state is not None:
            _compute_missing(work, state, folder)
        on_rank_zero(lambda: finish(folder, source, config.table, data.label_separator, state))
    return replace(open_embedding(folder, source), computed=state is not None)


def build_network(file: EncoderFile, features: str, normalize: bool, device: torch.device) -> nn.Module:
    """Return the backbone, or for "projection" backbone and head; with `normalize`, the outputs have length 1.

    Raises ForeignFileError for "projection" if the file contains no head.
    """
    if features == "projection" and not file.head_weights:
        raise ForeignFileError(
            f"features=projection: {file.source} contains no head; set features=backbone, or name a checkpoint"
        )
    encoder = build(file).to(device)
    network: nn.Module = encoder if features == "projection" else encoder.backbone
    return nn.Sequential(network, _UnitLength()) if normalize else network


class _UnitLength(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1)


_Chunk = tuple[Sequence[int], Tensor | None, dict[str, str]]  # rows, their features (rows, D), why rows are unreadable


@dataclass(frozen=True, eq=False)
class _Work:
    """The rows of a source in chunks: chunk c has the rows c * images_at_once ... (c + 1) * images_at_once - 1."""

    config: EmbedConfig
    subject: subjects.Subject
    source: Source
    network: nn.Module
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.source) // self.config.images_at_once)

    def rows(self, chunk: int) -> range:
        size = self.config.images_at_once
        return range(chunk * size, min((chunk + 1) * size, len(self.source)))

    def features(self, rows: Sequence[int]) -> Iterator[Tensor]:
        for row in rows:
            if row in self.source.unreadable:  # of a resident source, which holds a black image instead
                raise self.source.unreadable[row]
        config, workers = self.config, subjects.data_config(self.config, self.subject).workers
        inference = Inference(self.device, config.images_at_once, workers, PRECISIONS[config.precision])
        return stream(self.network, self.source, rows, self.subject.transform, inference)

    def chunks_of_rank(self, done: int) -> Iterator[_Chunk]:
        """Compute this rank's chunks in order, after the first `done` chunks of all ranks.

        Chunks are distributed round robin, so that the completed chunks are always the first ones. Therefore the number
        of processes may change when the run resumes.
        """
        left = list(range(done + rank(), len(self), world_size()))
        while left:
            try:
                for features in self.features([row for chunk in left for row in self.rows(chunk)]):
                    yield self.rows(left.pop(0)), features, {}
            except ImageError:
                if self.config.on_bad_image != "skip":
                    raise
                rows = self.rows(left.pop(0))
                unreadable = {str(row): str(error) for row, error in find_unreadable(self.source, rows).items()}
                readable = [row for row in rows if str(row) not in unreadable]
                yield readable, next(self.features(readable)) if readable else None, unreadable


def _about(work: _Work) -> About:
    """Return everything that determines the features, and their origin."""
    config, subject, source = work.config, work.subject, work.source
    file, data, size = subject.file, subjects.data_with_absolute_paths(config, subject), subject.transform.size
    return {
        "encoder": {
            "source": str(Path(file.source).absolute()),
            "weights": config.weights,
            "backbone": file.backbone,
            "options": dict(file.options),
            "step": file.step,
            "sha256": subjects.weights_digest(file, config.features),
        },
        "pictures": {
            "name": data["name"],
            "root": data["root"] if data["name"] != "digits" else "",
            "more_roots": data["more_roots"],
            "split": config.split,
            "count": len(source),
            "sha256": names_digest(source),
            "content": on_rank_zero(lambda: source.content_digest()),
        },
        "data": data,
        **recorded(),
        "look": json.loads(json.dumps(asdict(subject.transform))),
        "features": config.features,
        "normalize": config.normalize,
        "precision": config.precision,
        "dtype": config.dtype,
        "dimension": int(work.network(torch.zeros(1, file.channels, size, size, device=work.device)).shape[1]),
        "images_at_once": config.images_at_once,
    }


def _compute_missing(work: _Work, state: About, folder: Path) -> None:
    """Compute the missing chunks: each iteration computes one on each rank, and then updates progress.json."""
    features = np.lib.format.open_memmap(folder / PARTIAL, mode="r+")
    chunks = work.chunks_of_rank(state["done"])
    count = len(work.source)
    if state["done"]:
        log(f"continuing after {min(state['done'] * work.config.images_at_once, count):,} of {count:,} images")
    with progress_bar("embedding images") as progress:
        for first in range(state["done"], len(work), world_size()):
            for unreadable in all_gather_object(lambda: _write(features, next(chunks, None))):
                state["unreadable"] |= unreadable
            state["done"] = min(first + world_size(), len(work))
            if is_rank_zero():
                write_json(folder / PROGRESS, state)
            progress(min(state["done"] * work.config.images_at_once, count), count)


def _write(features: NDArray[Any], chunk: _Chunk | None) -> dict[str, str]:
    """Write a chunk, if this rank has one left, and return the unreadable rows of the chunk."""
    if chunk is None:
        return {}
    rows, values, unreadable = chunk
    if values is not None:
        with np.errstate(over="ignore"):  # the next check reports it
            numbers = values.cpu().numpy().astype(features.dtype)
        if not np.isfinite(numbers).all():
            dtype = features.dtype
            fix = ": set dtype=float32" if dtype == np.float16 and bool(values.isfinite().all()) else ""
            raise FloatingPointError(f"features of rows {rows[0]} ... {rows[-1]} are not finite in {dtype}{fix}")
        features[np.asarray(rows)] = numbers
        assert isinstance(features, np.memmap)
        features.flush()
    return unreadable
