"""What pretraining says of its own speed: images, data wait, utilization, memory; and a profile if asked for."""

from pathlib import Path
from statistics import median
from typing import Any

import torch

from moco.config import TrainConfig
from moco.distributed import is_rank_zero, world_size
from moco.runtime.console import Display
from moco.runtime.memory import peak_memory
from moco.runtime.precision import PRECISIONS
from moco.training.loop import Values
from moco.training.throughput import Profile, matrix_rate, step_flops


class Speed:
    """Adds to a run's records what the device is used for, and sums it up at the end.

    Args:
        config: the run's.
        method: what is trained, before it is compiled.
        device: where.
        precision: the one that was picked.
        display: told where a model's operations cannot be counted.
        wanted: whether any step is still to be done.
    """

    def __init__(
        self, config: TrainConfig, method: Any, device: torch.device, precision: str, display: Display, wanted: bool
    ) -> None:
        self._device, self._rates, self._waits, self._mfus = device, list[float](), list[float](), list[float]()
        self._flops, self._peak = 0, 1.0
        if is_rank_zero() and wanted:
            images = config.batch_size // world_size() // config.accumulate
            try:
                self._flops = step_flops(method, images, config.augment.size, config.augment.views)
            except (RuntimeError, NotImplementedError) as error:  # an operation without a shape-only form
                why = (str(error).splitlines() or [""])[0]
                display.log(
                    f"no MFU: the operations of model.backbone={config.model.backbone} cannot be counted ({why})"
                )
            # A CPU has no float16 to speak of; what runs under that name there is no measure of it.
            measured = "fp32" if device.type == "cpu" and precision == "fp16" else precision
            self._peak = matrix_rate(device, PRECISIONS[measured]) * world_size()

    def complete(self, values: Values) -> None:
        """Adds speed/mfu and speed/peak_memory_gib to a record that holds images and data wait."""
        self._rates.append(values["speed/images_per_second"])
        self._waits.append(values["speed/data_wait"])
        if self._flops:
            values["speed/mfu"] = self._flops * self._rates[-1] / self._peak
            self._mfus.append(values["speed/mfu"])
        values["speed/peak_memory_gib"] = peak_memory(self._device) / 2**30

    def row(self) -> tuple[str, str] | None:
        """The summary's line: medians over the records of this attempt."""
        if not self._rates:
            return None
        parts = [f"{median(self._rates):,.0f} images/s", f"data wait {100 * median(self._waits):.0f} %"]
        if self._mfus:
            parts.append(f"MFU {100 * median(self._mfus):.0f} % of {self._peak / 1e9:,.0f} GFLOP/s measured")
        kind = "GPU" if self._device.type == "cuda" else "process"
        parts.append(f"peak memory {peak_memory(self._device) / 2**30:.1f} GiB ({kind})")
        return "speed", ", ".join(parts)


def start_profile(config: TrainConfig, device: torch.device, display: Display) -> Profile | None:
    """With profile=true, on rank 0."""
    return Profile(Path(config.run) / "profile", device, display.log) if config.profile and is_rank_zero() else None
