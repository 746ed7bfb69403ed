"""The speed of training: images per second, the share of the time spent waiting for data, and peak memory."""

import time

import torch

from moco.runtime.memory import peak_memory


class StepTimes:
    """Adds up the durations of steps between two records.

    Args:
        device: its peak memory is recorded.
        batch_size: images per step, over all processes.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._steps, self._busy, self._waited = 0, 0.0, 0.0

    def add_step(self, began: float, arrived: float) -> None:
        """Count a step that ends now, whose batch was requested at `began` and arrived at `arrived` (perf_counter)."""
        # On a GPU the host is at most one step ahead of the device; the mean over the steps hides that.
        self._busy += time.perf_counter() - began
        self._waited += arrived - began
        self._steps += 1

    def record(self) -> dict[str, float]:
        """Return the means over the steps since the last record, and the peak memory so far."""
        rate, wait = self._steps * self._batch_size / self._busy, self._waited / self._busy
        self._steps, self._busy, self._waited = 0, 0.0, 0.0
        return {
            "speed/images_per_second": rate,
            "speed/data_wait": wait,
            "speed/peak_memory_gib": peak_memory(self._device) / 2**30,
        }
