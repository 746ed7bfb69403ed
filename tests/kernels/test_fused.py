"""Where the kernels are used."""

import sys

import pytest
import torch

from moco import kernels
from moco.config import RunWarning


def test_a_cpu_uses_the_plain_forms() -> None:
    assert not kernels.fused(torch.device("cpu"))


def test_a_gpu_without_triton_uses_the_plain_forms_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "moco.kernels.probe", None)  # importing it fails
    device = torch.device("cuda", 99)
    with pytest.warns(RunWarning, match="install Triton") as warned:
        assert [kernels.fused(device), kernels.fused(device)] == [False, False]
    assert len(warned) == 1


@pytest.mark.parametrize(("capability", "variable"), [((7, 5), "1"), ((9, 0), "0")])
def test_an_old_gpu_and_a_variable_choose_the_plain_forms(
    capability: tuple[int, int], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("moco.kernels.probe.launch", lambda device: None)
    monkeypatch.setenv("MOCO_KERNELS", variable)
    assert not kernels.fused(torch.device("cuda", 98))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.delenv("MOCO_KERNELS")
    assert kernels.fused(torch.device("cuda", 97))
