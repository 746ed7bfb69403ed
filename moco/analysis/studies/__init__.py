"""Studies over several runs: the effect of the temperature, and choosing a checkpoint without labels."""

from pathlib import Path

import torch

from moco.config import ComputeConfig
from moco.runtime.device import pick_device
from moco.runtime.output_directory import prepare_output


def open_study(output: str, compute: ComputeConfig) -> tuple[Path, torch.device]:
    """Create the output directory of a study, set the number of CPU threads, and return directory and device.

    Raises ConfigError if the directory cannot be written to, or for device=cuda without a GPU.
    """
    folder = Path(output)
    prepare_output(folder)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    return folder, pick_device(compute.device, compute.tf32)
