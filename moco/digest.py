"""The digest of a nested value, to compare such values across runs."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def digest(state: Any) -> str:
    """Return the SHA-256 over every tensor (bytes, type, shape) and plain value of a nested state, in its order."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            sha.update(f"{data.dtype}{tuple(data.shape)}".encode())
            sha.update(data.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()
