"""The parts of `python -m scripts.bench gpu`. Each yields its checks as they are done, so that none is lost.

python -m scripts.bench.gpu_parts NAME FILE [tiny]      run one part and write its checks to FILE
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moco.api import train_config
from moco.config import DataConfig, TrainConfig
from moco.data.loader import Batch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.data.sources import ArraySource, load_source
from moco.losses import info_nce
from moco.losses.streamed import BLOCK, Streamed, has_kernel, info_nce_streamed
from moco.optim.optimizers import build_optimizer
from moco.runtime.device import set_float32_precision
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.training import build
from moco.training.step import Measures, train_step
from moco.training.throughput import matrix_rate, step_flops

DIGITS = ("digits", "moco_v3_digits", "simclr_digits", "nnclr_digits", "ressl_digits")
LR, MOMENTUM = 0.03, 0.99


@dataclass(frozen=True)
class Check:
    """One line of a part. `passed` is None for a figure without a limit."""

    what: str
    measured: str
    wanted: str = ""
    passed: bool | None = None


def below(what: str, value: float, limit: float, unit: str = "") -> Check:
    """Return a check that a value is at most a limit."""
    return Check(what, f"{value:.3g}{unit}", f"≤ {limit:g}{unit}", value <= limit)


def equal(what: str, found: object, wanted: object) -> Check:
    """Return a check that two values are the same."""
    return Check(what, str(found), str(wanted), found == wanted)


class Setting(NamedTuple):
    """Where and how large a part runs."""

    device: torch.device
    tiny: bool


class Recipe:
    """A training step of a recipe on random images, with the arguments of a run of moco.train."""

    def __init__(self, overrides: list[str], setting: Setting, device: torch.device | None = None) -> None:
        """Build the step. `device` is another one than the setting's."""
        self.config, self.device = train_config(overrides), device or setting.device
        config = self.config
        if setting.tiny and config.data.name != "digits":
            make_tiny(config)
        self.method = build.make_method(config, None, self.device).train()
        self.precision, _ = pick_precision(config.precision, self.method.encoder, config.augment.size, self.device)
        set_float32_precision(config.tf32)
        self.optimizer = build_optimizer(self.method, config.optim)
        self.forward = build.distribute(config, self.method, self.device)
        build.set_batch_norm_calls(self.method, config.accumulate)
        n, size, count = config.batch_size, config.augment.size, config.augment.views
        generator = torch.Generator().manual_seed(0)
        views = [torch.randn(n, 3, size, size, generator=generator).to(self.device) for _ in range(count)]
        self.batch = Batch(torch.arange(n, device=self.device), views)
        shuffles = [np.random.default_rng(view).permutation(n) for view in range(count)]
        self.shuffles = shuffles if config.model.shuffle_keys else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        settings = build.step_settings(config, self.method, self.device, self.precision, self.device.type != "cuda")
        self.settings = replace(settings, lr=LR, momentum=MOMENTUM)

    def step(self) -> Measures:
        """Take one step; on a GPU the host does not wait for it."""
        parts = self.method, self.forward, self.optimizer, self.scaler, self.batch, self.shuffles
        return train_step(*parts, self.settings)

    def gradient(self) -> Tensor:
        """Return the gradient of the last step as one vector, in float64 on the CPU."""
        parts = [p.grad.flatten().double().cpu() for p in self.method.encoder.parameters() if p.grad is not None]
        return torch.cat(parts)


def make_tiny(config: TrainConfig) -> None:
    """Replace the network and the sizes by small ones."""
    config.model.backbone, config.model.options = "convnet", {"width": 4}
    config.model.bn_group_size = min(config.model.bn_group_size, 8)
    config.batch_size, config.accumulate, config.augment.size = 16, 1, 32


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int, calls: int = 1) -> float:
    """Return the median time of a call over some rounds, after a warm-up; each round waits only at its end."""
    times = []
    for number in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        if number:
            times.append(1e3 * (time.perf_counter() - began) / calls)
    return median(times)


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak of allocated GPU memory in a call; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


# ---- the parts


