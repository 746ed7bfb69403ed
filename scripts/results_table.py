"""Prints all evaluations of a run as one Markdown table.

python scripts/results_table.py RUN

Rows are commands with their protocols, settings and data; columns are encoders, one for each set of weights. Only
results with the same settings, images and labels share a row. Reads RUN/results.json and RUN/supervised/results.json.
If an evaluation was repeated, its newest result is used.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.runs.comparison import image_notes, placed
from moco.runs.results import recorded

FIRST = ("pixels", "untrained", "pretrained")  # the order of columns
CAPTION = (
    "±: half of Student's 95 % interval over seeds or few-shot episodes; for kNN with few labels, the standard "
    "deviation over draws."
)


def cell(figures: dict[str, Any]) -> str:
    """Format a top-1 accuracy, or else another named measure, with the ± that `CAPTION` explains."""
    name = next((each for each in ("top1", "mAP", "mIoU", "AP") if figures.get(each) is not None), None)
    if name is None:
        return "–"
    spread = figures.get(f"{name}_half_width95") or figures.get("std")
    measure = "" if name == "top1" else f"{name} "
    return f"{measure}{figures[name]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def parsed(words: list[str]) -> Path:
    """Parse the command line, and refuse a folder without results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of one run")
    run: Path = parser.parse_args(words).run
    if run.is_file():
        parser.error(f"{run} is a file: name its directory, {run.parent}")
    if not any(recorded(folder) for folder in (run, run / "supervised")):
        inside = next(iter(sorted(run.glob("*/results.json"))), None)
        parser.error(
            f"{run} has no results: name the directory of a run that was evaluated"
            + (f", such as {inside.parent}" if inside else "")
        )
    return run


def main(run: Path) -> None:
    """Print the table of a run."""
    supervised = [  # the name of the column says that it was trained with labels
        entry
        | ({"encoder": "supervised", "trained_with_labels": False} if entry.get("encoder") == "pretrained" else {})
        for entry in recorded(run / "supervised")
    ]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    name_data = False  # whether rows name the data set: if there are several, or notes about its images
    for entry, evaluation, data, encoder in placed([*recorded(run), *supervised]):
        rows.setdefault((evaluation, data), {})[encoder] = cell(entry.get("figures") or {})
        name_data = name_data or bool(image_notes(entry.get("data") or {}))
    columns = sorted(dict.fromkeys(name for cells in rows.values() for name in cells), key=column_order)
    print("| top-1 % | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    name_data = name_data or len({data for _, data in rows}) > 1
    for (evaluation, data), cells in rows.items():
        title = f"{evaluation}, on {data}" if name_data else evaluation
        print(f"| {title} | " + " | ".join(cells.get(encoder, "–") for encoder in columns) + " |")


def column_order(name: str) -> int:
    """Return the place of a column: that of its encoder in `FIRST`, or after these."""
    encoder = name.partition(",")[0]
    return FIRST.index(encoder) if encoder in FIRST else len(FIRST)


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"results_table: {error}")
    print(f"\n{CAPTION}")
