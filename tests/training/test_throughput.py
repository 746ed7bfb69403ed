"""Operations compared with formulas, the rate of matrix products, and the files of a profile."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moco.models.encoder import build_encoder
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


def test_a_profile_writes_a_trace_and_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    profile = Profile(tmp_path / "profile", CPU, lines.append)
    for _ in range(2 * PROFILED + 3):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step()
    profile.close()
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == PROFILED
    assert len(lines) == 1
    assert "trace.json.gz" in lines[0]
    assert capfd.readouterr().err == ""  # torch's profiler would report that there is no GPU


def test_a_profile_with_too_few_steps_is_not_written(tmp_path: Path) -> None:
    lines: list[str] = []
    profile = Profile(tmp_path / "profile", CPU, lines.append)
    for _ in range(PROFILED + 2):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step()
    profile.close()
    profile.close()
    assert not (tmp_path / "profile").exists()
    assert f"profile=true needs {2 * PROFILED} steps, and there were {PROFILED + 2}" in lines[0]
