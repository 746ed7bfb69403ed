"""All that is wrong with a folder of pictures, before a run: every file decoded, counted and named in a report.

Legend: N pictures, of the training tree and then of the held-out one.
"""

import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from moco.config import DataConfig
from moco.config.check_data import CheckDataConfig
from moco.data.decode import FAULTS
from moco.data.inspect import ODDITIES, Facts, inspect
from moco.data.sources import FolderSource, load_source
from moco.files import write_errors, write_json
from moco.runtime.console import Terminal, progress_bar
from moco.runtime.provenance import provenance

PART = 16  # files in one errand of a worker
_FOLDER = "unreadable folder"
_TREE_FAULTS = FAULTS | {_FOLDER: "the system does not list it: the pictures in it are missing here"}


@dataclass
class Findings:
    """What is kept of N pictures: some bytes of each, and the names of at most `listed` of a kind."""

    listed: int
    sizes: NDArray[np.int32]  # (N, 2), width and height; zeros where unreadable
    digests: NDArray[np.void]  # (N,), 16 bytes each
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # of faults and oddities
    files: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, row: int, path: str, facts: Facts) -> None:
        self.bytes += facts.length
        for kind in (facts.fault,) if facts.fault else facts.odd:
            self.note(kind, path, facts.reason)
        if not facts.fault:
            self.sizes[row], self.digests[row] = facts.size, np.void(facts.digest)
            self.formats[facts.format] += 1

    def note(self, kind: str, path: str, reason: str) -> None:
        """Counts one of a kind, and names it."""
        self.counts[kind] += 1
        named = self.files.setdefault(kind, [])
        if len(named) < self.listed:
            named.append({"path": path} | ({"reason": reason} if reason else {}))

    @property
    def good(self) -> NDArray[np.bool_]:
        """(N,), which of them can be read."""
        return self.sizes[:, 0] > 0


def check_data(config: CheckDataConfig) -> None:
    """See `moco.check_data.check_data`."""
    data = config.data
    sources = load_source(data.name, data.root, labels=data.labels, eval_root=data.eval_root, keep_unreadable=True)
    trees = [each for each in (sources.train, sources.held_out) if isinstance(each, FolderSource)]
    total = sum(len(tree) for tree in trees)
    findings = Findings(config.listed, np.zeros((total, 2), np.int32), np.zeros(total, "V16"))
    row = 0
    with progress_bar("checking pictures", quiet=False) as progress:
        for tree in trees:
            for i, facts in enumerate(inspected(tree, data.workers)):
                findings.add(row, tree.path(i), facts)
                row += 1
                progress(row, total)
            for path, why in tree.unreadable.items():
                findings.note(_FOLDER, str(Path(tree.root, path)), why)
            for path, target in tree.broken.items():
                findings.note("broken link", str(Path(tree.root, path)), f"a link to {target}, left out")
    lengths = [len(tree) for tree in trees]
    report = describe(config, trees, findings)
    output = Path(config.output)
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    show(report, output)
    stops = what_stops(data, lengths, findings)
    if stops:
        raise ValueError(f"a run would stop here: {'; '.join(stops)}; {output} names the files")


