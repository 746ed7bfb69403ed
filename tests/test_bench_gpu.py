"""The acceptance on a GPU: each part runs in its tiny form, and a part that fails or hangs does not end the others."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts.bench import gpu
from scripts.bench.__main__ import parsed
from scripts.bench.gpu_parts import PARTS
from scripts.bench.gpu_recipe import NEEDS_GPU, Check
from scripts.bench.gpu_steps import LAUNCHES
from tests.rehearsal import build
from tests.rehearsal.test_budgets import BUDGETS

QUICK = ("parity", "methods", "waits", "sanitizer", "norms", "losses", "nccl", "peers")
# On the CPU, these parts have a check that cannot be made there.
UNAVAILABLE = ("tests", "sanitizer", "norms")


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in PARTS])
def test_a_part_runs_in_its_tiny_form(part: str, tmp_path: Path) -> None:
    checks = gpu.run_part(part, parsed(["gpu", "--tiny", "--seconds", "500", "--output", str(tmp_path)]))
    assert checks
    assert not [each for each in checks if each.passed is False]
    assert any(NEEDS_GPU in each.measured for each in checks) == (part in UNAVAILABLE and not torch.cuda.is_available())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(build.missing() != "", reason=build.missing())
def test_parts_pass_on_the_emulated_gpu(tmp_path: Path) -> None:
    """Those whose operations the CPU can compute; it launches no kernels of moco."""
    env = build.environment(build.build(tmp_path))
    for part in ("methods", "sanitizer", "norms", "nccl"):
        file = tmp_path / "checks.json"
        command = [sys.executable, "-m", "tests.rehearsal.acceptance", part, str(file)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        failed = [each["what"] for each in json.loads(file.read_text()) if each["passed"] is not True]
        assert failed == ["moco's kernels run on this GPU"] * (part == "norms"), part


def test_the_limits_add_up_to_ten_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) == 600


def test_the_rehearsed_launches_are_those_of_the_budgets() -> None:
    rehearsed = {("cifar10_notebook " + what).removesuffix(" compile=false"): n for what, n in LAUNCHES.items()}
    assert {name: BUDGETS[name, 1][1] for name in rehearsed} == rehearsed


def test_a_part_that_fails_or_hangs_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gpu", "--tiny", "--only", "waits", "losses", "--output", str(tmp_path / "out")]
    options = parsed([*words, "--seconds", "0.01"])
    with pytest.raises(SystemExit) as ended:
        print(*gpu.run(options), sep="\n")
    assert ended.value.code == 1
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(written["parts"]) == ["waits", "losses"]
    assert all(part[-1]["measured"] == "not finished after 0.01 s" for part in written["parts"].values())
    assert (tmp_path / "out" / "gpu.md").read_text().count("FAIL") == 2
    monkeypatch.setattr(sys, "executable", "false")
    (check,) = gpu.run_part("waits", parsed(words))
    assert check == Check("the part runs to its end", "status 1", "no error", passed=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"no GPU: .* --tiny"):
        next(gpu.run(parsed(["gpu"])))


def test_a_part_that_hangs_ends_with_the_processes_that_it_started(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(1, flush=True); sys.stdin.read()"
    part = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert part.stdout is not None
    part.stdout.readline()
    began = time.monotonic()
    gpu.end_with_children(part)
    assert part.stdout.read() == ""  # the child has ended, too: it holds the other end
    assert time.monotonic() - began < 30
