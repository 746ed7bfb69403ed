"""Kernels for GPUs, written in Triton: a few launches do what torch's operations do in dozens.

Each function also has a plain form, of torch's operations, which runs on a CPU and on a GPU without Triton. Tests
compare both forms: they agree bit for bit or up to rounding (docs/gpu.md). Triton comes with torch's CUDA builds for
Linux. Triton compiles each kernel when the kernel is first used. For this, Triton needs a C compiler. It keeps compiled
kernels in a folder of its own.

`import moco.kernels` does not import Triton; the other modules of this package do. Import those only where `fused`
returns True.
"""

import torch


def fused(device: torch.device) -> bool:
    """Return whether the kernels run on a device: a GPU of NVIDIA for which Triton can compile them.

    MOCO_KERNELS=0 in the environment turns them off. If Triton cannot compile, warns once with a RunWarning.
    """
    if device.type != "cuda":
        return False
    from moco.kernels.choice import compiles  # imports torch's compiler, which takes a second

    return bool(compiles(device))
