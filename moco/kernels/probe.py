"""The smallest kernel, to find out whether Triton works on a machine."""

import torch
import triton


@triton.jit
def _nothing(x):
    pass


def launch(device: torch.device) -> None:
    """Compile a kernel for the device and launch it. Raises whatever Triton raises."""
    with torch.cuda.device(device):
        _nothing[(1,)](torch.empty(1, device=device))
