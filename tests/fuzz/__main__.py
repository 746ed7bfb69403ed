"""Run generated cases of commands and print a table: `python -m tests.fuzz [COMMAND ...] --cases 500 --seed 0`."""

import argparse
import io
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import moco.__main__ as listing
from moco.cli import Command
from moco.config import TrainConfig
from tests.fuzz.cases import leaf_fields
from tests.fuzz.run import run
from tests.fuzz.world import build

COMMANDS = tuple(name for names in listing.COMMANDS.values() for name in names)


def fields_of(command: str) -> list[str]:
    """Return the dotted fields of a command."""
    if command == "train":
        return leaf_fields(TrainConfig)
    found = getattr(import_module(f"moco.{command}"), command)
    assert isinstance(found, Command)
    return leaf_fields(found.schema)


def main() -> int:
    """Run the cases; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    parser.add_argument("command", nargs="*", default=COMMANDS, metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        world.mkdir()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            build(world)
        print(f"{'command':<12}{'cases':>6}{'ok':>6}{'refused':>9}{'stopped':>9}{'slow':>6}{'FAILED':>8}{'seconds':>9}")
        for command in options.command:
            started = time.monotonic()
            outcome = run(command, fields_of(command), world, Path(folder, "case"), options.cases, options.seed)
            numbers = [outcome.counts[kind] for kind in ("ok", "refused", "stopped", "slow", "FAILED")]
            columns = "".join(f"{number:>{width}}" for number, width in zip(numbers, (6, 9, 9, 6, 8), strict=True))
            print(f"{command:<12}{options.cases:>6}{columns}{time.monotonic() - started:>9.0f}", flush=True)
            for case, reason in outcome.failures:
                print(f"    {case.overrides!r:.300} {case.environment or ''}\n        {reason:.500}", flush=True)
            failed += outcome.counts["FAILED"]
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
