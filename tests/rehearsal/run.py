"""Take a few steps of training, on an emulated device or on the CPU: python -m tests.rehearsal.run FOLDER JOBS

JOBS is a JSON list of `Job`. FOLDER/records.pt is the list of their `Record`s. The process must have the environment of
`tests.rehearsal.build` or, for MPS, of `tests.rehearsal.mps`, and REHEARSAL_SANITIZE=1 for torch's CUDA sanitizer;
under torchrun, rank 0 writes its records.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import Mock, patch

import torch
import torch._dynamo.utils as dynamo_utils
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.parallel import DistributedDataParallel

from moco.composition import register
from moco.config import TrainConfig, config_dir
from moco.data.loader import Batch
from moco.distributed import averaged_running_statistics
from moco.interop.encoder_file import save_encoder
from moco.methods.build import encoder_of
from moco.training import throughput
from moco.training.step import Measures
from moco.training.trainer import Trainer, pretrain
from tests.rehearsal.device import SoftDevice, Wait, own_kernels
from tests.rehearsal.faults import PATCHES
from tests.rehearsal.mps import MpsDevice

STEPS = 4
BACKEND = "aot_eager_decomp_partition"  # of torch.compile: all but the generation of kernels
SETTINGS = ["epochs=1", "batch_size=64", "optim.warmup_epochs=0", "evaluate.every_epochs=0", "analyse_every=0"]


class Job(TypedDict):
    """What to train."""

    recipe: str  # with overrides: "simclr_digits optim.lr=0.1"
    device: str
    fault: str  # a name of `faults.PATCHES`, or ""
    kernels: bool  # use moco's own kernels on the emulated device, interpreted: slow
    steps: int  # a quarter of them come before the capture of a CUDA graph
    dtype: str  # of the network and the views; in "float64", rounding hardly turns a ReLU on or off


class Record(TypedDict):
    """What was computed."""

    job: Job
    measures: list[dict[str, Tensor]]  # of each step
    state: dict[str, Tensor]  # of the method after the last step
    waits: list[tuple[Wait, int]]  # each with how often it occurred
    products: set[tuple[str, str]]  # see `SoftDevice`
    kernels: set[str]  # names of moco's own kernels that were used
    graph_breaks: list[str]  # where and why torch.compile left a graph
    compilations: list[tuple[int, bool]]  # of torch.compile: the number of the step, and whether in a capture
    error: str


class _Done(Exception):
    """The steps are taken."""


def configuration(recipe: str, *overrides: str) -> TrainConfig:
    """Return the configuration of a recipe."""
    name, *more = recipe.split()
    register("train", TrainConfig)
    with initialize_config_dir(config_dir(), version_base=None):
        made = OmegaConf.to_object(compose("train", overrides=[f"experiment={name}", *overrides, *more]))
    assert isinstance(made, TrainConfig)
    return made


def save_teacher(file: Path) -> str:
    """Write an untrained network as the teacher of a distillation; return its path."""
    config = configuration("digits")
    torch.manual_seed(1)
    save_encoder(file, encoder_of(config.model, config.data.channels).backbone, asdict(config), 0)
    return str(file)


def _compile_for(record: Record) -> Callable[..., None]:
    """Return a replacement of `nn.Module.compile` that notes compilations.

    It does all that `compile=true` does, except that torch's operations compute the graphs, instead of new kernels.
    """
    compile_module = nn.Module.compile

    def backend(graph: Any, inputs: Any) -> Any:
        capturing = record["job"]["device"] == "cuda" and torch.cuda.is_current_stream_capturing()
        record["compilations"].append((len(record["measures"]), capturing))
        return lookup_backend(BACKEND)(graph, inputs)

    def replacement(module: nn.Module, **_: Any) -> None:
        compile_module(module, backend=backend)

    return replacement


def convert(method: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network, which is in float32; `to` fails on the emulated MPS, so it is called only where needed."""
    if dtype != torch.float32:
        method.to(dtype)


def untimed(forward: nn.Module) -> None:
    """Keep DDP from timing its first ten steps, for which the host waits."""
    if isinstance(forward, DistributedDataParallel):
        forward.logger = Mock()


def train(job: Job, folder: Path) -> Record:
    """Take the steps of one job."""
    soft, dtype = SoftDevice() if job["device"] == "cuda" else None, getattr(torch, job["dtype"])
    record = Record(
        job=job,
        measures=[],
        state={},
        waits=[],
        products=set(),
        kernels=set(),
        graph_breaks=[],
        compilations=[],
        error="",
    )

    class Steps(Trainer):
        def _train(self) -> None:
            untimed(self.forward)
            convert(self.method, dtype)
            super()._train()

        def _step(self, step: int, batch: Batch) -> Measures | None:
            measures = super()._step(step, replace(batch, views=[each.to(dtype) for each in batch.views]))
            record["measures"].append({name: value.detach() for name, value in (measures or {}).items()})
            return measures

        def _finish_step(self, done: int) -> None:
            super()._finish_step(done)
            if soft is not None:
                soft.step = done
            if done == job["steps"]:
                with averaged_running_statistics(self.method):
                    state = self.method.state_dict()
                    record["state"] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
                raise _Done

    settings = [*SETTINGS, f"run={folder}/run", f"device={job['device']}"]
    if job["recipe"].startswith("distill"):
        settings.append(f"method.teacher={save_teacher(folder / 'teacher.safetensors')}")
    config = configuration(job["recipe"], *settings)
    fault = patch(*PATCHES[job["fault"]]) if job["fault"] else nullcontext()
    dynamo.reset()
    dynamo_utils.counters.clear()
    with (
        patch("moco.training.trainer.Trainer", Steps),
        patch("torch.nn.Module.compile", _compile_for(record)),
        soft or {"mps": MpsDevice}.get(job["device"], nullcontext)(),
        own_kernels(job["kernels"]) as record["kernels"],
        patch("moco.training.graph.EAGER_STEPS", job["steps"] // 4),
        patch("torch.cuda.CUDAGraph.replay", lambda _: soft.graph.replay() if soft else None),
        fault,
    ):
        if "REHEARSAL_SANITIZE" in os.environ:  # look for races between streams
            from torch.cuda._sanitizer import enable_cuda_sanitizer  # the import alone makes allocations slow

            enable_cuda_sanitizer()
        try:
            pretrain(config)
        except _Done:
            pass
        except Exception as error:  # a fault that was found
            record["error"] = f"{type(error).__name__}: {error}"
        record["measures"] = [{name: x.cpu() for name, x in each.items()} for each in record["measures"]]
    record["graph_breaks"] = list(dynamo_utils.counters["graph_break"])
    if soft is not None:
        record["waits"], record["products"] = list(soft.waits.items()), soft.products
    return record


def main(folder: Path, jobs: list[Any]) -> None:
    """Run the jobs, one after the other."""
    throughput.SIDE.update(
        dict.fromkeys(throughput.SIDE, 64)
    )  # the jobs do not need the measured rate of a matrix product
    records = []
    for number, job in enumerate(jobs):
        (folder / str(number)).mkdir(exist_ok=True)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # other keys of the store, which keeps the last job's
        records.append(train(job, folder / str(number)))
    if os.environ.get("RANK", "0") == "0":
        torch.save(records, folder / "records.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
