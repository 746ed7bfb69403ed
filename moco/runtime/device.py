"""The device of this process."""

import os

import torch

from moco.config import require


def pick_device(name: str) -> torch.device:
    """Return the device of this process: "cpu", "cuda", or with "auto" a GPU if there is one.

    Raises:
        ConfigError: for "cuda" if there is no GPU.
    """
    require(name != "cuda" or torch.cuda.is_available(), "device=cuda, but torch finds no GPU: set device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
