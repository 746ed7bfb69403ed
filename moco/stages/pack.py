"""Packing from a configuration to a closing table: shard by shard, each finished one kept whatever happens then.

While it goes on, `output/parts/` holds the settings and, of each finished shard, its part of the index; `index.json` is
written last, and `parts/` goes. What is written depends on the pictures and the settings alone: not on the number of
workers, nor on where it was interrupted.

Legend: N pictures of a split.
"""

import csv
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from moco.config import ConfigError, require
from moco.config.judge import JudgeConfig
from moco.config.pack import PackConfig
from moco.data.decode import ImageError
from moco.data.packing import Part, Picture, Shard, no_rows, prepared, read_part, write_part, write_rows
from moco.data.shards import INDEX, PARTS, SPLITS, VERSION, damaged, digest_of, read_index
from moco.data.sources import Source, Sources
from moco.engine.display import Display, counting, duration
from moco.evaluation.cache import source_digest
from moco.stages.embedding import locked, write_json
from moco.stages.hints import command
from moco.stages.setup import open_sources

SETTINGS = "settings.json"
SKIPPED = "skipped.csv"


def pack(config: PackConfig) -> None:
    """See `moco.pack.pack`."""
    began, output = time.monotonic(), Path(config.output)
    data = replace(config.data, resident=False)  # a few pictures at a time are enough
    splits = splits_of(open_sources(data, bank_size=0, keep_bad=True))
    wanted = settings(config, splits)
    lock = locked(output)
    try:
        if (output / INDEX).is_file():
            about = read_index(output, f"output={output}")
            refuse_other(output, about["settings"], wanted)
            verify(output, about)
            title = "already packed, and every shard is as it was written"
        else:
            begin(output, wanted)
            with writing(output):
                parts = {name: pack_split(config, name, source) for name, source in splits.items()}
                about = finish(output, splits, parts, wanted)
            title = "packed"
        shutil.rmtree(output / PARTS, ignore_errors=True)
    finally:
        lock.close()
    summarise(config, about, title, time.monotonic() - began)


def splits_of(sources: Sources) -> dict[str, Source]:
    """What there is to pack, by the names that the shards get; a bank that is the training split itself is none."""
    found = {"train": sources.train, "bank": sources.bank, "held_out": sources.held_out}
    if sources.bank is sources.train:
        found["bank"] = None
    assert tuple(found) == SPLITS
    return {name: source for name, source in found.items() if source is not None}


def settings(config: PackConfig, splits: dict[str, Source]) -> dict[str, Any]:
    """All that determines the shards, by the names of the fields; `pictures` is what is in each split."""
    data = config.data
    with counting("looking at the pictures' names and dates", quiet=False) as progress:
        pictures = {}
        for number, (name, source) in enumerate(splits.items()):
            pictures[name] = {"count": len(source), "sha256": source_digest(source)}
            progress(number + 1, len(splits))
    return {
        "short_side": config.short_side,
        "quality": config.quality if config.short_side else None,
        "shard_mb": config.shard_mb,
        "data.name": data.name,
        "data.labels": data.labels,
        "pictures": pictures,
    }


