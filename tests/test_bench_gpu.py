"""The acceptance on a GPU: each part runs in its tiny form, and a part that fails or hangs does not end the others."""

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench import gpu
from scripts.bench.__main__ import parsed
from scripts.bench.gpu_parts import PARTS, Check

QUICK = ("parity", "waits", "losses")


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in PARTS])
def test_a_part_runs_in_its_tiny_form(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {part: PARTS[part]._replace(seconds=500)})
    checks = gpu.run_part(part, parsed(["gpu", "--tiny", "--output", str(tmp_path)]))
    assert checks
    assert not [each for each in checks if each.passed is False]
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails_or_hangs_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed(["gpu", "--tiny", "--only", "waits", "losses", "--output", str(tmp_path / "out")])
    monkeypatch.setattr(gpu, "PARTS", {name: PARTS[name]._replace(seconds=0.01) for name in ("waits", "losses")})
    with pytest.raises(SystemExit) as ended:
        print(*gpu.run(options), sep="\n")
    assert ended.value.code == 1
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(written["parts"]) == ["waits", "losses"]
    assert all(part[-1]["measured"] == "not finished after 0.01 s" for part in written["parts"].values())
    assert (tmp_path / "out" / "gpu.md").read_text().count("FAIL") == 2
    monkeypatch.setattr(gpu, "PARTS", PARTS)
    monkeypatch.setattr(sys, "executable", "false")
    (check,) = gpu.run_part("waits", options)
    assert check == Check("the part runs to its end", "status 1", "no error", passed=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"no GPU: .* --tiny"):
        next(gpu.run(parsed(["gpu"])))