def inspected(source: FolderSource, workers: int) -> Iterator[Facts]:
    """The facts of each picture in the source's order, by worker processes; few are under way at a time.

    Raises:
        ValueError: if a worker process dies.
    """
    parts = (range(start, min(start + PART, len(source))) for start in range(0, len(source), PART))
    if workers == 0:
        for part in parts:
            yield from _inspect_all([source.path(i) for i in part])
        return
    waiting: deque[Future[list[Facts]]] = deque()
    done = 0
    with ProcessPoolExecutor(workers, initializer=_begin_worker) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(_inspect_all, [source.path(i) for i in part]))
                if len(waiting) < 4 * workers:
                    continue
                yield from (facts := waiting.popleft().result())
                done += len(facts)
            while waiting:
                yield from (facts := waiting.popleft().result())
                done += len(facts)
        except BrokenProcessPool as error:
            last = min(done + 4 * workers * PART, len(source)) - 1
            raise ValueError(
                f"a worker process died at a picture between {source.name(done)} and {source.name(last)}, most likely "
                f"for want of memory: lower data.workers={workers} (0: no worker processes)"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent speaks for them


def _inspect_all(paths: Sequence[str]) -> list[Facts]:
    return [inspect(path) for path in paths]


def what_stops(data: DataConfig, lengths: Sequence[int], findings: Findings) -> list[str]:
    """Why a run with these data fields would end, one clause a reason."""
    stops = []
    if folders := findings.counts[_FOLDER]:
        many = f"{folders:,} folder{'s' * (folders > 1)} cannot be read"
        stops.append(f"{many} (give this user the right to, or move them out of the tree)")
    trees: list[NDArray[np.int32]] = np.split(findings.sizes, np.cumsum(lengths)[:-1])
    for name, sizes in zip(("training", "held-out"), trees, strict=False):
        good = sizes[sizes[:, 0] > 0]
        bad = len(sizes) - len(good)
        counted = f"{bad:,} of the {len(sizes):,} {name} pictures cannot be read"
        if bad and data.on_bad_image == "raise":
            stops.append(f"{counted} (mend or remove them, or set data.on_bad_image=replace)")
        elif bad > data.max_bad * len(sizes):
            stops.append(f"{counted}, more than data.max_bad={data.max_bad:g} allows (mend or remove them)")
        kinds = len(np.unique(good, axis=0))
        if data.resident and kinds > 1:
            stops.append(f"the {name} pictures have {kinds:,} sizes: data.resident=true takes one (set it to false)")
    return stops


def describe(config: CheckDataConfig, trees: Sequence[FolderSource], findings: Findings) -> dict[str, Any]:
    """The report, of plain types."""

    def described(kinds: dict[str, str]) -> dict[str, Any]:
        return {
            kind: {"count": findings.counts[kind], "meaning": meaning, "files": findings.files[kind]}
            for kind, meaning in kinds.items()
            if findings.counts[kind]
        }

    ignored: Counter[str] = Counter()
    for tree in trees:
        ignored.update(tree.ignored)
    return {
        "provenance": provenance(),
        "data": asdict(config.data),
        "pictures": len(findings.sizes),
        "bytes": findings.bytes,
        "unreadable": described(_TREE_FAULTS),
        "odd": described(ODDITIES),
        "duplicates": duplicates(trees, findings),
        "ignored": dict(ignored.most_common()),
        "formats": dict(findings.formats.most_common()),
        "sizes": distribution(findings.sizes[findings.good]),
    }


def duplicates(trees: Sequence[FolderSource], findings: Findings) -> dict[str, Any]:
    """Files with the same bytes: how many could go, how many held-out ones are training pictures too, and groups."""
    rows = np.flatnonzero(findings.good)
    _, group, count = np.unique(findings.digests[rows].view("S16"), return_inverse=True, return_counts=True)
    again = count[group] > 1
    rows, group = rows[again], group[again]
    order = np.argsort(group, kind="stable")  # each group together, its rows in their order
    rows, group = rows[order], group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    train = len(trees[0])
    in_training = np.repeat(rows[starts] < train, np.diff(starts, append=len(rows)))

    def path(row: int) -> str:
        return trees[0].path(row) if row < train else trees[1].path(row - train)

    groups = np.split(rows, starts[1:]) if len(rows) else []
    return {
        "count": len(rows) - len(starts),
        "held_out_in_training": int((in_training & (rows >= train)).sum()),
        "groups": [[path(int(row)) for row in islice(each, findings.listed)] for each in groups[: findings.listed]],
    }


def distribution(sizes: NDArray[np.int32]) -> dict[str, Any]:
    """Of the readable pictures' sizes (M, 2): percentiles, and the most frequent ones."""
    if not len(sizes):
        return {}
    marks = (0, 5, 50, 95, 100)
    each, count = np.unique(sizes, axis=0, return_counts=True)
    frequent = np.argsort(-count, kind="stable")[:5]
    return {
        "percentiles": list(marks),
        "width": np.percentile(sizes[:, 0], marks).round().astype(int).tolist(),
        "height": np.percentile(sizes[:, 1], marks).round().astype(int).tolist(),
        "frequent": {f"{each[i][0]} x {each[i][1]}": int(count[i]) for i in frequent},
    }


def show(report: dict[str, Any], output: Path) -> None:
    """The report as a table, an example of each kind."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{report['pictures']:,} pictures, {report['bytes'] / 1e9:,.3f} GB")
    for name in ("", "files", "first", "what it means"):
        table.add_column(name, justify="right" if name == "files" else "left", overflow="fold")
    for style, part in (("bold red", "unreadable"), ("", "odd")):
        for kind, entry in report[part].items():
            first = entry["files"][0]
            table.add_row(
                kind,
                f"{entry['count']:,}",
                _printable(Path(first["path"]).name),
                _printable(first.get("reason", entry["meaning"])),
                style=style,
            )
    copies = report["duplicates"]
    if copies["count"]:
        first = _printable(" = ".join(Path(path).name for path in copies["groups"][0][:2]))
        table.add_row("duplicates", f"{copies['count']:,}", first, "the same bytes as a file before them")
    if copies["held_out_in_training"]:
        leaked = copies["held_out_in_training"]
        table.add_row("leaked", f"{leaked:,}", "", "held-out pictures that are training pictures too", style="bold red")
    for kind, count in report["ignored"].items():
        table.add_row(f"ignored: {_printable(kind)}", f"{count:,}", "", "no picture of the data set")
    for form, count in report["formats"].items():
        table.add_row(form, f"{count:,}", "", "readable")
    for side in ("width", "height") if report["sizes"] else ():
        marks = " / ".join(f"{each:,}" for each in report["sizes"][side])
        table.add_row(side, "", marks, "smallest / 5 % / median / 95 % / largest")
    console = Terminal(highlight=False)
    console.print(table)
    console.print(f"the files of each kind: {output}", markup=False, soft_wrap=True)


def _printable(name: str) -> str:
    """A name that may not be text, for a terminal, with nothing that rich would take as markup."""
    return escape(name.encode("utf-8", "backslashreplace").decode())
