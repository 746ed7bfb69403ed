"""The parts of `python -m scripts.bench gpu`. Each yields its checks as they are done, so that none is lost.

python -m scripts.bench.gpu_parts NAME FILE [tiny]      run one part and write its checks to FILE
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.bench import gpu_runs, gpu_steps
from scripts.bench.gpu_recipe import Check, Setting


class Part(NamedTuple):
    """A part, its time limit and what it shows."""

    run: Callable[[Setting], Iterator[Check]]
    seconds: float
    about: str


# The limits are estimates, since no GPU has run the parts; their sum is ten minutes.
PARTS = {
    "tests": Part(gpu_runs.tests, 40, "the tests that compute on a GPU"),
    "parity": Part(gpu_steps.parity, 55, "the GPU computes what the CPU computes"),
    "methods": Part(gpu_steps.methods, 25, "the GPU computes what the CPU computes, for the other methods"),
    "waits": Part(gpu_steps.waits, 20, "the host never waits for the GPU in a step"),
    "sanitizer": Part(gpu_steps.sanitizer, 25, "no races between the streams of step and loader"),
    "precision": Part(gpu_steps.precision, 65, "bfloat16 and compilation keep the gradient"),
    "norms": Part(gpu_runs.norms, 15, "BN by kernels, by torch's operations, and over all processes"),
    "cifar": Part(gpu_steps.cifar, 55, "the step of the CIFAR-10 notebook"),
    "epochs": Part(gpu_steps.epochs, 45, "three epochs of the CIFAR-10 notebook"),
    "peers": Part(gpu_runs.peers, 20, "training on images of CIFAR-10's size, and lightly"),
    "imagenet": Part(gpu_steps.imagenet, 50, "the steps of the ImageNet recipes"),
    "losses": Part(gpu_runs.losses, 20, "InfoNCE against a long queue"),
    "loading": Part(gpu_runs.loading, 30, "images from files"),
    "overlap": Part(gpu_steps.overlap, 20, "the next batch is made during a step"),
    "nccl": Part(gpu_runs.nccl, 15, "NCCL with one process"),
    "ranks": Part(gpu_runs.ranks, 20, "two processes on one GPU, by gloo"),
    "probe": Part(gpu_runs.probe, 40, "evaluations on the GPU and on the CPU"),
    "commands": Part(gpu_runs.commands, 40, "commands, resume, several processes"),
}


def main(name: str, file: Path, tiny: bool) -> None:
    """Run one part and write its checks to a file after each."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    done: list[dict[str, Any]] = []
    for check in PARTS[name].run(Setting(device, tiny)):
        done.append(asdict(check))
        file.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["tiny"])
