"""The choice of the precision: as configured, or bfloat16 if it is measurably faster."""

import pytest
import torch
from torch import nn

from moco.models.encoder import build_encoder
from moco.runtime import precision
from moco.runtime.precision import pick_precision

CPU = torch.device("cpu")
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def test_a_configured_precision_is_used() -> None:
    for wanted in ("fp32", "bf16", "fp16"):
        assert pick_precision(wanted, ENCODER, 4, CPU) == (wanted, "as configured")


@pytest.mark.parametrize(("able", "gain", "expected"), [(True, 2.0, "bf16"), (True, 1.1, "fp32"), (False, 2.0, "fp32")])
def test_bfloat16_needs_instructions_and_a_measured_speedup(
    able: bool, gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has", lambda name: able)
    monkeypatch.setattr(precision, "_measure_speedup", lambda encoder, images: gain)
    picked, why = pick_precision("auto", ENCODER, 4, CPU)
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
