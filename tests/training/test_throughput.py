"""What is said of speed and memory: operations against their formulas, the probe, the profile, out of memory."""

import gzip
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from moco.models.encoder import build_encoder
from moco.runtime import precision
from moco.runtime.memory import OutOfMemory, explain_out_of_memory, keep_freed_memory, peak_memory, training_fix
from moco.runtime.precision import pick_precision
from moco.training.throughput import PROFILED, Profile, encoder_flops, matrix_rate, step_flops

CPU = torch.device("cpu")


class Convolution(nn.Module):
    """3 -> 5 channels, 3 x 3, same size; then everything to 7 numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * size**2, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer(images).flatten(1))
        return out


@pytest.mark.parametrize("size", [4, 6])
def test_a_multiply_add_counts_as_two_operations(size: int) -> None:
    conv, linear = 2 * 5 * 3 * 9 * size**2, 2 * 5 * size**2 * 7
    forward, both = encoder_flops(Convolution(size), 2, size)
    assert forward == conv + linear
    assert both == 2 * conv + 3 * linear  # images need no gradient: the first layer has one product less


def test_counting_operations_does_not_change_the_network() -> None:
    encoder = build_encoder("convnet", {"width": 4}, 2, 0, 8, "grouped", 4).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    forward, both = encoder_flops(encoder, 8, 16)
    assert 0 < 2 * forward < both <= 3 * forward
    assert not encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_the_operations_of_a_step() -> None:
    class Method(nn.Module):
        def __init__(self, keys: bool, passes: int) -> None:
            super().__init__()
            self.encoder, self.passes = Convolution(4), passes
            self.momentum_encoder = Convolution(4) if keys else None

    forward, both = encoder_flops(Convolution(4), 2, 4)
    assert step_flops(Method(True, 1), 2, 4, views=2) == both + forward
    assert step_flops(Method(True, 2), 2, 4, views=2) == 2 * (both + forward)
    assert step_flops(Method(False, 1), 2, 4, views=2) == 2 * both


def test_the_rate_of_matrix_products_agrees_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("moco.training.throughput.SIDE", {"cpu": 8, "cuda": 8})
    monkeypatch.setattr("moco.training.throughput.time.perf_counter", lambda: float(next(ticks)))
    assert matrix_rate(CPU, torch.float32) == 2 * 8**3  # one tick each


def test_a_configured_precision_is_used() -> None:
    for wanted in ("fp32", "bf16", "fp16"):
        assert pick_precision(wanted, Convolution(4), 4, CPU) == (wanted, "as configured")


@pytest.mark.parametrize(("able", "gain", "expected"), [(True, 2.0, "bf16"), (True, 1.1, "fp32"), (False, 2.0, "fp32")])
def test_bfloat16_needs_instructions_and_a_measured_speedup(
    able: bool, gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has", lambda name: able)
    monkeypatch.setattr(precision, "_measure_speedup", lambda encoder, images: gain)
    picked, why = pick_precision("auto", Convolution(4), 4, CPU)
    assert picked == expected
    assert ("measured" in why) == able


def test_measuring_the_speedup_changes_neither_the_encoder_nor_the_random_numbers() -> None:
    encoder = build_encoder("convnet", {"width": 4}, 2, 0, 8, "grouped", 4)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert precision._measure_speedup(nn.Sequential(encoder, nn.Dropout()), torch.zeros(3, 3, 16, 16)) > 0
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_profile_writes_a_trace_and_a_table(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(tmp_path / "profile", CPU, said.append)
    for _ in range(2 * PROFILED + 3):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step()
    profile.close()
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == PROFILED
    assert len(said) == 1
    assert "trace.json.gz" in said[0]


def test_peak_memory_is_that_of_the_process() -> None:
    assert peak_memory(CPU) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak_memory(CPU) > 2**26


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_an_allocator_set_by_the_user_is_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False


def test_glibc_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    calls = []

    class Library:
        @staticmethod
        def mallopt(number: int, value: int) -> int:
            calls.append((number, value))
            return 1

    monkeypatch.setattr("moco.runtime.memory.ctypes.CDLL", lambda name: Library)
    assert keep_freed_memory() is True
    assert {number for number, _ in calls} == {-4, -1, -2}


def test_out_of_memory_is_one_sentence() -> None:
    fix = training_fix(256, 2, 2, on_gpu=False, precision="fp32")
    expected = (
        r"out of memory on cpu: \d+\.\d of \d+\.\d GiB .*; a micro-batch has 64 images \(batch_size=256 / 2 "
        r"processes / accumulate=2\): set accumulate=4 .*smaller batch_size"
    )
    with pytest.raises(OutOfMemory, match=expected), explain_out_of_memory(CPU, fix):
        torch.empty(2**60)
    assert "precision=bf16" in training_fix(256, 1, 1, on_gpu=True, precision="fp32")


@pytest.mark.parametrize("error", [RuntimeError("boom"), NotImplementedError("no"), RecursionError("again")])
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory(CPU, "buy more"):
        raise error


def test_a_profile_with_too_few_steps_is_not_written(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(tmp_path / "profile", CPU, said.append)
    for _ in range(PROFILED + 2):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step()
    profile.close()
    profile.close()
    assert not (tmp_path / "profile").exists()
    assert f"profile=true needs {2 * PROFILED} steps, and there were {PROFILED + 2}" in said[0]
