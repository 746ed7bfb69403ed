"""Features of any pictures, written to files as they are computed: bounded memory, resumable, on any number of ranks.

A chunk is `images_at_once` rows and one pass through the network, whoever computes it. That makes an interrupted run,
two processes and one give the same bytes.

Legend: M pictures, D dimension, W processes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.config import require
from moco.config.embed import EmbedConfig
from moco.config.subject import SubjectConfig
from moco.data.base import names_digest
from moco.data.decode import ImageError
from moco.data.sources import Source
from moco.data.unreadable import find_unreadable
from moco.distributed import all_gather_object, is_rank_zero, on_rank_zero, rank, world_size
from moco.evaluation.features import stream
from moco.evaluation.subject import Subject, data_config, data_written, open_data, open_subject, weights_digest
from moco.files import write_json
from moco.interop.encoder_file import EncoderFile, ForeignFileError, build
from moco.retrieval.store import (
    FEATURES,
    PART,
    PROGRESS,
    Embedding,
    Stored,
    begin,
    finish,
    open_embedding,
    pyarrow,
)
from moco.runtime.console import progress_bar, summary_panel
from moco.runtime.device import compute_context
from moco.runtime.next_command import command
from moco.runtime.output_directory import lock_directory


def embed(config: EmbedConfig) -> None:
    """See `moco.embed.embed`."""
    with compute_context(config) as device:
        subject = open_subject(config)
        folder = Path(config.output) if config.output else subject.output / "features"
        done = compute(config, subject, folder, device)
        if is_rank_zero():
            _summarize(done, config)


def _summarize(done: Embedding, config: EmbedConfig) -> None:
    rows, dimension = done.features.shape
    skipped = len(done.stored["unreadable"])
    pictures = done.stored["pictures"]
    summary_panel(
        f"{rows:,} pictures of {pictures['root'] or pictures['name']}",
        [
            ("encoder", f"{done.stored['encoder']['source']}, {config.features}"),
            ("features", f"{done.folder / FEATURES}: {rows:,} × {dimension}, {config.dtype}"),
            ("computed", "now" if done.computed else "nothing: already complete"),
            ("rows", str(done.folder / f"index.{config.table}")),
            ("unreadable", f"{skipped:,} left out, see {done.folder / 'unreadable.csv'}" if skipped else "none"),
            ("next", command("moco.search", SubjectConfig(), index=str(done.folder), mode="duplicates")),
        ],
    )


def compute(config: EmbedConfig, subject: Subject, folder: Path, device: torch.device) -> Embedding:
    """The features in `folder`, computed where they are not complete yet. Every rank calls it and gets them.

    Raises:
        ConfigError: if the folder holds something else, the disk is too small, or the split does not exist.
        ImageError: for a picture that cannot be read, unless they are skipped.
        FloatingPointError: for features that the dtype cannot hold.
    """
    if config.table == "parquet":
        pyarrow()  # its absence shall not show after hours
    source = split_of(subject, config)
    network = network_of(subject.file, config.features, config.normalize, device)
    look = subject.look
    dimension = network(torch.zeros(1, 3, look.size, look.size, device=device)).shape[1]
    stored = describe(config, subject, source, dimension)
    lock: list[IO[str]] = []  # held by rank 0
    on_rank_zero(lambda: lock.append(lock_directory(folder, "output")))
    try:
        state = on_rank_zero(lambda: begin(folder, stored))
        if state is not None:
            features = np.lib.format.open_memmap(folder / PART, mode="r+")
            workers = data_config(config, subject).workers

            def streamed(rows: Sequence[int]) -> Iterator[Tensor]:
                at_once = config.images_at_once
                shown = (look.size, look.resize, look.mean, look.std)
                return stream(network, source, rows, *shown, device, at_once, workers)

            chunks = Chunks(len(source), config.images_at_once, state["done"])
            _fill(features, chunks, streamed, source, config.on_bad_image == "skip", state, folder)
            del features
        on_rank_zero(lambda: finish(folder, source, config.table, state))
    finally:
        for each in lock:
            each.close()
    return replace(open_embedding(folder, source), computed=state is not None)


def split_of(subject: Subject, config: EmbedConfig) -> Source:
    """The pictures that `split` names."""
    sources = open_data(config, subject)
    source: Source | None = getattr(sources, config.split)
    name = data_config(config, subject).name
    require(source is not None, f"split={config.split}: data.name={name} has none here; set split=train")
    assert source is not None
    return source


def network_of(file: EncoderFile, features: str, normalize: bool, device: torch.device) -> nn.Module:
    """Images to what is written: the backbone, with the head for "projection", to length 1 where asked for.

    Raises:
        ForeignFileError: if the projection is asked for and the file holds no head.
    """
    if features == "projection" and not file.head_weights:
        raise ForeignFileError(f"{file.source} holds no projection head: set features=backbone, or name a checkpoint")
    encoder = build(file).to(device)
    network: nn.Module = encoder if features == "projection" else encoder.backbone
    return nn.Sequential(network, _UnitLength()) if normalize else network


class _UnitLength(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1)


def describe(config: EmbedConfig, subject: Subject, source: Source, dimension: int) -> Stored:
    """All that determines the features, and where it came from."""
    file = subject.file
    data = data_config(config, subject)
    return {
        "encoder": {
            "source": str(Path(file.source).absolute()),
            "weights": config.weights,
            "backbone": file.backbone,
            "options": dict(file.options),
            "step": file.step,
            "sha256": weights_digest(file, config.features),
        },
        "pictures": {
            "name": data.name,
            "root": str(Path(data.root).absolute()) if data.name != "digits" else "",
            "split": config.split,
            "count": len(source),
            "sha256": names_digest(source),
            "content": on_rank_zero(lambda: source.content_digest()),
        },
        "data": data_written(config, subject),
        "look": json.loads(json.dumps(asdict(subject.look))),
        "features": config.features,
        "normalize": config.normalize,
        "dtype": config.dtype,
        "dimension": dimension,
        "images_at_once": config.images_at_once,
    }


@dataclass(frozen=True)
class Chunks:
    """The rows in parts: chunk c is rows c * size ... (c + 1) * size - 1 of `count`; the first `done` lie on disk."""

    count: int
    size: int
    done: int

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def rows(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))

    def of_rank(self) -> list[int]:
        """Round robin, so that what is done is always a beginning, whatever W was and will be."""
        return list(range(self.done + rank(), len(self), world_size()))


def _fill(
    features: NDArray[Any],
    chunks: Chunks,
    streamed: Callable[[Sequence[int]], Iterator[Tensor]],
    source: Source,
    skip: bool,
    state: Stored,
    folder: Path,
) -> None:
    """Computes what is not done yet: each round a chunk on each rank, then a note of it in progress.json."""
    mine = _computed(chunks, streamed, source, skip)
    with progress_bar("embedding pictures", quiet=not is_rank_zero()) as progress:
        for first in range(chunks.done, len(chunks), world_size()):
            for bad in all_gather_object(lambda: _written(features, next(mine, None))):
                state["unreadable"] |= bad
            state["done"] = min(first + world_size(), len(chunks))
            if is_rank_zero():
                write_json(folder / PROGRESS, state)
            progress(min(state["done"] * chunks.size, chunks.count), chunks.count)


Computed = tuple[Sequence[int], Tensor | None, dict[str, str]]


def _computed(
    chunks: Chunks, streamed: Callable[[Sequence[int]], Iterator[Tensor]], source: Source, skip: bool
) -> Iterator[Computed]:
    """This rank's chunks in order: rows, their features (len(rows), D), and what cannot be read, and why."""
    left = chunks.of_rank()
    while left:
        try:
            for features in streamed([row for chunk in left for row in chunks.rows(chunk)]):
                yield chunks.rows(left.pop(0)), features, {}
        except ImageError:
            if not skip:
                raise
            rows = chunks.rows(left.pop(0))
            bad = {str(row): str(error) for row, error in find_unreadable(source, rows).items()}
            good = [row for row in rows if str(row) not in bad]
            yield good, next(streamed(good)) if good else None, bad


def _written(features: NDArray[Any], computed: Computed | None) -> dict[str, str]:
    """Puts a chunk into the file and gives back what could not be read; a rank may have none in the last round."""
    if computed is None:
        return {}
    rows, values, bad = computed
    if values is not None:
        with np.errstate(over="ignore"):  # found in the next line, and said in words
            numbers = values.cpu().numpy().astype(features.dtype)
        if not np.isfinite(numbers).all():
            fix = ": set dtype=float32" if features.dtype == np.float16 and bool(values.isfinite().all()) else ""
            raise FloatingPointError(
                f"features of rows {rows[0]} ... {rows[-1]} are not finite in {features.dtype}{fix}"
            )
        features[np.asarray(rows)] = numbers
        assert isinstance(features, np.memmap)
        features.flush()
    return bad
