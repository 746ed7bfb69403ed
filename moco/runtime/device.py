"""The device on which this process computes."""

import os

import torch

from moco.config import require


def pick_device(name: str) -> torch.device:
    """The device of this process; "auto" is a GPU where there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    require(name != "cuda" or torch.cuda.is_available(), "device=cuda, but torch sees no GPU here: set device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
