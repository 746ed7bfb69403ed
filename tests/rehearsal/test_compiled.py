"""moco's kernels, compiled for a GPU: the augmentation rounds each operation alone, the loss uses tensor cores.

And BN over groups, by the compiler of `compile=true`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal import build


@pytest.mark.slow
@pytest.mark.skipif(build.missing() != "", reason=build.missing())
def test_kernels_compile_as_intended(tmp_path: Path) -> None:
    env = build.environment(build.build(tmp_path), null=True)
    command = [sys.executable, "-m", "tests.rehearsal.compiled", str(tmp_path / "ptx.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assembly: dict[str, str] = json.loads((tmp_path / "ptx.json").read_text())
    views = {"_gray_sums", "_color", "_blur_rows", "_blur_columns", "_resize"}
    norm = {"_moments", "_normalize", "_gradient_sums", "_gradients"}
    assert set(assembly) == views | norm | {"_parts", "_combine"}
    for name in ("_gray_sums", "_color", "_blur_rows", "_blur_columns"):
        inexact = set(re.findall(r"\S*(?:fma|div\.full|approx|ftz)\S*", assembly[name]))
        assert inexact <= {"cvt.rmi.ftz.f32.f32"}, name  # floor: of the smallest negative numbers, it is 0
    assert "div.rn.f32" in assembly["_color"]
    assert re.search(r"mma\.\S*\.f32\.tf32", assembly["_parts"])
    assert re.search(r"mma\.\S*\.f32\.bf16", assembly["_parts"])


@pytest.mark.skipif(build.missing() != "", reason=build.missing())
@pytest.mark.parametrize(
    "kernels", [pytest.param("0", marks=pytest.mark.long), pytest.param("1", marks=pytest.mark.slow)]
)
def test_batch_norm_over_groups_compiles(tmp_path: Path, kernels: str) -> None:
    """Without moco's kernels, torch 2.14's compiler fails with its default settings."""
    env = build.environment(build.build(tmp_path), null=True) | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env["MOCO_KERNELS"] = kernels
    command = [sys.executable, "-m", "tests.rehearsal.inductor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(build.missing() != "", reason=build.missing())
def test_a_graph_of_compiled_networks_needs_nothing_else(tmp_path: Path) -> None:
    """Before the capture, all kernels are compiled; the graph uses its own memory and tensors that stay in place."""
    env = build.environment(build.build(tmp_path), null=True)
    env |= {name: str(tmp_path / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    recipe = "digits method.symmetric=true channels_last=true precision=bf16"
    command = [sys.executable, "-m", "tests.rehearsal.captured", str(tmp_path / "captured.json"), recipe]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "captured.json").read_text())
    assert min(found["kernels"].values()) > 0
    assert found["late"] + found["unknown"] == []
