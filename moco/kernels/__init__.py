"""Kernels for GPUs, written in Triton: a few launches do what torch's operations do in dozens.

Each function also has a plain form, of torch's operations, which runs on a CPU and on a GPU without Triton. Tests
compare both forms: they agree bit for bit or up to rounding (docs/gpu.md). Triton comes with torch's CUDA builds for
Linux. Triton compiles each kernel when the kernel is first used. For this, Triton needs a C compiler. It keeps compiled
kernels in a folder of its own.

`import moco.kernels` does not import Triton; the other modules of this package do. Import those only where `fused`
returns True.
"""

import functools
import os
import warnings

import torch

from moco.config import RunWarning

_OLDEST = (8, 0)  # Ampere: tensor cores with TF32, and the oldest that Triton supports


@torch.compiler.assume_constant_result
def fused(device: torch.device) -> bool:
    """Return whether the kernels run on a device: a GPU of NVIDIA for which Triton can compile them.

    MOCO_KERNELS=0 in the environment turns them off. If Triton cannot compile, warns once with a RunWarning.
    """
    return device.type == "cuda" and _compiles(device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    if os.environ.get("MOCO_KERNELS") == "0" or torch.version.hip or torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    try:
        from moco.kernels.probe import launch

        launch(device)
    except Exception as error:  # Triton, a C compiler, Python's headers, or a folder to write to is missing
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        needed = "Triton" if isinstance(error, ImportError) else "a C compiler and Python's headers"
        warnings.warn(
            f"Triton compiles no kernels here ({reason}), so the GPU runs hundreds of small operations instead: "
            f"install {needed}",
            RunWarning,
            stacklevel=3,
        )
        return False
    return True
