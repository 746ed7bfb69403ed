"""Tensors in a safetensors file: written whole or not at all, and as readable as any other file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moco.files import atomic_write


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Writes `path` under a temporary name first.

    Args:
        path: the file.
        weights: by name.
        about: the file's metadata.

    Raises:
        WriteError: where the disk is full or fails; a file that was there before is as it was.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, dict(about or {}))
        except SafetensorError as error:
            raise _of_the_system(error) from error
        mask = os.umask(0)  # safetensors writes for the owner alone
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)


def _of_the_system(error: SafetensorError) -> Exception:
    """The system's error, whose number safetensors has in its text alone; without one its own error."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error
