"""Packing from a configuration to a closing table: shard by shard, each finished one kept whatever happens then.

While it goes on, `output/parts/` holds the settings and, of each finished shard, its part of the index; `index.json` is
written last, and `parts/` goes. What is written depends on the pictures and the settings alone: not on the number of
workers, nor on where it was interrupted. So a damaged folder can be mended by packing its rest again.

Legend: N pictures of a split.
"""

import os
import shutil
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco.config.pack import PackConfig
from moco.config.subject import SubjectConfig
from moco.data.decode import ImageError
from moco.data.opening import open_sources
from moco.data.pack_folder import begin, is_whole, refuse_other, settings
from moco.data.packing import Part, Picture, Shard, no_rows, part_path, prepared, read_part, write_part, write_rows
from moco.data.shards import INDEX, PARTS, SKIPPED, SPLITS, VERSION, digest_of, intact, read_index, sealed
from moco.data.sources import Source, Sources
from moco.files import write_csv, write_errors, write_json
from moco.runtime.console import duration, progress_bar, summary_panel
from moco.runtime.next_command import command
from moco.runtime.output_directory import lock_directory

# The recipe to train with next, by data.name: of pictures that are small, their own, and all in memory.
_RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"data.resident": True},  # the recipe that needs no name
    "cifar10": {"experiment": "moco_v2plus_cifar10", "data.resident": True},
    "cifar100": {"experiment": "moco_v2plus_cifar100", "data.resident": True},
    "stl10": {"experiment": "moco_v2_stl10", "data.resident": True},
    "imagenet": {"experiment": "moco_v2_imagenet"},
}
_QUEUE = 4096  # of moco_v2_folder


def pack(config: PackConfig) -> None:
    """See `moco.pack.pack`."""
    began, output = time.monotonic(), Path(config.output)
    data = replace(config.data, resident=False)  # a few pictures at a time are enough
    splits = splits_of(open_sources(data, bank_size=0, keep_bad=True))
    wanted = settings(config, splits)
    lock = lock_directory(output, "output")
    try:
        about, title = finished(output, wanted)
        if about is None:
            begin(output, wanted)
            with write_errors(output):
                parts = {name: pack_split(config, name, source) for name, source in splits.items()}
                about = finish(output, splits, parts, wanted)
        shutil.rmtree(output / PARTS, ignore_errors=True)
    finally:
        lock.close()
    summarize(config, about, title, time.monotonic() - began)


