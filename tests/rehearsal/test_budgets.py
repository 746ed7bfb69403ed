"""Budgets of steps at their real size: launches, waits, collectives and memory may fall, and never rise.

A change that lowers a number lowers its budget, and the table of docs/gpu.md. With `-s`, pytest prints each `Count`.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal import build

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
COUNT = [sys.executable, "-m", "tests.rehearsal.count"]
COMPILER = 60  # seconds of processor time to compile cifar10_notebook; about 25 are needed
COMMAND = "python -m pytest -s -m 'slow or long' tests/rehearsal/test_budgets.py"  # regenerates the numbers of the page
# Recipe and processes: launches for the views, launches of a step, waits, copies, collectives, peak memory in GiB.
BUDGETS: dict[tuple[str, int], tuple[int, int, int, int, int, float]] = {
    ("cifar10_notebook", 1): (9, 414, 0, 9, 0, 1.53),
    ("cifar10_notebook compile=true", 1): (9, 386, 0, 9, 0, 1.54),
    ("moco_v2_imagenet", 8): (8, 1386, 0, 12, 40, 1.99),
    ("moco_v3_resnet50_imagenet_100", 16): (8, 3194, 0, 118, 343, 22.4),
    ("moco_v3_vit_base_imagenet", 64): (8, 2275, 0, 15, 44, 10.6),
    ("cifar10_notebook cuda_graph=true", 1): (9, 17, 0, 9, 0, 2.11),
    ("cifar10_notebook compile=true cuda_graph=true", 1): (9, 18, 0, 10, 0, 2.12),
    ("moco_v2_imagenet cuda_graph=true", 8): (8, 417, 0, 13, 36, 2.93),
}


def asked(recipe: str, processes: int, library: Path, folder: Path) -> tuple[int, int, int, int, int, float]:
    """Return what a step asks for, in the order of `BUDGETS`.

    A process per recipe: memory may stay allocated. An empty folder per recipe: compilers use the results of earlier
    compilations.
    """
    folder.mkdir()
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    env, file = build.environment(library, null=True) | caches, folder / "count.json"
    case = {"recipe": f"{recipe} precision=bf16", "processes": processes}
    done = subprocess.run(
        [*COUNT, str(file), json.dumps(case)], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(file.read_text())
    count: dict[str, Any] = json.loads(file.read_text())
    batch, step = count["batch"], count["step"]
    waits, memory = batch["waits"] + step["waits"], count["peak_bytes"] / 2**30
    return batch["launches"], step["launches"], waits, step["copies"], step["collectives"], memory


@pytest.mark.skipif(build.missing() != "", reason=build.missing())
@pytest.mark.parametrize(
    ("recipe", "processes"),
    [pytest.param(*key, marks=pytest.mark.long if "compile" in key[0] else pytest.mark.slow) for key in BUDGETS],
)
def test_steps_stay_within_their_budgets(tmp_path: Path, recipe: str, processes: int) -> None:
    found, budget = asked(recipe, processes, build.build(tmp_path), tmp_path / "count"), BUDGETS[recipe, processes]
    assert all(number <= limit for number, limit in zip(found, budget, strict=True)), (found, budget)


def processor_time(recipe: str, library: Path, folder: Path) -> float:
    """Return the processor time of a count and its children, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked(recipe, 1, library, folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.long
@pytest.mark.skipif(build.missing() != "", reason=build.missing())
def test_compilation_stays_within_its_budget(tmp_path: Path) -> None:
    """The budget is more than twice the time on two busy cores."""
    library = build.build(tmp_path)
    plain = processor_time("cifar10_notebook", library, tmp_path / "plain")
    compiled = processor_time("cifar10_notebook compile=true", library, tmp_path / "compiled")
    print(f"processor time: {compiled:.1f} s with compile=true, {plain:.1f} s without")
    assert compiled - plain <= COMPILER


def test_without_the_stand_in_the_count_names_the_command_to_use() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("STANDIN_")}
    done = subprocess.run(COUNT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"run: {COMMAND}" in done.stderr
    assert f"`{COMMAND}`" in PAGE.read_text()


def test_the_page_has_the_budgets() -> None:
    """docs/gpu.md: the last number of each cell is today's."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    for (recipe, processes), budget in BUDGETS.items():
        (row,) = (cells for cells in rows if cells[0] == f"`{recipe}`, {processes}")
        assert [float(re.findall(r"[\d.]+", cell.replace(",", ""))[-1]) for cell in row[1:]] == list(budget)
