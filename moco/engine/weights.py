"""Tensors in a safetensors file: written whole or not at all, and as readable as any other file."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Writes `path` under a temporary name first.

    Args:
        path: the file.
        weights: by name.
        about: the file's metadata.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, dict(about or {}))
    mask = os.umask(0)  # safetensors writes for the owner alone
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)