def refuse_other(output: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ConfigError, naming each field, if the folder holds shards of other pictures or settings."""
    differing = [
        f"{name}={there.get(name)} (now {value})"
        for name, value in wanted.items()
        if name != "pictures" and there.get(name) != value
    ]
    if not differing and there.get("pictures") != wanted["pictures"]:
        counts = [
            ", ".join(f"{split['count']:,} {name}" for name, split in each.items())
            for each in (there["pictures"], wanted["pictures"])
        ]
        differing.append(f"other pictures, or the same ones changed since ({counts[0]}; now {counts[1]})")
    require(
        not differing,
        f"output={output} holds shards with {' and '.join(differing)}: choose another output, or remove that folder",
    )


def verify(output: Path, about: dict[str, Any]) -> None:
    """Reads every shard of a finished folder.

    Raises:
        ValueError: if one is not as it was written.
    """
    with counting("checking shards", quiet=False) as progress:
        wrong = damaged(output, about, progress)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"{output / wrong[0]}{more} are not as they were written (SHA-256): take them from a copy, or remove "
            f"{output} and pack again"
        )


def begin(output: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder for parts, or checks that what was begun there is the same.

    Raises:
        ConfigError: if the folder holds something else.
    """
    file = output / PARTS / SETTINGS
    if file.is_file():
        try:
            there = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file} is damaged: remove {output} and start again") from error
        refuse_other(output, there, wanted)
        return
    others = sorted(each.name for each in output.iterdir() if each.name not in (".lock", PARTS))
    require(not others, f"output={output} is not empty and holds no shards ({others[:1]}): choose another folder")
    with writing(output):
        (output / PARTS).mkdir(exist_ok=True)
        write_json(file, wanted)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """A disk that is full or gone ends in one sentence; what is finished stays.

    Raises:
        ValueError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"output={output} cannot be written to ({error.strerror or error}): make room there, then start the same "
            "command again, it goes on behind the last finished shard"
        ) from error


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
        with counting(f"checking finished shards of {self.split}", quiet=False) as progress:
            for number, file in enumerate(files):
                part = self._whole(file)
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
        except (ValueError, KeyError, EOFError, BadZipFile):
            return None
        shard = self.output / part.shard["file"] if part.shard else None
        return part if shard is None or (shard.is_file() and digest_of(shard) == part.shard["sha256"]) else None

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
        file = self.output / PARTS / f"{self.split}-{len(self.parts):06}.npz"
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
            raise ImageError(
                f"{bad} of the {len(self.source):,} {self.split} pictures cannot be read, more than data.max_bad="
                f"{self.max_bad:g} allows, the last: {name} ({reason}); python -m moco.check_data finds all: mend or "
                "remove them, or raise data.max_bad"
            )


def pack_split(config: PackConfig, split: str, source: Source) -> list[Path]:
    """Writes what is missing of one split; gives the parts of its index in order."""
    packer = Packer(config, split, source)
    workers = config.data.workers if config.workers is None else config.workers
    pictures = prepared(source, packer.start, workers, config.short_side, config.quality)
    try:
        with closing(pictures), counting(f"packing {split}", quiet=False) as progress:
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
        told = [read_part(file)._replace(rows=no_rows()) for file in parts[name]]  # the rows, part by part, below
        shards = [part.shard for part in told if part.shard]
        if not shards:
            raise ValueError(f"none of the {len(source):,} {name} pictures can be read: look into data.root")
        rows = output / f"{name}.npy"
        count = write_rows(rows, parts[name])
        about[name] = {
            "rows": rows.name,
            "sha256": digest_of(rows),
            "pictures": count,
            "labelled": source.labels is not None,
            "bytes_before": sum(part.before for part in told),
            "skipped": dict(Counter(kind for part in told for _, kind, _ in part.skipped)),
            "shards": shards,
        }
    _write_skipped(output / SKIPPED, parts)
    classes = next((list(source.classes) for source in splits.values() if source.labels is not None), [])
    index = {"version": VERSION, "classes": classes, "splits": about, "settings": wanted}
    write_json(output / INDEX, index)
    return index


def _write_skipped(path: Path, parts: dict[str, list[Path]]) -> None:
    """The list of what was left out, as its columns say."""
    temporary = path.with_suffix(".tmp")
    # A name that is no text is written as the bytes that it is.
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("split", "path", "kind", "reason"))
        for split, files in parts.items():
            for part in files:
                table.writerows((split, *line) for line in read_part(part).skipped)
    temporary.replace(path)


def summarise(config: PackConfig, about: dict[str, Any], title: str, seconds: float) -> None:
    """The closing panel: what happened, where it is, what to run next."""
    splits, output = about["splits"], Path(config.output)
    every = list(splits.values())
    shards = [shard for split in every for shard in split["shards"]]
    before, after = sum(split["bytes_before"] for split in every), sum(shard["bytes"] for shard in shards)
    skipped: Counter[str] = sum((Counter(split["skipped"]) for split in every), Counter())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
    pictures = ", ".join(f"{split['pictures']:,} {name}" for name, split in splits.items())
    how = f"shorter side at most {config.short_side}, quality {config.quality}" if config.short_side else "as they were"
    on_shards = {"experiment": "moco_v2_folder", "data": "shards", "data.root": str(output), "run": "runs/packed"}
    rows = [
        ("pictures", f"{pictures}; {how}"),
        ("classes", f"{len(about['classes']):,}" if about["classes"] else "none: packed without labels"),
        ("shards", f"{len(shards):,} of at most {config.shard_mb:g} MB"),
        ("size", f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now"),
        ("skipped", f"{sum(skipped.values()):,} ({kinds}), see {output / SKIPPED}" if skipped else "none"),
        ("time", duration(seconds)),
        ("files", f"{output}/: {INDEX}, {', '.join(split['rows'] for split in every)}, the shards, {SKIPPED}"),
        ("next", command("moco.train", JudgeConfig(), **on_shards)),
    ]
    Display(1, 1, 0, quiet=False).summary(title, rows)
