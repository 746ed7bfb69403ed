"""The parts of `python -m scripts.bench gpu` that run tests, operations, loaders and commands, see `gpu_parts`."""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from moco.api import train_config
from moco.config import DataConfig
from moco.data.loader import batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.distributed import _all_gather
from moco.kernels import fused
from moco.losses import info_nce
from moco.losses.streamed import BLOCK, Streamed, has_kernel, info_nce_streamed
from moco.models.norm import LARGEST_TOGETHER, GroupedBatchNorm
from moco.runtime.device import set_float32_precision
from scripts.bench import peer
from scripts.bench.gpu_recipe import (
    NEEDS_GPU,
    Check,
    Recipe,
    Setting,
    below,
    equal,
    largest_difference,
    losses_of,
    milliseconds,
    peak_gib,
    random_images,
    synchronize,
)
from scripts.bench.timing import stream_rate

TESTS = Path(__file__).parents[2] / "tests"
# Tests without the marker that compute on a GPU if there is one, else on the CPU.
EITHER = (
    "kernels",
    "data/test_bands.py::test_every_bit_reaches_the_device",
    "optim/test_lars.py::test_half_precision_and_devices",
)

RANKS = ("digits", "moco_v3_digits")  # shuffled keys and a queue; gathered keys and sync BN


def tests(setting: Setting) -> Iterator[Check]:
    """Run the tests that compute on a GPU."""
    if find_spec("pytest") is None:
        yield Check("tests", "not run: pytest is not installed")
        return
    on_gpu = setting.device.type == "cuda"
    marked = [str(file) for file in TESTS.rglob("test_*.py") if "@pytest.mark.gpu" in file.read_text(encoding="utf-8")]
    summary, status = pytest("-m", "gpu", *marked)
    passed = status == 0 and "skipped" not in summary if on_gpu else None
    yield Check("tests with the marker gpu", summary if on_gpu else f"{NEEDS_GPU}: {summary}", "all pass", passed)
    either = [str(TESTS / name) for name in (EITHER[-1:] if setting.tiny else EITHER)]
    summary, status = pytest(*(["-n", "8"] if find_spec("xdist") and not setting.tiny else []), *either)
    yield Check("tests that use a GPU if there is one", summary, "all pass", status == 0)


def pytest(*words: str) -> tuple[str, int]:
    """Run pytest; return the last line that it prints, and its status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1], done.returncode


def norms(setting: Setting) -> Iterator[Check]:
    """Compare BN over groups by kernels and by torch's operations, and sync BN, with BN in float64; and time them."""
    device, on_gpu = setting.device, setting.device.type == "cuda"
    set_float32_precision(tf32=False)
    if on_gpu:
        yield equal("moco's kernels run on this GPU", fused(device), True)
    n, c, side, group = (8, 4, 4, 4) if setting.tiny else (512, 64, 32, 64)
    no_kernel = {"has_kernel": lambda *_: False}
    forms: dict[str, tuple[int, dict[str, Any]]] = {
        "kernels": (group, {}),
        "torch, all groups at once": (group, no_kernel),
        "torch, group by group": (group, no_kernel | {"LARGEST_TOGETHER": 0}),
        "sync, one process": (0, {"world_size": lambda: 2}),  # its collectives see one process
    }
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        x = torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(0)) * 2 + 3
        x = x.to(device, dtype, memory_format=torch.channels_last)
        for name, (size, changes) in forms.items():
            if size == 0 and not on_gpu:
                yield Check(f"BN, {name}, {dtype}", NEEDS_GPU)
                continue
            exact = norm_results(GroupedBatchNorm(c, size).to(device, torch.float64), x.double())
            with patch.multiple("moco.models.norm", **{"LARGEST_TOGETHER": LARGEST_TOGETHER} | changes):
                layer = GroupedBatchNorm(c, size).to(device)
                found = norm_results(layer, x)
                each = milliseconds(partial(norm_results, layer, x), device, rounds=5)
            errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
            worst = max(error.item() for error in errors)
            yield below(f"BN, {name}, {dtype}: {each:.2f} ms; difference from float64", worst, tolerance)


