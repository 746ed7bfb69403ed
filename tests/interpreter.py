"""Triton's interpreter, which computes kernels on a CPU: see `tests.conftest`."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion


def _is_broken() -> bool:
    """Return whether Triton takes a NumPy array of one element for a number, which NumPy refuses from 2.4 on."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4"


needs_interpreter = pytest.mark.skipif(
    _is_broken(), reason="the interpreter of Triton 3.6 (torch 2.11) fails with NumPy 2.4: install 'numpy<2.4'"
)
