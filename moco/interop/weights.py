"""Write safetensors files atomically, with the usual permissions."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moco.files import atomic_write


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, with metadata, to `path`.

    Raises:
        WriteError: if the disk is full; an earlier file is left unchanged.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, dict(metadata or {}))
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # safetensors gives the number only in its text
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise
        mask = os.umask(0)  # safetensors makes the file readable only for its owner
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
