"""Write safetensors files atomically."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from moco.files import atomic_write


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, with metadata, to `path`.

    Raises:
        WriteError: if the file cannot be written; an earlier file is left unchanged.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with atomic_write(path) as temporary:
        # Not with safetensors' save_file: it hides system errors and makes the file readable only for its owner.
        temporary.write_bytes(save(tensors, dict(metadata or {})))
