"""Whether the kernels can be compiled for a GPU: a constant in code that torch.compile compiles."""

import functools
import os
import warnings

import torch

from moco.config import RunWarning

_OLDEST = (8, 0)  # Ampere: tensor cores with TF32, and the oldest that Triton supports


@torch.compiler.assume_constant_result
def compiles(device: torch.device) -> bool:
    """Return whether Triton can compile kernels for a GPU; see `moco.kernels.fused`."""
    return _compiles(device)


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
            stacklevel=4,
        )
        return False
    return True
