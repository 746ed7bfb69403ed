"""The state of a small training run, and how checkpoints of it are compared."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco.runs.checkpoint import list_checkpoints


def state(seed: int = 0) -> dict[str, Any]:
    """Return a state such as training saves: state dicts, counters, strings, nested lists."""
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "config": {"run": "runs/a", "data": {"root": None, "sizes": [1, 2.5], "pair": (1, 2)}, "flag": True},
        "step": seed,
        "history": [{"step": 1, "knn": [61.5, 0.0, 1]}],
        "method": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal in every bit, type and name."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def steps(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]
