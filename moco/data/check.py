"""Find everything that is wrong with a folder of images or videos before a run: decode all, and report the faults.

Shards are not decoded: the checksums of their files are compared.

Legend: N images, of the training folder and then of the held-out folder.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moco.config import DataConfig
from moco.config.check_data import CheckDataConfig
from moco.config.data import FOLDERS, SourceConfig
from moco.config.recommended import BUDGET, FEW_IMAGES, recipe_for
from moco.config.subject import SubjectConfig
from moco.data.decode import FAULTS
from moco.data.folder import FolderSource
from moco.data.image_facts import ODDITIES, ImageFacts, Moments, frame_facts, image_facts
from moco.data.label_table import label_facts, show_labels
from moco.data.labels import first_names
from moco.data.opening import class_counts, opening_lines
from moco.data.pixel_format import RGB
from moco.data.shard_check import check_shards, damage
from moco.data.sources import load_source
from moco.data.video import VideoSource
from moco.data.walk import OTHER_IMAGE_ENDINGS, VIDEO_ENDINGS
from moco.data.workers import TASK, LoaderError, count_processes, in_order
from moco.files import resolved, write_json
from moco.runtime.console import log, progress_bar, table
from moco.runtime.next_command import command, free_run, given_fields
from moco.runtime.output_directory import check_output_file
from moco.runtime.provenance import provenance
from moco.untrusted import read_json

Checked = FolderSource | VideoSource
_UNREADABLE_FOLDER = "unreadable folder"
_FAULTS = FAULTS | {_UNREADABLE_FOLDER: "the folder cannot be listed: its images are missing in this report"}


@dataclass
class Findings:
    """The properties of N images, in a few bytes each, and the names of at most `listed` files per kind."""

    listed: int
    sizes: NDArray[np.int32]  # (N, 2), width and height; zeros if unreadable
    digests: NDArray[np.void]  # (N,), 16 bytes each
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    files: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    # The numbers of faults and oddities by split, 0 for training and 1 for held-out, and kind.
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    examples: dict[tuple[int, str], str] = field(default_factory=dict)  # the first file by split and kind: path, reason
    moments: Moments | None = None  # of the training images

    def add(self, row: int, split: int, path: str, facts: ImageFacts) -> None:
        self.bytes += facts.length
        if facts.moments is not None:
            self.moments = facts.moments if self.moments is None else self.moments.joined(facts.moments)
        for kind in (facts.fault,) if facts.fault else facts.odd:
            self.note(split, kind, path, facts.reason)
        if not facts.fault:
            self.sizes[row], self.digests[row] = facts.size, np.void(facts.digest)
            self.formats[facts.format] += 1

    def count(self, kind: str) -> int:
        return self.counts[0, kind] + self.counts[1, kind]

    def note(self, split: int, kind: str, path: str, reason: str) -> None:
        """Count a file with a fault or oddity, `kind`; add it to `files`, at most `listed` files per kind."""
        self.counts[split, kind] += 1
        self.examples.setdefault((split, kind), f"{path}: {reason}")
        named = self.files.setdefault(kind, [])
        if len(named) < self.listed:
            named.append({"path": path} | ({"reason": reason} if reason else {}))


def check_data(config: CheckDataConfig) -> None:
    """Check the images or shards of `config.data`, print what is wrong, and write the report to `config.output`."""
    check_output_file(Path(config.output), "check_data.json")
    if config.data.name == "shards":
        _check_shards(config.data, Path(config.output))
    else:
        _check_images(config, Path(config.output))


def _check_shards(data: DataConfig, output: Path) -> None:
    report = check_shards(data)
    _write(report, output, data.root, "the names of the damaged files" if report["damaged"] else "the result")
    if damaged := damage(report["damaged"]):
        fix = "copy such files again, or run the command of moco.pack again where the original images are"
        raise ValueError(f"data.root={data.root}: {damaged}: {fix}")


def _check_images(config: CheckDataConfig, output: Path) -> None:
    data = config.data
    sources = load_source(replace(data, resident=False), keep_unlistable=True)
    folders = [cast(Checked, each) for each in (sources.train, sources.held_out) if each is not None]
    for line in opening_lines(sources):
        log(line)
    total = sum(len(folder) for folder in folders)
    findings = Findings(config.listed, np.zeros((total, 2), np.int32), np.zeros(total, "V16"))
    row = 0
    with progress_bar("checking images") as progress:
        for split, folder in enumerate(folders):
            start = row
            try:
                checked = in_order(
                    partial(_facts, folder, config.stats and folder is folders[0]),
                    range(len(folder)),
                    data.workers,
                    "data.workers",
                )
                for i, facts in enumerate(checked):
                    findings.add(row, split, _path(folder, i), facts)
                    row += 1
                    progress(row, total)
            except LoaderError as error:
                in_progress = (2 * count_processes(data.workers) + 1) * TASK
                first, last = row - start, min(row - start + in_progress, len(folder)) - 1
                names = f"{folder.name(first)} ... {folder.name(last)}"
                raise LoaderError(f"{error}; the image is one of {names}") from error
            files = _files(folder)
            for path, reason in files.unlistable.items():
                findings.note(split, _UNREADABLE_FOLDER, str(Path(files.root, path)), reason)
            for path, target in files.broken.items():
                path = str(Path(files.root, path))
                findings.note(split, "broken link", path, f"a link to {target}, ignored")
    report = describe(config, folders, findings)
    show(report)  # before writing: the findings stay visible if writing fails
    _write(report, output, data.root, "the files of each kind")
    if obstacles := find_obstacles(data, [len(folder) for folder in folders], findings):
        raise ValueError(f"a run with these images would fail: {'; '.join(obstacles)}; {output} lists the files")
    if data.name in FOLDERS:
        if data.labels == "none" and not data.label_file and (named := _possible_classes(folders[0])):
            log(f"without labels: {first_names(named)} are not used as classes; data.labels=folder uses them")
        drawn = sum(count for _, count in folders[0].draws) or len(folders[0])
        for line in suggest(data, len(folders[0]), config.budget, report["stats"], drawn):
            log(line)


def suggest(
    data: DataConfig, images: int, budget: int, stats: dict[str, list[float]] | None = None, drawn: int = 0
) -> list[str]:
    """Return lines that suggest the next command: one that trains on the folder, or one that must come before.

    For few images in 8-bit RGB, the command computes features with published weights instead.

    Args:
        data: the data set; for videos, the command packs their frames.
        images: the number of training images.
        budget: epochs times images per epoch.
        stats: mean and std of each channel, which the command then contains.
        drawn: images per epoch, if data.weights changes this number; 0: the same as `images`.
    """
    drawn = drawn or images
    is_rgb8 = (data.channels, data.dtype) == (RGB.channels, RGB.dtype)
    if not is_rgb8 and not stats:
        return ["for the recipe, compute mean and std of each channel: add stats=true to this command"]
    too_few = f"{images} images are too few to train from random weights: start from published ones, see "
    too_few += "docs/howto/own_images.md"
    given = given_fields(data)
    if images < FEW_IMAGES and is_rgb8:
        known = {f"data.{each.name}" for each in fields(SourceConfig)}  # the fields that moco.embed has too
        images_of = {name: value for name, value in given.items() if name in known}
        images_of |= {"on_bad_image": "skip"} if data.on_bad_image == "replace" else {}
        published = {"checkpoint": "FILE", "backbone": "resnet18", "data": data.name, **images_of}
        return [too_few, f"next: {command('moco.embed', SubjectConfig(), **published, output='runs/published')}"]
    if data.name == "video":
        packing = command("moco.pack", SubjectConfig(), data=data.name, **given, output="packed", short_side=256)
        return [f"next: {packing}", "training reads single frames from videos slowly, and from these shards fast"]
    recipe = recipe_for(drawn, budget)
    if not recipe:
        return [f"{images} images are fewer than one batch of a recipe: add images"]
    if not is_rgb8:
        recipe["experiment"] = "moco_v2_grayscale" if data.channels == 1 else "moco_v2_multispectral"
        given |= {"data.channels": data.channels, "data.dtype": data.dtype}  # instead of those of the recipe
    if data.channels == 1 and "epochs" in recipe:  # for a laptop; the sizes of moco_v2_grayscale are for a GPU
        recipe |= {"augment.size": 64, "augment.eval_resize": 72}
    normalization: dict[str, Any] = {f"augment.{name}": values for name, values in (stats or {}).items()}
    if stats and not is_rgb8 and any(abs(m) > 10 * s for m, s in zip(stats["mean"], stats["std"], strict=True)):
        normalization["augment.brightness"] = 0  # the recipe's 0.4 could move the mean by more than 4 std
    training = command("moco.train", SubjectConfig(), **recipe, **given, **normalization, run=free_run("runs/mine"))
    if "epochs" not in recipe:  # the recipe of a large data set
        return [f"next, on a GPU: {training}"]
    minutes = recipe["epochs"] * drawn / BUDGET * 10
    time = f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    lines = [f"next: {training}", f"this takes about {time} on two CPU cores"]
    if images < FEW_IMAGES:  # few images in 8-bit RGB are handled above
        lines.append(f"{images} images are few: the run's summary shows whether training has improved the encoder")
    if "augment.brightness" in normalization:
        lines.append("augment.brightness=0, because the mean is large against the standard deviation")
    return lines


def _possible_classes(folder: Checked) -> list[str]:
    """Return the top-level folders of a data set if there are several and each image lies in one of them; else []."""
    names = [folder.name(i).partition("/") for i in range(len(folder))]
    found = sorted({first for first, _, _ in names})
    return found if len(found) > 1 and all(slash for _, slash, _ in names) else []


def _facts(folder: Checked, stats: bool, i: int) -> ImageFacts:
    if isinstance(folder, VideoSource):
        return frame_facts(folder, i, stats)
    return image_facts(folder.path(i), folder.pixel_format, stats)


def _files(folder: Checked) -> FolderSource:
    return folder.files if isinstance(folder, VideoSource) else folder


def _path(folder: Checked, i: int) -> str:
    """Return the path of image i; for a frame, the path of the video and the time."""
    return folder.name_with_path(i) if isinstance(folder, VideoSource) else folder.path(i)


def find_obstacles(data: DataConfig, lengths: Sequence[int], findings: Findings) -> list[str]:
    """Return the reasons why a run with these data fields would fail."""
    obstacles = []
    if count := findings.count(_UNREADABLE_FOLDER):
        many = f"{count:,} folder{'s' * (count > 1)}"
        obstacles.append(f"{many} cannot be read (give this user permission, or move them elsewhere)")
    splits: list[NDArray[np.int32]] = np.split(findings.sizes, np.cumsum(lengths)[:-1])
    for split, (name, sizes) in enumerate(zip(("training", "held-out"), splits, strict=False)):
        readable = sizes[sizes[:, 0] > 0]
        unreadable = len(sizes) - len(readable)
        counted, fix = f"{unreadable:,} of the {len(sizes):,} {name} images cannot be read", "repair or remove them"
        if unsupported := findings.examples.get((split, "unsupported")):  # an intact file: the reason names the fix
            fix = f"{unsupported}; otherwise {fix}"
        if unreadable and not len(readable):
            example = findings.examples[max((findings.counts[split, kind], (split, kind)) for kind in FAULTS)[1]]
            obstacles.append(f"none of the {unreadable:,} {name} images can be read ({example})")
        elif unreadable and data.on_bad_image == "raise":
            more = f" data.max_bad={_share(unreadable, sizes):g}" if unreadable > data.max_bad * len(sizes) else ""
            obstacles.append(f"{counted} ({fix}, or set data.on_bad_image=replace{more})")
        elif unreadable > data.max_bad * len(sizes):
            obstacles.append(f"{counted} ({fix}, or set data.max_bad={_share(unreadable, sizes):g})")
        kinds = len(np.unique(readable, axis=0))
        if data.resident and kinds > 1:
            obstacles.append(f"the {name} images have {kinds:,} sizes: data.resident=true needs one (set it to false)")
    return obstacles


def _share(unreadable: int, sizes: NDArray[np.int32]) -> float:
    """Return the value of `data.max_bad` that allows this number of unreadable images: their share, rounded up."""
    return min(0.99, math.ceil(100 * unreadable / len(sizes)) / 100)


def describe(config: CheckDataConfig, folders: Sequence[Checked], findings: Findings) -> dict[str, Any]:
    """Return the report as dicts, lists, numbers and texts, which JSON can hold."""

    def described(kinds: dict[str, str]) -> dict[str, Any]:
        return {
            kind: {"count": findings.count(kind), "meaning": meaning, "files": findings.files[kind]}
            for kind, meaning in kinds.items()
            if findings.count(kind)
        }

    splits = dict(zip(("training", "held_out"), folders, strict=False))
    ignored = sum((Counter(folder.left_out()) for folder in folders), Counter[str]())
    return {
        "provenance": provenance(),
        "data": asdict(config.data),
        "pictures": len(findings.sizes),
        "splits": {name: len(each) for name, each in splits.items()},
        "bytes": findings.bytes,
        "stats": stats_of(findings),
        "bits": folders[0].pixel_format.bits,
        "unreadable": described(_FAULTS),
        "odd": described(ODDITIES),
        "duplicates": duplicates(folders, findings),
        "ignored": dict(ignored.most_common()),
        "classes": {name: class_counts(each) for name, each in splits.items()},
        "labels": {name: label_facts(each) for name, each in splits.items()},
        "formats": dict(findings.formats.most_common()),
        "sizes": size_distribution(findings.sizes[findings.sizes[:, 0] > 0]),
    }


def stats_of(findings: Findings) -> dict[str, list[float]]:
    """Return mean and std of each channel of the training images, with six digits; {} if they were not computed."""
    found = findings.moments
    if found is None:
        return {}
    return {name: [float(f"{x:.6g}") for x in values] for name, values in (("mean", found.mean), ("std", found.std))}


def duplicates(folders: Sequence[Checked], findings: Findings) -> dict[str, Any]:
    """Find images with the same content: the bytes of the file, or the pixels of a frame of a video.

    Returns the paths of such images in groups, the number of copies, and the number of held-out images that are also
    training images.
    """
    rows = np.flatnonzero(findings.sizes[:, 0])
    _, group, count = np.unique(findings.digests[rows].view("S16"), return_inverse=True, return_counts=True)
    repeated = count[group] > 1
    rows, group = rows[repeated], group[repeated]
    order = np.argsort(group, kind="stable")  # each group together, its rows in order
    rows, group = rows[order], group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    train = len(folders[0])
    in_training = np.repeat(rows[starts] < train, np.diff(starts, append=len(rows)))

    def path(row: int) -> str:
        return _path(folders[0], row) if row < train else _path(folders[1], row - train)

    groups = np.split(rows, starts[1:]) if len(rows) else []
    return {
        "count": len(rows) - len(starts),
        "held_out_in_training": int((in_training & (rows >= train)).sum()),
        "groups": [[path(int(row)) for row in islice(each, findings.listed)] for each in groups[: findings.listed]],
    }


def size_distribution(sizes: NDArray[np.int32]) -> dict[str, Any]:
    """Return percentiles of the readable images' sizes (M, 2), and the most frequent sizes."""
    if not len(sizes):
        return {}
    marks = [0, 5, 50, 95, 100]
    each, count = np.unique(sizes, axis=0, return_counts=True)
    frequent = np.argsort(-count, kind="stable")[:5]
    return {
        "percentiles": marks,
        "width": np.percentile(sizes[:, 0], marks).round().astype(int).tolist(),
        "height": np.percentile(sizes[:, 1], marks).round().astype(int).tolist(),
        "frequent": {f"{each[i][0]} x {each[i][1]}": int(count[i]) for i in frequent},
    }