def parity(setting: Setting) -> Iterator[Check]:
    """Compare steps, crops and augmentation on the GPU with those on the CPU, in float32."""
    for name in DIGITS:
        fields = [f"experiment={name}", "precision=fp32"]
        worst = loss_difference(Recipe(fields, setting, torch.device("cpu")), Recipe(fields, setting))
        yield below(f"loss of 5 steps of {name}, relative difference from the CPU", worst, 1e-4)
        for plain in (fields, [*fields, "compile=true"]) if setting.device.type == "cuda" else ():
            worst = loss_difference(Recipe(plain, setting), Recipe([*plain, "cuda_graph=true"], setting))
            what = " ".join([name, *plain[2:]])
            yield below(f"loss of 5 steps of {what}, relative difference with a CUDA graph", worst, 1e-5)
    images = torch.randint(0, 256, (64, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ArraySource(images, [""] * len(images))
    for name in ("digits", "cifar10_notebook", "moco_v2_imagenet"):
        recipe_views, views = build_views(train_config([f"experiment={name}"]).augment), []
        for device in (torch.device("cpu"), setting.device):
            stream = batches(source, Plan(len(source), 16, 1, 0), recipe_views, device, 0)
            views.append([view.cpu() for batch in islice(stream, 2) for view in batch.views])
        worst = max((a - b).abs().max().item() for a, b in zip(*views, strict=True))
        yield below(f"views of 2 batches of {name}, largest difference from the CPU", worst, 1e-5)


def loss_difference(one: Recipe, other: Recipe) -> float:
    """Return the largest relative difference between the losses of five steps."""
    ours, theirs = ([float(recipe.step()["loss"]) for _ in range(5)] for recipe in (one, other))
    return max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))


def waits(setting: Setting) -> Iterator[Check]:
    """Take steps in a mode in which every wait of the host for the GPU is an error."""
    for name in DIGITS[:3]:
        recipe = Recipe([f"experiment={name}"], setting)
        for _ in range(3):
            recipe.step()
        problem = "none"
        with errors_on_waits(setting.device):
            try:
                for _ in range(20):
                    recipe.step()
            except RuntimeError as error:
                problem = str(error).splitlines()[0][:80]
        yield equal(f"waits in 20 steps of {name}", problem, "none")


@contextmanager
def errors_on_waits(device: torch.device) -> Iterator[None]:
    """Let torch raise an error where the host waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def precision(setting: Setting) -> Iterator[Check]:
    """Compare the gradients of bfloat16 with float32's, and those of the compiled step with the eager one's."""
    forms = {"bfloat16": ("precision=bf16", 0.97), "compiled float32": ("compile=true", 0.9999)}
    for name in ("cifar10_notebook", "moco_v3_cifar10"):
        exact = stepped([f"experiment={name}", "batch_size=64", "precision=fp32"], setting)
        for what, (field, least) in forms.items():
            if setting.tiny and what != "bfloat16":  # compilation takes a minute
                continue
            other = stepped([f"experiment={name}", "batch_size=64", "precision=fp32", field], setting)
            cosine = F.cosine_similarity(exact, other, dim=0).item()
            yield Check(f"{name}: cosine of the gradients, {what}", f"{cosine:.6f}", f"≥ {least}", cosine >= least)


def stepped(overrides: list[str], setting: Setting) -> Tensor:
    """Return the gradient of a recipe's first step."""
    recipe = Recipe(overrides, setting)
    recipe.step()
    return recipe.gradient()


def cifar(setting: Setting) -> Iterator[Check]:
    """Measure the step of the CIFAR-10 notebook: time, launches, idle share of the GPU."""
    for what in ("compile=false", "compile=true", "cuda_graph=true", "compile=true cuda_graph=true"):
        if setting.tiny and what != "compile=false":
            continue
        recipe = Recipe(["experiment=cifar10_notebook", *what.split()], setting)
        each = milliseconds(recipe.step, setting.device, rounds=5, calls=1 if setting.tiny else 20)
        steps = 50_000 // recipe.config.batch_size
        yield Check(f"{what}: ms a step, {recipe.precision}", f"{each:.1f}")
        yield Check(f"{what}: seconds an epoch, without evaluation", f"{each * steps / 1e3:.2f}")
        launches, busy = profiled(recipe.step, setting.device)
        if "graph" not in what:  # one launch
            yield below(f"{what}: launches a step", launches, 450 if what == "compile=false" else 300)
        if setting.device.type == "cuda":
            yield Check(f"{what}: share of the step in which the GPU computes", f"{100 * busy / each:.0f} %")


