"""Run a part of `python -m scripts.bench gpu` on the emulated GPU: python -m tests.rehearsal.acceptance NAME FILE

The process must have the environment of `tests.rehearsal.build`. FILE becomes the checks of the part's tiny form.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moco.training.graph import StepGraph
from scripts.bench import gpu_parts
from tests.rehearsal.device import Graph, SoftDevice, own_kernels


def main(name: str, file: Path) -> None:
    """Run the part; the CPU computes its operations, and those of a CUDA graph."""
    soft, capture = SoftDevice(), StepGraph._capture

    def capture_anew(graph: StepGraph, passes: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        soft.graph = Graph()  # the parts use one graph after the other
        return capture(graph, passes)

    replay = patch("torch.cuda.CUDAGraph.replay", lambda _: soft.graph.replay())
    with soft, own_kernels(used=False), replay, patch.object(StepGraph, "_capture", capture_anew):
        gpu_parts.main(name, file, tiny=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
