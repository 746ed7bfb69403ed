"""Prints all evaluations of a run as one Markdown table: python scripts/results_table.py RUN.

Rows are commands with their protocols, columns are encoders. Reads RUN/results.json and RUN/supervised/results.json. If
an evaluation was repeated, its newest result is used.
"""

import json
import sys
from pathlib import Path
from typing import Any

ENCODERS = ("pixels", "untrained", "pretrained", "supervised")


def cell(figures: dict[str, Any]) -> str:
    """Format a top-1 accuracy ± half-width of its 95 % interval over seeds, or ± standard deviation over draws."""
    spread = figures.get("top1_half_width95") or figures.get("std")
    return f"{figures['top1']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def main(run: Path) -> None:
    """Print the table of a run."""
    found: dict[str, dict[str, str]] = {}
    for folder, supervised in ((run, False), (run / "supervised", True)):
        file = folder / "results.json"
        for entry in json.loads(file.read_text()) if file.is_file() else []:
            name = "supervised" if supervised else entry["encoder"]
            found.setdefault(f"{entry['command']}, {entry['protocol']}", {})[name] = cell(entry["figures"])
    columns = [name for name in ENCODERS if any(name in row for row in found.values())]
    print("| top-1 % | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for protocol, row in found.items():
        print(f"| {protocol} | " + " | ".join(row.get(name, "–") for name in columns) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