def _write(report: dict[str, Any], output: Path, root: str, content: str) -> None:
    """Write the report and print its path; `content` names what the report lists."""
    replaced = _replaced(output, root)
    write_json(output, report)
    log(f"written: {output.absolute()}, with {content}{replaced}")


def _replaced(output: Path, root: str) -> str:
    """Describe the file that the report replaces; "" without such a file, or for a report of the same folder."""
    if not output.is_file():
        return ""
    try:
        earlier = str(read_json(output)["data"]["root"])
    except (ValueError, KeyError, TypeError):
        return "; it replaced a file that was no report"
    same = resolved(Path(earlier).expanduser()) == resolved(Path(root).expanduser())
    return "" if same else f"; it replaced the report of {earlier}"


def show(report: dict[str, Any]) -> None:
    """Print the report as a table, with one example per kind."""
    data, rows = report["data"], []

    def short(path: str) -> str:
        """Return a path relative to data.root; of an image in another folder, relative to the parent of that folder."""
        for root in filter(None, (data["root"], *data["more_roots"], data["eval_root"])):
            folder = Path(os.path.abspath(os.path.expanduser(root)))  # noqa: PTH100, PTH111 # as in `scan`
            if Path(path).is_relative_to(folder):
                return str(Path(path).relative_to(folder if root == data["root"] else folder.parent))
        return path

    for part in ("unreadable", "odd"):
        for kind, entry in report[part].items():
            first = entry["files"][0]
            rows.append([kind, f"{entry['count']:,}", short(first["path"]), first.get("reason", entry["meaning"])])
    alarming = set(range(len(report["unreadable"])))
    copies = report["duplicates"]
    if copies["count"]:
        names = " = ".join(short(path) for path in copies["groups"][0][:2])
        rows.append(["duplicates", f"{copies['count']:,}", names, "the same content as an earlier image"])
    if leaked := copies["held_out_in_training"]:
        alarming.add(len(rows))
        rows.append(["leaked", f"{leaked:,}", "", "held-out images that are training images too"])
    for kind, count in report["ignored"].items():
        meaning = "to use them, convert them to JPEG or PNG" if kind in OTHER_IMAGE_ENDINGS else "not used"
        meaning = "data=video uses the frames of videos" if kind in VIDEO_ENDINGS else meaning
        rows.append([f"ignored: {kind}", f"{count:,}", "", meaning])
    rows += [[form, f"{count:,}", "", "readable"] for form, count in report["formats"].items()]
    for side in ("width", "height") if report["sizes"] else ():
        marks = " / ".join(f"{each:,}" for each in report["sizes"][side])
        rows.append([side, "", marks, "smallest / 5 % / median / 95 % / largest"])
    splits = [f"{count:,} {name.replace('_', '-')}" for name, count in report["splits"].items()]
    counted = f"{' + '.join(splits)} images" if len(splits) > 1 else f"{report['pictures']:,} images"
    size = f"{report['bytes'] / 1e9:,.1f} GB" if report["bytes"] >= 1e9 else f"{report['bytes'] / 1e6:,.2f} MB"
    title = f"{counted}, {size}"
    table(title, ["", "number", "example or range", "meaning"], rows, left=(0, 2, 3), alarming=alarming)
    show_labels(report["labels"])
