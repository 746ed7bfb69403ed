"""The work of moco.pack: write the images of a data set into tar shards, and resume after an interruption.

`moco.data.pack_output` describes the unfinished output; `index.json` is written last. The output depends on the images
and the settings only: not on the number of workers, nor on interruptions. So a damaged folder can be repaired by
packing a part of it again.
"""

import os
import shutil
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import DataConfig, require
from moco.config.pack import PackConfig
from moco.config.quoting import override
from moco.config.recommended import FEW_IMAGES, recipe_for
from moco.config.subject import SubjectConfig
from moco.data import pack_output, shard_index
from moco.data.base import Source
from moco.data.opening import open_sources
from moco.data.pack_output import Part, part_path, read_part
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.shard_index import INDEX, PARTS, SKIPPED, SPLITS, VERSION, file_digest
from moco.data.shard_writer import PackedImage, ShardWriter, encode_image
from moco.data.sources import refuse_output_inside
from moco.data.unreadable import refuse_many
from moco.data.workers import in_order
from moco.files import write_csv, write_errors, write_json
from moco.runtime.console import duration, log, log_next, progress_bar, summary_panel
from moco.runtime.next_command import command, free_run, given_fields, stats_command
from moco.runtime.output_directory import lock_directory
from moco.runtime.preemption import keeping

# The recipe to train with next, by data.name.
_RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"data.resident": True},  # the default recipe
    "cifar10": {"experiment": "moco_v2plus_cifar10", "data.resident": True},
    "cifar100": {"experiment": "moco_v2plus_cifar100", "data.resident": True},
    "stl10": {"experiment": "moco_v2_stl10", "data.resident": True},
    "imagenet": {"experiment": "moco_v2_imagenet"},
}

_TINY = 4096  # bytes; the headers and padding of a tar enlarge images below this size noticeably
# The fields that must be set again to read the shards.
_IMAGE_FIELDS = {f"data.{name}" for name in ("channels", "dtype", "bits", "preview")}


def pack(config: PackConfig) -> None:
    """Do the work of `moco.pack`."""
    output = Path(config.output)
    with keeping("finished shards", lambda: (output / INDEX).is_file() or any((output / PARTS).glob("*-*.npz"))):
        _pack(config, output)


def _pack(config: PackConfig, output: Path) -> None:
    started = time.monotonic()
    data = replace(config.data, resident=False)  # packing needs only a few images in memory at a time
    refuse_output_inside(data, "output", output)
    sources = open_sources(data, bank_size=0, keep_unreadable=True)
    without = "set data.label_column=none" if data.name == "huggingface" else "return no labels from the data set"
    require(
        sources.train.multi_labels is None,
        f"data.name={data.name}: shards hold one label per image, and these images can have several; to pack them "
        f"without labels, {'remove data.label_file' if data.label_file else without}",
    )
    bank = None if sources.bank is sources.train else sources.bank
    named = zip(SPLITS, (sources.train, bank, sources.held_out), strict=True)
    splits = {name: source for name, source in named if source is not None}
    settings = pack_output.settings(config, splits)
    with lock_directory(output, "output"):
        index, title = None, "packed"
        if (output / INDEX).is_file():
            index = shard_index.read_index(output, f"output={output}")
            pack_output.refuse_other_settings(output, index["settings"], settings)
            title = "already packed, and every file is intact"
            if not pack_output.verify(output, index):
                index, title = None, "repaired: the damaged part was packed again"
        if index is None:
            pack_output.begin(output, settings)
            with write_errors(output):
                parts = {name: pack_split(config, name, source) for name, source in splits.items()}
                index = finish(output, splits, parts, settings)
        shutil.rmtree(output / PARTS, ignore_errors=True)
    summarize(config, index, title, time.monotonic() - started)


