"""Where the kernels are used."""

import sys

import pytest
import torch

from moco import kernels
from moco.config import RunWarning


def test_a_cpu_uses_the_plain_forms() -> None:
    assert not kernels.fused(torch.device("cpu"))


def test_a_gpu_without_triton_uses_the_plain_forms_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moco.kernels.probe", None)  # importing it fails
    device = torch.device("cuda", 99)
    with pytest.warns(RunWarning, match="install Triton") as warned:
        assert [kernels.fused(device), kernels.fused(device)] == [False, False]
    assert len(warned) == 1