def norm_results(layer: GroupedBatchNorm, x: Tensor) -> list[Tensor]:
    """Return the output of a layer, the gradients and the running statistics."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward((x > 3).to(x.dtype))  # exact in all types
    gradients = [each.grad for each in (x, *layer.parameters()) if each.grad is not None]
    return [out.detach(), *gradients, layer.running_mean.clone(), layer.running_var.clone()]


def losses(setting: Setting) -> Iterator[Check]:
    """Measure InfoNCE against the queue, forward and backward: in one matrix, in streamed chunks, by a kernel."""
    device, k = setting.device, 1024 if setting.tiny else 65_536
    for n in (8,) if setting.tiny else (256, 1024, 4096):
        q, key, queue = (F.normalize(torch.randn(rows, 128, device=device), dim=1) for rows in (n, n, k))
        q.requires_grad_()
        forms: dict[str, Callable[[], Any]] = {
            "one matrix": partial(info_nce, q, key, queue, 0.2),
            "streamed": partial(info_nce_streamed, q, key, queue, 0.2, chunk=BLOCK["cuda"] // n),
        }
        if has_kernel(q, key, queue):
            forms["kernel"] = partial(info_nce_streamed, q, key, queue, 0.2)
        gradients = []
        for name, form in forms.items():

            def work(form: Callable[[], Any] = form, q: Tensor = q) -> Tensor:
                found = form()
                loss = found.loss if isinstance(found, Streamed) else found[0]
                return torch.autograd.grad(loss, q)[0]

            gradients.append(work())
            memory = peak_gib(work, device)
            each = milliseconds(work, device, rounds=5)
            yield Check(f"N {n}, K {k}, {name}", f"{each:.2f} ms, {memory:.2f} GiB")
        for name, gradient in zip([*forms][1:], gradients[1:], strict=True):
            error = ((gradients[0] - gradient).norm() / gradients[0].norm()).item()
            yield below(f"N {n}: difference of the gradients, {name}", error, 1e-3)


def loading(setting: Setting) -> Iterator[Check]:
    """Measure the loader on JPEG files of 500 x 375 pixels, with the augmentation on the device."""
    config = train_config(["experiment=moco_v2_imagenet"])
    views = build_views(config.augment)
    count, batch = (16, 8) if setting.tiny else (4096, 256)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), count)
        source = load_source(DataConfig("folder", folder)).train
        for workers in (1,) if setting.tiny else (8, 16):
            plan = Plan(len(source), batch, epochs=2, seed=0)
            stream = batches(source, plan, views, setting.device, workers)
            next(stream)
            began, images = time.perf_counter(), 0
            for each in islice(stream, 1 if setting.tiny else 24):
                images += len(each.index)
            synchronize(setting.device)
            rate = images / (time.perf_counter() - began)
            stream.close()
            yield Check(f"images/s with {workers} loader processes, both views", f"{rate:,.0f}")


def photographs(folder: Path, count: int) -> None:
    """Write JPEG files of smooth random images, about as large as photographs."""
    generator = np.random.default_rng(0)
    for number in range(min(count, 64)):
        small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05}.jpg")
    for number in range(64, count):
        (folder / f"{number:05}.jpg").symlink_to(folder / f"{number % 64:05}.jpg")


def peers(setting: Setting) -> Iterator[Check]:
    """Compare the speed of training with lightly's, on random images of CIFAR-10's size."""
    if find_spec("lightly") is None:
        yield Check("images/s of lightly", "not measured: lightly is not installed")
        return
    options = Namespace(batch=32 if setting.tiny else 512, batches=3 if setting.tiny else 8, queue=4096)
    options.backbone = "convnet" if setting.tiny else "resnet18"
    network: dict[str, object] = {"width": 4} if setting.tiny else {"stem": "cifar"}
    source = random_images(options.batch * options.batches, 32)
    rates = {}
    for name, form in {"lightly": peer.lightly_epoch, "moco": peer.our_epoch}.items():
        steps = form(options, source, network)
        rates[name] = max(stream_rate(steps, options.batch, "wall") for _ in range(2))  # the first warms up
        yield Check(f"images/s of {name}, {options.backbone}, batches of {options.batch}", f"{rates[name]:,.0f}")
    yield Check("moco / lightly", f"{rates['moco'] / rates['lightly']:.2f}")


def nccl(setting: Setting) -> Iterator[Check]:
    """Compute collectives and a backward pass with DDP by NCCL in a world of one process; gloo on a CPU."""
    device, on_gpu = setting.device, setting.device.type == "cuda"
    store, backend = HashStore(), "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device if on_gpu else None)
    x = torch.arange(6.0, device=device).view(3, 2)
    collectives: dict[str, Callable[[Tensor], object]] = {
        "all_reduce": dist.all_reduce,
        "broadcast": lambda out: dist.broadcast(out, src=0),
        "all_gather": lambda out: _all_gather(out, x),
        "all_to_all": lambda out: dist.all_to_all_single(out, x, [3], [3]),
    }
    for name, call in collectives.items():
        out = x.clone() if name in ("all_reduce", "broadcast") else torch.zeros_like(x)
        call(out)
        yield equal(f"{backend}: {name}", out.tolist(), x.tolist())
    objects: list[Any] = [None]
    dist.all_gather_object(objects, {"rank": 0})
    yield equal(f"{backend}: all_gather_object", objects, [{"rank": 0}])
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).to(device)
    gradients = []
    for forward in (network, DistributedDataParallel(network, gradient_as_bucket_view=True)):
        network.zero_grad()
        forward(x).sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None]))
    yield equal(f"{backend}: gradients with DDP equal those without", torch.equal(*gradients), True)
    dist.destroy_process_group()
    yield equal(f"{backend}: process group after its end", dist.is_initialized(), False)


def ranks(setting: Setting) -> Iterator[Check]:
    """Compare two processes on one GPU with one process; by gloo, since NCCL needs a GPU for each process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            rank_losses, (folder, setting), nprocs=2, start_method="spawn"
        )
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for name in RANKS:
        one = losses_of(Recipe([f"experiment={name}", "precision=fp32"], setting))
        worst = max(largest_difference(one, each[name]) for each in found)
        yield below(f"loss of 5 steps of {name} on two ranks, relative difference from one process", worst, 1e-4)