class Packer:
    """Packs one split, from where an interrupted command stopped."""

    def __init__(self, config: PackConfig, split: str, source: Source) -> None:
        self.output, self.split, self.source = Path(config.output), split, source
        self.most_bytes, self.max_bad = int(config.shard_mb * 1e6), config.data.max_bad
        self.parts: list[Path] = []  # files of the finished parts
        self.start = 0  # the first image that is in none of them
        self._shards = self._packed = self._skipped = 0  # totals over the finished parts
        self._shard: ShardWriter | None = None
        self._source_bytes, self._unreadable = 0, list[list[str]]()  # of the part that is being written
        self._resume()

    def _resume(self) -> None:
        """Keep the intact parts; a damaged part, and everything after it, is packed again."""
        files = sorted((self.output / PARTS).glob(f"{self.split}-*.npz"))
        with progress_bar(f"checking finished shards of {self.split}") as progress:
            for number, file in enumerate(files):
                # After a gap in the numbers, images would be missing.
                part = self._intact_part(file) if file == part_path(self.output, self.split, number) else None
                if part is None:
                    break
                self._count(file, part)
                progress(number + 1, len(files))
        for file in files[len(self.parts) :]:
            file.unlink()
        if self.parts:
            log(f"continuing after {len(self.parts):,} finished shards of {self.split}")

    def _intact_part(self, file: Path) -> Part | None:
        """Return a finished part, or None if it or its shard is damaged."""
        try:
            part = read_part(file)
            intact = not part.shard or shard_index.is_intact(self.output / part.shard["file"], part.shard["sha256"])
        except Exception:  # a damaged zip raises many kinds of errors; the part is packed again after any of them
            return None
        return part if intact else None

    def _count(self, file: Path, part: Part) -> None:
        self.parts.append(file)
        self.start = part.next_image
        self._shards += bool(part.shard)
        self._packed += len(part.rows)
        self._skipped += len(part.skipped)

    def add(self, i: int, image: PackedImage) -> None:
        """Write image i to the shard, or add it to the unreadable images; raise an ImageError if there are too many."""
        name = self.source.name(i)
        if image.fault:
            self._unreadable.append([name, image.fault, image.reason])
            count, what = self._skipped + len(self._unreadable), f"{self.split} images"
            refuse_many(count, len(self.source), what, self.max_bad, f"the last: {name} ({image.reason})")
            return
        if self._shard is not None and self._shard.size_with(image.content) > self.most_bytes:
            self._end_part(i)
        if self._shard is None:
            path = self.output / f"{self.split}-{self._shards:06}.tar"
            self._shard = ShardWriter(path, self._shards, self._packed)
        label = -1 if self.source.labels is None else int(self.source.labels[i])
        self._shard.add(image, label, os.fsencode(name))
        self._source_bytes += image.source_bytes

    def end(self) -> None:
        """Finish the last part."""
        if self._shard is not None or self._unreadable:
            self._end_part(len(self.source))

    def _end_part(self, next_image: int) -> None:
        """Close the shard and write the file of its part, which ends before image `next_image`."""
        rows, shard = (np.empty(0, shard_index.row_type(1)), {}) if self._shard is None else self._shard.close()
        self._shard = None
        part = Part(rows, shard, next_image, self._source_bytes, self._unreadable)
        file = part_path(self.output, self.split, len(self.parts))
        pack_output.write_part(file, part)
        self._count(file, part)
        self._source_bytes, self._unreadable = 0, []

    def discard(self) -> None:
        """Remove the unfinished shard, if there is one."""
        if self._shard is not None:
            self._shard.discard()
        for file in self.output.glob(f"{self.split}-*.tar.tmp"):  # a signal ended the creation of the shard
            file.unlink(missing_ok=True)


def pack_split(config: PackConfig, split: str, source: Source) -> list[Path]:
    """Write the images of one split that no finished part contains. Return the files of all its parts, in order."""
    packer = Packer(config, split, source)
    workers = config.data.workers if config.workers is None else config.workers
    rows = range(packer.start, len(source))
    images = in_order(lambda i: encode_image(source, i, config.short_side, config.quality), rows, workers, "workers")
    try:
        with closing(images), progress_bar(f"packing {split}") as progress:
            for i, image in zip(rows, images, strict=True):
                packer.add(i, image)
                progress(i + 1, len(source))
        packer.end()
    finally:
        packer.discard()
    return packer.parts


