"""Benchmarks. All but gpu compare variants that take turns, and print medians, ratios and the machine. gpu tests a GPU.

python -m scripts.bench NAME --help
python -m scripts.bench streamed --data IMAGES --workers 1 2 --markdown
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from rich import box, table
from rich.console import Console

from scripts.bench import augment, decode, gpu, info_nce, measures, overhead, peer, start, step, streamed, views
from scripts.bench.machine import machine
from scripts.bench.timing import CLOCKS, Table

# Each module has a docstring, `arguments(parser)`, and `run(options)`, which yields its tables.
COMPARISONS: dict[str, ModuleType] = {
    "views": views,
    "streamed": streamed,
    "augment": augment,
    "decode": decode,
    "info_nce": info_nce,
    "step": step,
    "overhead": overhead,
    "measures": measures,
    "peer": peer,
    "start": start,
    "gpu": gpu,
}
NEEDS_DATA = ("views", "streamed", "augment", "decode", "peer")


def main() -> None:
    """Run one comparison."""
    options = parsed(sys.argv[1:])
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
    log = print if options.markdown else Console(highlight=False).print
    log("\n".join(machine()) + "\n")
    run: Callable[[argparse.Namespace], Iterator[Table]] = COMPARISONS[options.name].run
    for found in run(options):
        log(as_markdown(found) if options.markdown else as_text(found))


def parsed(words: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in COMPARISONS.items():
        about = module.__doc__ or ""
        each = names.add_parser(name, help=about.splitlines()[0], description=about)
        each.set_defaults(threads=1)
        if name != "gpu":  # whose parts run in processes of their own
            each.add_argument("--rounds", type=int, default=7, help="turns of each variant, after one warm-up round")
            each.add_argument("--threads", type=int, default=1, help="of this process; loader workers always have one")
        if name not in ("gpu", "start"):  # these measure wall time
            each.add_argument(
                "--clock", choices=CLOCKS, default="wall", help="processor: user and system time, including workers"
            )
        each.add_argument("--markdown", action="store_true", help="print Markdown tables, as in docs/benchmarks.md")
        if name in NEEDS_DATA:
            each.add_argument("--data", required=True, help="folder of images")
        module.arguments(each)
    return parser.parse_args(words)


def as_markdown(found: Table) -> str:
    """Format a table as Markdown."""
    rows = [found.columns, ["---"] + ["---:"] * (len(found.columns) - 1), *found.rows]
    return f"**{found.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def as_text(found: Table) -> table.Table:
    """Format a table for a terminal."""
    out = table.Table(title=found.title, title_justify="left", box=box.SIMPLE)
    for number, column in enumerate(found.columns):
        out.add_column(column, justify="right" if number else "left")
    for row in found.rows:
        out.add_row(*row)
    return out


if __name__ == "__main__":
    main()
