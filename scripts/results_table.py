"""Prints all evaluations of a run, or the means over runs with several seeds, as one Markdown table.

python scripts/results_table.py RUN [RUN ...]

Rows are commands with their protocols, settings and data; columns are encoders, one for each set of weights. Only
results with the same settings, images and labels share a row. Reads RUN/results.json and RUN/supervised/results.json.
If an evaluation was repeated, its newest result is used. Several runs may differ in their seed only.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.config import ConfigError, require
from moco.runs.comparison import image_notes, placed
from moco.runs.directory import difference, recorded_config
from moco.runs.results import recorded

FIRST = ("pixels", "untrained", "pretrained")  # the order of columns
CAPTION = (
    "±: half of Student's 95 % interval over seeds or few-shot episodes; for kNN with few labels, the standard "
    "deviation over draws."
)
CAPTION_OF_RUNS = "Each value is the mean ± the standard deviation over {} runs, whose seeds are {}."

Rows = dict[str, dict[str, dict[str, Any]]]  # the figures of results.json, by the titles of row and column


def measure_of(figures: dict[str, Any]) -> str | None:
    """Return the name of the measure to show: top-1 accuracy, or else another one; None if there is none."""
    return next((each for each in ("top1", "mAP", "mIoU", "AP") if figures.get(each) is not None), None)


def cell(found: Sequence[dict[str, Any]]) -> str:
    """Format the figures of one run with the ± that `CAPTION` explains, or the mean of several runs."""
    name = next(filter(None, map(measure_of, found)), None)
    values = [each[name] for each in found if name is not None and each.get(name) is not None]
    if not values:
        return "–"
    spread = found[0].get(f"{name}_half_width95") or found[0].get("std")
    if len(found) > 1:
        spread = statistics.stdev(values) if len(values) > 1 else None
    measure = "" if name == "top1" else f"{name} "
    missing = f" ({len(values)} of {len(found)} runs)" if len(values) < len(found) else ""
    return f"{measure}{statistics.mean(values):.1f}" + (f" ± {spread:.1f}" if spread is not None else "") + missing


def parsed(words: list[str]) -> list[Path]:
    """Parse the command line, and refuse a folder without results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the directory of a run")
    runs: list[Path] = parser.parse_args(words).runs
    for run in runs:
        if run.is_file():
            parser.error(f"{run} is a file: name its directory, {run.parent}")
        if not any(recorded(folder) for folder in (run, run / "supervised")):
            inside = next(iter(sorted(run.glob("*/results.json"))), None)
            parser.error(
                f"{run} has no results: name the directory of a run that was evaluated"
                + (f", such as {inside.parent}" if inside else "")
            )
    return runs


def seeds_of(runs: Sequence[Path]) -> list[int]:
    """Return the seeds of several runs.

    Raises:
        ConfigError: if two runs have the same seed or differ in another field that affects results.
    """
    configs = [recorded_config(run) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        require(bool(config), f"{run} has no config.yaml: the mean over seeds needs runs of moco.train")
        other = difference(runs[0], configs[0], config | {"seed": configs[0]["seed"]})
        require(not other, f"{runs[0]} and {run} differ in more than the seed: {other}")
    seeds = [config["seed"] for config in configs]
    twice = next((run for i, run in enumerate(runs) if seeds[i] in seeds[:i]), None)
    require(twice is None, f"two runs have the seed of {twice}: name runs with different seeds")
    return seeds


def rows_of(run: Path) -> Rows:
    """Return the results of a run."""
    supervised = [  # the name of the column says that it was trained with labels
        entry
        | ({"encoder": "supervised", "trained_with_labels": False} if entry.get("encoder") == "pretrained" else {})
        for entry in recorded(run / "supervised")
    ]
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    name_data = False  # whether rows name the data set: if there are several, or notes about its images
    for entry, evaluation, data, encoder in placed([*recorded(run), *supervised]):
        rows.setdefault((evaluation, data), {})[encoder] = entry.get("figures") or {}
        name_data = name_data or bool(image_notes(entry.get("data") or {}))
    name_data = name_data or len({data for _, data in rows}) > 1
    return {
        f"{evaluation}, on {data}" if name_data else evaluation: cells for (evaluation, data), cells in rows.items()
    }


def main(runs: Sequence[Path]) -> str:
    """Print the table of a run, or of the means over several runs. Return the sentence that explains ±."""
    seeds = seeds_of(runs) if len(runs) > 1 else []
    tables = [rows_of(run) for run in runs]
    titles = dict.fromkeys(title for table in tables for title in table)
    columns = sorted(
        dict.fromkeys(name for table in tables for cells in table.values() for name in cells), key=column_order
    )
    print("| top-1 % | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for title in titles:
        cells = (cell([table.get(title, {}).get(name, {}) for table in tables]) for name in columns)
        print(f"| {title} | " + " | ".join(cells) + " |")
    return CAPTION_OF_RUNS.format(len(runs), ", ".join(map(str, seeds))) if seeds else CAPTION


def column_order(name: str) -> int:
    """Return the place of a column: that of its encoder in `FIRST`, or after these."""
    encoder = name.partition(",")[0]
    return FIRST.index(encoder) if encoder in FIRST else len(FIRST)


if __name__ == "__main__":
    try:
        caption = main(parsed(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"results_table: {error}")
    print(f"\n{caption}")
