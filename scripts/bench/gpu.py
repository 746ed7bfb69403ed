"""Test moco on a GPU in at most ten minutes: what only a GPU can show, with pass or fail for each check.

Each part runs in a process of its own, so that a part that fails or hangs does not end the others. --only runs some
parts. gpu.json and gpu.md in --output hold the result. docs/benchmarks.md has the command that reproduces the published
accuracy; its 200 epochs take longer.

--tiny runs every part on small networks, also on the CPU, to check the command itself. Its times mean nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from moco.files import WriteError, check_writable
from scripts.bench.gpu_parts import PARTS
from scripts.bench.gpu_recipe import Check
from scripts.bench.machine import machine
from scripts.bench.timing import Table

VERDICTS = {True: "pass", False: "FAIL", None: "–"}  # None: a figure without a limit


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, help="time limit of each part (default: its own, 600 s for all parts)")
    parser.add_argument("--tiny", action="store_true", help="small networks, on the GPU if there is one")


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table per part, then write all of them to `options.output`; exit with status 1 if a check failed."""
    if not (torch.cuda.is_available() or options.tiny):
        sys.exit("no GPU: this command tests moco on a GPU; add --tiny to check the command itself on the CPU")
    try:
        check_writable(options.output / "gpu.json")
    except WriteError as error:
        sys.exit(str(error))
    found = dict[str, list[Check]]()
    for name in options.only:
        began = time.monotonic()
        found[name] = run_part(name, options)
        yield table(name, found[name], time.monotonic() - began)
    checks = {name: [asdict(each) for each in part] for name, part in found.items()}
    result = {"machine": machine(), "tiny": options.tiny, "parts": checks}
    (options.output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = ["| part | check | measured | wanted | |", "| --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {name} | {each.what} | {each.measured} | {each.wanted} | {VERDICTS[each.passed]} |"
        for name, part in found.items()
        for each in part
    ]
    (options.output / "gpu.md").write_text("\n".join([*machine(), "", *lines, ""]), encoding="utf-8")
    if any(each.passed is False for part in found.values() for each in part):
        sys.exit(1)


def run_part(name: str, options: Namespace) -> list[Check]:
    """Run a part in a process of its own and return its checks; a failure or a timeout is a check that fails."""
    file = options.output / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.bench.gpu_parts", name, str(file), *(["tiny"] if options.tiny else [])]
    limit = options.seconds or PARTS[name].seconds
    part = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = part.communicate(timeout=limit)
        last = (errors.strip().splitlines() or [f"status {part.returncode}"])[-1]
        problem = last if part.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"not finished after {limit:g} s"
    finally:
        end_with_children(part)
    checks = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    file.unlink(missing_ok=True)
    failure = [Check("the part runs to its end", problem, "no error", passed=False)] if problem else []
    return [Check(**each) for each in checks] + failure


def end_with_children(part: subprocess.Popen[str]) -> None:
    """End a process and those that it started, so that they do not slow the next part: first ask, then kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(part.pid, number)
            part.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def table(name: str, checks: list[Check], seconds: float) -> Table:
    """Return the table of a part."""
    rows = [[each.what, each.measured, each.wanted, VERDICTS[each.passed]] for each in checks]
    return Table(f"{name}: {PARTS[name].about} ({seconds:.0f} s)", ["", "measured", "wanted", ""], rows)
