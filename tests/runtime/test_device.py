"""The GPU of a Mac, device=mps: what is refused there, and what is computed on the CPU. See also tests/rehearsal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.config import ConfigError
from moco.config.choose import ChooseConfig, check_choose
from moco.config.convert import ConvertConfig, check_convert
from moco.config.detect import DetectConfig, check_detect
from moco.config.finetune import FinetuneConfig, check_finetune
from moco.config.segment import SegmentConfig, check_segment
from moco.config.temperature import TemperatureConfig, check_temperature
from moco.config.train import check
from moco.config.transfer import TransferConfig, check_transfer
from moco.runtime.device import describe_device, float64_device, many_shapes, pick_device
from moco.runtime.memory import OutOfMemory, explain_out_of_memory, peak_memory
from moco.runtime.precision import pick_precision
from moco.training.build import choose_precision
from moco.training.checks import check_gradients
from tests.rehearsal.run import configuration
from tests.test_overrides import composed

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture
def _mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("_mac")
def test_mps_is_picked_only_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("mps") == MPS
    assert pick_device("auto") == CPU
    assert describe_device(MPS).startswith("mps, threads=")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device=mps with torchrun"):
        pick_device("mps")


def test_mps_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=mps, but torch finds no MPS device here: set device=cpu"):
        pick_device("mps")


def test_float64_is_computed_on_the_cpu_for_mps_only() -> None:
    assert [float64_device(each) for each in (CPU, MPS)] == [CPU, CPU]
    cuda = torch.device("cuda", 1)
    assert float64_device(cuda) == cuda


@pytest.mark.parametrize(
    "field",
    [
        *("compile", "cuda_graph", "shard", "activation_checkpointing", "precision=bf16", "precision=fp16"),
        "evaluate.precision=bf16",
    ],
)
def test_training_refuses_what_mps_does_not_support(field: str) -> None:
    name, value = field.split("=") if "=" in field else (field, "true")
    check(configuration("digits", "device=mps"))
    with pytest.raises(ConfigError, match=f"device=mps does not support {name}={value}: set device=cpu"):
        check(configuration("digits", "device=mps", f"{name}={value}"))


@pytest.mark.parametrize(
    ("command", "schema", "check_command", "words"),
    [
        ("choose", ChooseConfig, check_choose, "runs=[r]"),
        ("detect", DetectConfig, check_detect, "run=r"),
        ("segment", SegmentConfig, check_segment, "run=r"),
        ("temperature", TemperatureConfig, check_temperature, ""),
        ("transfer", TransferConfig, check_transfer, "run=r"),
        ("convert", ConvertConfig, check_convert, "run=r to=timm output=encoder.pth"),
        ("finetune", FinetuneConfig, check_finetune, "run=r precision=bf16"),
    ],
)
def test_commands_refuse_what_mps_does_not_support(
    command: str, schema: type[Any], check_command: Callable[[Any], None], words: str
) -> None:
    config = composed(command, schema, "device=mps", *words.split())
    with pytest.raises(ConfigError, match=r"device=mps.*set device=cpu"):
        check_command(config)


def test_mps_computes_in_float32() -> None:
    assert pick_precision("auto", nn.Identity(), 4, MPS)[0] == "fp32"
    config = configuration("digits", "precision=auto")
    assert choose_precision(config, {"precision": "fp32"}, nn.Identity(), MPS) == ("fp32", "as before")
    with pytest.raises(ConfigError, match="precision=bf16"):
        choose_precision(config, {"precision": "bf16"}, nn.Identity(), MPS)


def test_memory_on_mps_is_that_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 3 * 2**30)
    assert peak_memory(MPS) == 3 * 2**30
    with pytest.raises(OutOfMemory, match=r"out of memory on mps: 3\.0 of"), explain_out_of_memory(MPS, "use less"):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 3.00 GiB)")


class _Scaled(nn.Linear):
    """A layer whose second device computes another gradient: the first call is that of the CPU."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__(3 * 16 * 16, 4)
        self.scales = scales

    def __deepcopy__(self, memo: Any) -> "_Scaled":
        copied = _Scaled(self.scales)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, images: Tensor) -> Tensor:
        scaled = self.scales.pop(0) * super().forward(images.flatten(1))
        return scaled


@pytest.mark.parametrize("scale", [1.01, 1.5])
def test_a_run_starts_only_with_the_gradients_of_the_cpu(scale: float) -> None:
    config, encoder = configuration("digits", "augment.size=16"), _Scaled([1.0, scale])
    if scale < 1.2:
        check_gradients(config, encoder, CPU)
        return
    with pytest.raises(ConfigError, match=r"differ by 50 % from those on the CPU: set device=cpu"):
        check_gradients(config, encoder, CPU)


def test_cudnn_measures_nothing_for_many_shapes_and_measures_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with many_shapes():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