def finish(
    output: Path, splits: dict[str, Source], parts: dict[str, list[Path]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Join the parts, write skipped.csv and finally the index, and return the index."""
    entries: dict[str, Any] = {}
    for name, source in splits.items():
        shards, part_entries = list[dict[str, Any]](), list[dict[str, Any]]()
        for part in map(read_part, parts[name]):
            shards += [part.shard] if part.shard else []
            # `verify` can restore the file of the part from this entry, the file of the rows and the list of shards.
            entry = {"rows": len(part.rows), "end": part.next_image, "before": part.source_bytes}
            part_entries.append(entry | {"skipped": part.skipped})
        if not shards:
            raise ValueError(f"none of the {len(source):,} {name} images can be read: check data.root")
        rows = output / f"{name}.npy"
        count = pack_output.join_rows(rows, parts[name])
        entries[name] = {"rows": rows.name, "sha256": file_digest(rows), "pictures": count}
        entries[name] |= {"labelled": source.labels is not None, "shards": shards, "parts": part_entries}
    skipped = ((split, *line) for split, files in parts.items() for part in files for line in read_part(part).skipped)
    write_csv(output / SKIPPED, ("split", "path", "kind", "reason"), skipped)
    classes = next((list(source.classes) for source in splits.values() if source.labels is not None), [])
    index = {"version": VERSION, "classes": classes, "splits": entries, "settings": settings}
    index["skipped"] = file_digest(output / SKIPPED)
    write_json(output / INDEX, shard_index.sealed(index))
    return index


def summarize(config: PackConfig, index: dict[str, Any], title: str, seconds: float) -> None:
    """Print the summary: the result, its files and the next command."""
    splits, output = index["splits"], Path(config.output)
    entries = list(splits.values())
    shards = [shard for split in entries for shard in split["shards"]]
    parts = [part for split in entries for part in split["parts"]]
    before, after = sum(part["before"] for part in parts), sum(shard["bytes"] for shard in shards)
    skipped = Counter(kind for part in parts for _, kind, _ in part["skipped"])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
    images = ", ".join(f"{split['pictures']:,} {name}" for name, split in splits.items())
    how = f"shorter side at most {config.short_side}, quality {config.quality}" if config.short_side else "unchanged"
    state = "as decoded frames" if config.data.name == "video" else "before"
    note = growth_note(config, before, after, sum(split["pictures"] for split in entries))
    rows = [
        ("images", f"{images}; {how}"),
        ("classes", f"{len(index['classes']):,}" if index["classes"] else "none: packed without labels"),
        ("shards", f"{len(shards):,} of at most about {config.shard_mb:g} MB"),
        ("size", f"{before / 1e6:,.1f} MB {state}, {after / 1e6:,.1f} MB now{note}"),
        ("skipped", f"{sum(skipped.values()):,} ({kinds}), see {output / SKIPPED}" if skipped else "none"),
        ("time", duration(seconds)),
        ("files", f"{output}/: {INDEX}, {', '.join(split['rows'] for split in entries)}, the shards, {SKIPPED}"),
    ]
    following = _next(config.data, output, splits["train"]["pictures"])
    is_command = following.startswith("python ")
    summary_panel(title, rows if is_command else [*rows, ("note", following)])
    if is_command:
        log_next(following, "on a GPU" if "moco_v2_folder" in following else "")


def growth_note(config: PackConfig, before: int, after: int, images: int) -> str:
    """Explain why the shards are much larger than the original files; "" if they are not, or no known reason applies.

    Sizes are in bytes.
    """
    if after <= 1.5 * before or not before:
        return ""
    size = before / images
    if size < _TINY:
        return f": a tar adds 0.5 to 2 kB to each image, and these have {size:,.0f} bytes on average"
    return ": NPY files are not compressed" * (
        not PixelFormat(config.data.channels, config.data.dtype).is_8bit_gray_or_rgb
    )


def _next(data: DataConfig, output: Path, count: int) -> str:
    """Return the command that trains on the shards; if no recipe suits the images, return a note instead."""
    recipe = _RECIPES.get(data.name) or recipe_for(count)
    shards = {"data": "shards", "data.root": str(output)}
    shards |= {name: value for name, value in given_fields(data).items() if name in _IMAGE_FIELDS}
    reads = " ".join(starmap(override, shards.items()))
    if (data.channels, data.dtype) != (RGB.channels, RGB.dtype):
        return (
            f"moco.train reads these shards with {reads}, and needs augment.mean and augment.std, one number for each "
            f"channel: {stats_command(data)} computes both from the original images"
        )
    if not recipe or (count < FEW_IMAGES and data.name not in _RECIPES):
        advice = "start from published weights, see docs/howto/own_images.md"
        return f"too few images to train from random weights: {advice}; moco.train reads these shards with {reads}"
    return command("moco.train", SubjectConfig(), **recipe, **shards, run=free_run("runs/packed"))