def profiled(step: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Return the number of kernels of a step, and the milliseconds that they take; 0 on a CPU."""
    step()
    synchronize(device)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
    with profile(activities=kinds) as found:
        step()
        synchronize(device)
    kernels = [each for each in found.events() if each.device_type.name == "CUDA"]
    return len(kernels), sum(each.device_time for each in kernels) / 1e3


def imagenet(setting: Setting) -> Iterator[Check]:
    """Measure the steps of the ImageNet recipes on one GPU: speed, use of the GPU, memory."""
    cases: dict[str, tuple[list[str], float]] = {
        "ResNet-50, MoCo v2, 256 images": (["experiment=moco_v2_imagenet"], 16.0),
        "ResNet-50, MoCo v2, 32 images (a rank of 8)": (["experiment=moco_v2_imagenet", "batch_size=32"], 4.0),
        "ResNet-50, MoCo v3, 256 images": (["experiment=moco_v3_resnet50_imagenet_100", "batch_size=256"], 23.0),
        "ViT-B, MoCo v3, 128 images": (["experiment=moco_v3_vit_base_imagenet", "batch_size=128"], 32.0),
    }
    for name, (overrides, gib) in cases.items():
        recipe = Recipe([*overrides, "accumulate=1"], setting)
        images, size = recipe.config.batch_size, recipe.config.augment.size
        each = milliseconds(recipe.step, setting.device, rounds=3, calls=1 if setting.tiny else 5)
        rate = 1e3 * images / each
        yield Check(f"{name}: images/s, {recipe.precision}", f"{rate:,.0f}")
        peak = matrix_rate(setting.device, PRECISIONS[recipe.precision])
        share = rate * step_flops(recipe.method, recipe.config.model.bn_group_size, size, views=2) / peak
        yield Check(f"{name}: MFU", f"{100 * share:.0f} %", f"of {peak / 1e12:.1f} TFLOP/s")
        memory = peak_gib(recipe.step, setting.device)
        if setting.device.type == "cuda":
            yield below(f"{name}: peak memory", memory, gib, " GiB")
        del recipe
        torch.cuda.empty_cache()


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


def commands(setting: Setting) -> Iterator[Check]:
    """Run the commands: train, interrupt, resume, two processes, kNN; and compare with an uninterrupted run."""
    epochs = 2 if setting.tiny else 6
    with tempfile.TemporaryDirectory() as folder:
        few = ["experiment=digits", f"epochs={epochs}", f"device={setting.device.type}", "precision=fp32"]

        def call(words: list[str]) -> int:
            return subprocess.run([sys.executable, "-m", *words], stdout=sys.stderr, check=False).returncode

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
        knn = ["moco.knn", f"run={folder}/whole", f"device={setting.device.type}", "k=[1]", "temperature=[0.1]"]
        yield equal("status of moco.knn", call(knn), 0)


def last_loss(run: Path) -> float:
    """Return the last recorded loss of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([each["train/loss"] for each in records if "train/loss" in each][-1])


class Part(NamedTuple):
    """A part, its time limit and what it shows."""

    run: Callable[[Setting], Iterator[Check]]
    seconds: float
    about: str


PARTS = {
    "parity": Part(parity, 60, "the GPU computes what the CPU computes"),
    "waits": Part(waits, 40, "the host never waits for the GPU in a step"),
    "precision": Part(precision, 120, "bfloat16 and compilation keep the gradient"),
    "cifar": Part(cifar, 120, "the step of the CIFAR-10 notebook"),
    "imagenet": Part(imagenet, 90, "the steps of the ImageNet recipes"),
    "losses": Part(losses, 30, "InfoNCE against a long queue"),
    "loading": Part(loading, 60, "images from files"),
    "commands": Part(commands, 80, "commands, resume, several processes"),
}


def main(name: str, file: Path, tiny: bool) -> None:
    """Run one part and write its checks to a file after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done: list[dict[str, Any]] = []
    for check in PARTS[name].run(Setting(device, tiny)):
        done.append(asdict(check))
        file.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["tiny"])
