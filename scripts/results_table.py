"""Prints all evaluations of a run as one Markdown table.

python scripts/results_table.py RUN

Rows are commands with their protocols and data, columns are encoders. Reads RUN/results.json and
RUN/supervised/results.json. If an evaluation was repeated, its newest result is used.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from moco.config import ConfigError
from moco.runs.results import encoder_names, evaluated_on, evaluation_key, label, newest, recorded

FIRST = ("pixels", "untrained", "pretrained")  # the order of columns
CAPTION = (
    "±: half of Student's 95 % interval over seeds; of kNN with few labels and of few-shot episodes, the standard "
    "deviation over draws."
)


def cell(figures: dict[str, Any]) -> str:
    """Format a top-1 accuracy, or else another named measure, with what `CAPTION` states."""
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
    if not any(recorded(folder) for folder in (run, run / "supervised")):
        inside = next(iter(sorted(run.glob("*/results.json"))), None)
        parser.error(
            f"{run} has no results: name the directory of a run that was evaluated"
            + (f", such as {inside.parent}" if inside else "")
        )
    return run


def main(run: Path) -> None:
    """Print the table of a run."""
    own, supervised = newest(recorded(run)), newest(recorded(run / "supervised"))
    encoders = [*encoder_names(own), *("supervised" for _ in supervised)]
    rows: dict[tuple[str, ...], tuple[str, str]] = {}
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for entry, encoder in zip([*own, *supervised], encoders, strict=True):
        key = evaluation_key(entry)
        rows[key] = label(entry), evaluated_on(entry.get("data") or {})
        cells.setdefault(key, {})[encoder] = cell(entry["figures"])
    columns = sorted(dict.fromkeys(encoders), key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    print("| top-1 % | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    several = len({data for _, data in rows.values()}) > 1
    for key, (name, data) in rows.items():
        title = f"{name}, on {data}" if several else name
        print(f"| {title} | " + " | ".join(cells[key].get(encoder, "–") for encoder in columns) + " |")


if __name__ == "__main__":
    try:
        main(parsed(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"results_table: {error}")
    print(f"\n{CAPTION}")