def finished(output: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The index of a folder that is packed to its end, and the closing table's title; None where there is work to do.

    Raises:
        ConfigError: if it holds something else than what is wanted.
        ValueError: if its index is damaged.
    """
    if not (output / INDEX).is_file():
        return None, "packed"
    about = read_index(output, f"output={output}")
    refuse_other(output, about["settings"], wanted)
    if is_whole(output, about):
        return about, "already packed, and every file is as it was written"
    return None, "mended: what was damaged is packed again"


def splits_of(sources: Sources) -> dict[str, Source]:
    """What there is to pack, by the names that the shards get; a bank that is the training split itself is none."""
    found = {"train": sources.train, "bank": sources.bank, "held_out": sources.held_out}
    if sources.bank is sources.train:
        found["bank"] = None
    assert tuple(found) == SPLITS
    return {name: source for name, source in found.items() if source is not None}


class Packer:
    """One split on its way into shards, from where an interrupted command left it.

    Args:
        config: settings and output.
        split: its name.
        source: its pictures.
    """

    def __init__(self, config: PackConfig, split: str, source: Source) -> None:
        self.output, self.split, self.source = Path(config.output), split, source
        self.most_bytes, self.max_bad = int(config.shard_mb * 1e6), config.data.max_bad
        self.parts: list[Path] = []  # files of the finished ones
        self.start = 0  # the first picture that is in none
        self._shards = self._packed = self._skipped = 0  # in all parts
        self._shard: Shard | None = None
        self._before, self._bad = 0, list[list[str]]()  # of the part that is being written
        self._go_on()

    def _go_on(self) -> None:
        """Takes over the parts that are whole; one that is not as it was written, and what follows it, is redone."""
        files = sorted((self.output / PARTS).glob(f"{self.split}-*.npz"))
        with progress_bar(f"checking finished shards of {self.split}", quiet=False) as progress:
            for number, file in enumerate(files):
                # Behind a gap in the numbers, pictures would be missing.
                part = self._whole(file) if file == part_path(self.output, self.split, number) else None
                if part is None:
                    break
                self._count(file, part)
                progress(number + 1, len(files))
        for file in files[len(self.parts) :]:
            file.unlink()

    def _whole(self, file: Path) -> Part | None:
        """A finished part, or None if it or its shard is damaged."""
        try:
            part = read_part(file)
            good = not part.shard or intact(self.output / part.shard["file"], part.shard["sha256"])
        except Exception:  # each byte of a zip that is wrong makes an error of its own; redoing the part mends all
            return None
        return part if good else None

    def _count(self, file: Path, part: Part) -> None:
        self.parts.append(file)
        self.start = part.end
        self._shards += bool(part.shard)
        self._packed += len(part.rows)
        self._skipped += len(part.skipped)

    def take(self, i: int, picture: Picture) -> None:
        """Puts picture i into the shard, or into the list of those that cannot be read.

        Raises:
            ImageError: if there are too many of these.
        """
        name = self.source.name(i)
        if picture.fault:
            self._bad.append([name, picture.fault, picture.reason])
            self._refuse_many(name, picture.reason)
            return
        if self._shard is not None and self._shard.size_with(picture.content) > self.most_bytes:
            self._end_part(i)
        if self._shard is None:
            path = self.output / f"{self.split}-{self._shards:06}.tar"
            self._shard = Shard(path, self._shards, self._packed)
        label = -1 if self.source.labels is None else int(self.source.labels[i])
        self._shard.add(picture, label, os.fsencode(name))
        self._before += picture.before

    def end(self) -> None:
        """Behind the last picture."""
        if self._shard is not None or self._bad:
            self._end_part(len(self.source))

    def _end_part(self, end: int) -> None:
        """Ends the shard; with the file of its part it counts as finished."""
        rows, about = (no_rows(), {}) if self._shard is None else self._shard.close()
        self._shard = None
        part = Part(rows, about, end, self._before, self._bad)
        file = part_path(self.output, self.split, len(self.parts))
        write_part(file, part)
        self._count(file, part)
        self._before, self._bad = 0, []

    def discard(self) -> None:
        """Removes the unfinished shard, if there is one."""
        if self._shard is not None:
            self._shard.discard()

    def _refuse_many(self, name: str, reason: str) -> None:
        bad = self._skipped + len(self._bad)
        if bad > self.max_bad * len(self.source):
            way_out = ", or raise data.max_bad" if bad < len(self.source) else ""  # it stays below 1
            raise ImageError(
                f"{bad} of the {len(self.source):,} {self.split} pictures cannot be read, more than data.max_bad="
                f"{self.max_bad:g} allows, the last: {name} ({reason}); python -m moco.check_data finds all: mend or "
                f"remove them{way_out}"
            )


def pack_split(config: PackConfig, split: str, source: Source) -> list[Path]:
    """Writes what is missing of one split; gives the parts of its index in order."""
    packer = Packer(config, split, source)
    workers = config.data.workers if config.workers is None else config.workers
    pictures = prepared(source, packer.start, workers, config.short_side, config.quality)
    try:
        with closing(pictures), progress_bar(f"packing {split}", quiet=False) as progress:
            for i, picture in enumerate(pictures, packer.start):
                packer.take(i, picture)
                progress(i + 1, len(source))
        packer.end()
    finally:
        packer.discard()
    return packer.parts


def finish(
    output: Path, splits: dict[str, Source], parts: dict[str, list[Path]], wanted: dict[str, Any]
) -> dict[str, Any]:
    """Joins the parts, writes skipped.csv and, last of all, the index, which it gives back.

    Raises:
        ValueError: if none of a split's pictures could be read.
    """
    about: dict[str, Any] = {}
    for name, source in splits.items():
        shards, ended = list[dict[str, Any]](), list[dict[str, Any]]()
        for part in map(read_part, parts[name]):
            shards += [part.shard] if part.shard else []
            # With rows and shards all of the part, as `packing.whole` needs it.
            ended.append({"rows": len(part.rows), "end": part.end, "before": part.before, "skipped": part.skipped})
        if not shards:
            raise ValueError(f"none of the {len(source):,} {name} pictures can be read: look into data.root")
        rows = output / f"{name}.npy"
        count = write_rows(rows, parts[name])
        about[name] = {
            "rows": rows.name,
            "sha256": digest_of(rows),
            "pictures": count,
            "labelled": source.labels is not None,
            "shards": shards,
            "parts": ended,
        }
    left_out = ((split, *line) for split, files in parts.items() for part in files for line in read_part(part).skipped)
    write_csv(output / SKIPPED, ("split", "path", "kind", "reason"), left_out)
    classes = next((list(source.classes) for source in splits.values() if source.labels is not None), [])
    index = {"version": VERSION, "classes": classes, "splits": about, "settings": wanted}
    index["skipped"] = digest_of(output / SKIPPED)
    write_json(output / INDEX, sealed(index))
    return index


def summarize(config: PackConfig, about: dict[str, Any], title: str, seconds: float) -> None:
    """The closing panel: what happened, where it is, what to run next."""
    splits, output = about["splits"], Path(config.output)
    every = list(splits.values())
    shards = [shard for split in every for shard in split["shards"]]
    parts = [part for split in every for part in split["parts"]]
    before, after = sum(part["before"] for part in parts), sum(shard["bytes"] for shard in shards)
    skipped = Counter(kind for part in parts for _, kind, _ in part["skipped"])
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
    pictures = ", ".join(f"{split['pictures']:,} {name}" for name, split in splits.items())
    how = f"shorter side at most {config.short_side}, quality {config.quality}" if config.short_side else "as they were"
    rows = [
        ("pictures", f"{pictures}; {how}"),
        ("classes", f"{len(about['classes']):,}" if about["classes"] else "none: packed without labels"),
        ("shards", f"{len(shards):,} of at most {config.shard_mb:g} MB"),
        ("size", f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now"),
        ("skipped", f"{sum(skipped.values()):,} ({kinds}), see {output / SKIPPED}" if skipped else "none"),
        ("time", duration(seconds)),
        ("files", f"{output}/: {INDEX}, {', '.join(split['rows'] for split in every)}, the shards, {SKIPPED}"),
        ("next", _next(config.data.name, output, splits["train"]["pictures"])),
    ]
    summary_panel(title, rows)


def _next(name: str, output: Path, count: int) -> str:
    """The command that trains on the shards, with a recipe that fits pictures of this kind and number."""
    recipe = _RECIPES.get(name, {"experiment": "moco_v2_folder"})
    if name not in _RECIPES and count < 2 * _QUEUE:  # its queue would hold the same pictures again and again
        batch = 256 if count >= 512 else 64
        queue = count // 2 // batch * batch
        if queue == 0:
            return f"too few pictures for a recipe; moco.train takes data=shards data.root={output}"
        recipe |= {"method.queue_size": queue} | ({"batch_size": batch} if batch < 256 else {})
    on_shards = recipe | {"data": "shards", "data.root": str(output), "run": "runs/packed"}
    return command("moco.train", SubjectConfig(), **on_shards)
