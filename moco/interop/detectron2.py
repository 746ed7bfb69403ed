"""Detectron2's format for a ResNet: a pickle of NumPy arrays under Detectron2's names.

Source: detection/convert-pretrain-to-detectron2.py of facebookresearch/moco.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# torchvision's names on the left. Detectron2 calls layer1 res2, as the ResNet paper calls it conv2_x.
_TO_DETECTRON2 = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
_FROM_DETECTRON2 = (
    (r"^stem\.", ""),
    (r"^res(\d)", lambda stage: f"layer{int(stage[1]) - 1}"),
    (r"\bconv(\d)\.norm", r"bn\1"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut\b", "downsample.0"),
)
# The module of `_reconstruct` in a pickled array. NumPy before 1.26 knows only its old name, later versions know both.
_RECONSTRUCT, _OLD_RECONSTRUCT = "numpy._core.multiarray", "numpy.core.multiarray"
_ALLOWED = {f"{_RECONSTRUCT}._reconstruct", f"{_OLD_RECONSTRUCT}._reconstruct", "numpy.ndarray", "numpy.dtype"}


def to_detectron2(name: str) -> str:
    """Rename a weight: layer1.0.downsample.1.bias -> res2.0.shortcut.norm.bias."""
    return _renamed(name, _TO_DETECTRON2)


def from_detectron2(name: str) -> str:
    """Invert `to_detectron2`."""
    return _renamed(name, _FROM_DETECTRON2)


def _renamed(name: str, rules: Any) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def save_detectron2(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write the state of a ResNet, under torchvision's names, to a `.pkl` file.

    BN's counters are left out: Detectron2's layers have none.
    """
    model = {
        to_detectron2(name): value.detach().cpu().contiguous().numpy()
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    # Protocol 3 names `_reconstruct` once, as text before all arrays: write the name that every NumPy version has.
    data = pickle.dumps({"model": model, "__author__": "moco", "matching_heuristics": True}, protocol=3)
    written, portable = (f"c{module}\n_reconstruct\n".encode() for module in (_RECONSTRUCT, _OLD_RECONSTRUCT))
    path.write_bytes(data.replace(written, portable, 1))


def load_detectron2(path: Path) -> dict[str, Tensor]:
    """Read a `.pkl` file and return its weights under torchvision's names.

    Only arrays and plain values are loaded, no code is run.

    Raises:
        pickle.UnpicklingError: for a pickle that holds anything else.
    """
    model = _ArraysOnly(io.BytesIO(path.read_bytes())).load()["model"]
    return {from_detectron2(name): torch.from_numpy(np.array(value)) for name, value in model.items()}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
        return super().find_class(module.replace(_OLD_RECONSTRUCT, _RECONSTRUCT), name)