def rank_losses(rank: int, folder: str, setting: Setting) -> None:
    """Write the losses of five steps on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: losses_of(Recipe([f"experiment={name}", "precision=fp32"], setting)) for name in RANKS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def probe(setting: Setting) -> Iterator[Check]:
    """Evaluate the same encoder on the CPU and on the GPU: the linear probe and kNN."""
    with tempfile.TemporaryDirectory() as folder:
        few = ["experiment=digits", f"epochs={1 if setting.tiny else 5}", "optim.warmup_epochs=0", "threads=1"]
        yield equal("status of moco.train", call(["moco.train", *few, f"run={folder}"]), 0)
        commands = {
            "linear": ["moco.linear", "seeds=1", "epochs=2", "batch_size=256", "sweep.lrs=[0.1,1]"],
            "knn": ["moco.knn", "k=[1]", "temperature=[0.1]"],
        }
        for name, words in commands.items():
            found = []
            for device in ("cpu", setting.device.type):
                yield equal(
                    f"status of moco.{name} device={device}", call([*words, f"run={folder}", f"device={device}"]), 0
                )
                results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
                found.append([each["figures"]["top1"] for each in results if each["command"] == name][-1])
            yield below(f"top-1 of moco.{name}, difference from the CPU", abs(found[0] - found[1]), 1, " points")


def commands(setting: Setting) -> Iterator[Check]:
    """Train, interrupt, resume, and train in two processes; and compare with an uninterrupted run."""
    epochs = 2 if setting.tiny else 6
    with tempfile.TemporaryDirectory() as folder:
        few = ["experiment=digits", f"epochs={epochs}", f"device={setting.device.type}", "precision=fp32"]

        yield equal("status of moco.train", call(["moco.train", *few, f"run={folder}/whole"]), 0)
        stopped = ["moco.train", *few, f"run={folder}/parts"]
        yield equal("status after the time limit", call([*stopped, "stop_after=0.000001"]), 75)
        yield equal("status after the resume", call(stopped), 0)
        one, other = (last_loss(Path(folder, name)) for name in ("whole", "parts"))
        yield below("last loss of the resumed run, relative difference", abs(one - other) / one, 1e-5)
        two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moco.train", *few]
        if torch.cuda.device_count() >= 2 or setting.device.type == "cpu":
            yield equal("status with two processes", call([*two, f"run={folder}/two"]), 0)
            difference = abs(last_loss(Path(folder, "two")) - one) / one
            yield below("last loss with two processes, relative difference", difference, 1e-2)


def call(words: list[str]) -> int:
    """Run a module in a process of its own and return its status."""
    return subprocess.run([sys.executable, "-m", *words], stdout=sys.stderr, check=False).returncode


def last_loss(run: Path) -> float:
    """Return the last recorded loss of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([each["train/loss"] for each in records if "train/loss" in each][-1])
