"""Prints all evaluations of a run as one Markdown table: python scripts/results_table.py RUN.

Rows are commands with their protocols and data, columns are encoders. Reads RUN/results.json and
RUN/supervised/results.json. If an evaluation was repeated, its newest result is used.
"""

import json
import sys
from pathlib import Path
from typing import Any

from moco.runs.results import evaluated_on, label

ENCODERS = ("pixels", "untrained", "pretrained", "supervised")


def cell(figures: dict[str, Any]) -> str:
    """Format a top-1 accuracy ± half-width of its 95 % interval over seeds, or ± standard deviation over draws."""
    spread = figures.get("top1_half_width95") or figures.get("std")
    return f"{figures['top1']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def main(run: Path) -> None:
    """Print the table of a run."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for folder, supervised in ((run, False), (run / "supervised", True)):
        file = folder / "results.json"
        for entry in json.loads(file.read_text()) if file.is_file() else []:
            name = "supervised" if supervised else entry["encoder"]
            evaluation = label(entry), evaluated_on(entry.get("data") or {})
            found.setdefault(evaluation, {})[name] = cell(entry["figures"])
    columns = [name for name in ENCODERS if any(name in row for row in found.values())]
    print("| top-1 % | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    several = len({data for _, data in found}) > 1
    for (name, data), row in found.items():
        title = f"{name}, on {data}" if several else name
        print(f"| {title} | " + " | ".join(row.get(encoder, "–") for encoder in columns) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
