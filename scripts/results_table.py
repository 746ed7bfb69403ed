"""Prints all evaluations of a run as one Markdown table: python scripts/results_table.py RUN.

Rows are commands with their protocols and data, columns are encoders. Reads RUN/results.json and
RUN/supervised/results.json. If an evaluation was repeated, its newest result is used.
"""

import sys
from pathlib import Path
from typing import Any

from moco.runs.results import encoder_names, evaluated_on, evaluation_key, label, newest, recorded

FIRST = ("pixels", "untrained", "pretrained")  # the order of columns


def cell(figures: dict[str, Any]) -> str:
    """Format a top-1 accuracy ± half-width of its 95 % interval over seeds, or ± standard deviation over draws."""
    spread = figures.get("top1_half_width95") or figures.get("std")
    return f"{figures['top1']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


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
    main(Path(sys.argv[1]))
