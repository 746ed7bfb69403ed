"""Read safetensors files, and write them atomically."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moco.files import atomic_write
from moco.untrusted import refuse_special_file


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, with metadata, to `path`.

    Raises:
        WriteError: if the file cannot be written; an earlier file is left unchanged.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with atomic_write(path) as temporary:
        # Not with safetensors' save_file: it hides system errors and makes the file readable only for its owner.
        temporary.write_bytes(save(tensors, dict(metadata or {})))


def load_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file.

    Raises:
        SafetensorError, OSError, ValueError: if the file is no safetensors file, or is damaged.
    """
    refuse_special_file(path)
    with safe_open(path, "pt") as file:
        names = file.keys()
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
