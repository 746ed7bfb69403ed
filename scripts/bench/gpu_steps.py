"""The parts of `python -m scripts.bench gpu` that take steps of a recipe, see `gpu_parts`."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from moco.api import train_config
from moco.data.loader import Batch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.interop.encoder_file import save_encoder
from moco.methods.build import encoder_of
from moco.runtime.precision import PRECISIONS
from moco.training.throughput import matrix_rate, step_flops
from scripts.bench.gpu_recipe import (
    NEEDS_GPU,
    Check,
    Recipe,
    Setting,
    below,
    equal,
    errors_on_waits,
    largest_difference,
    losses_of,
    milliseconds,
    peak_gib,
    random_images,
    stepped,
    synchronize,
)

DIGITS = ("digits", "moco_v3_digits", "simclr_digits", "nnclr_digits", "ressl_digits")
COMPILED = DIGITS[:2]  # a compilation takes many seconds
MORE_METHODS = ("densecl_digits", "supcon_digits", "supmoco_digits", "distill_digits")
# Launches of a step of cifar10_notebook on the emulated GPU (docs/gpu.md), where a call of cuDNN or cuBLAS is one.
LAUNCHES = {
    "compile=false": 414,
    "compile=true": 386,
    "cuda_graph=true": 17,
    "compile=true cuda_graph=true": 18,
}
# The profiler counts kernels. About 90 calls of cuDNN and cuBLAS may each need two more, to change the layout of a
# tensor and to add partial sums.
LIBRARY_KERNELS = 180
# With a graph, all of these calls are in it, and it is one launch. Without it there would be hundreds of launches.
GRAPH_LAUNCHES = 10


def parity(setting: Setting) -> Iterator[Check]:
    """Compare steps, crops and augmentation on the GPU with those on the CPU, in float32."""
    for name in DIGITS:
        yield from same_losses(name, [f"experiment={name}"], setting)
    source = random_images(64, 48)
    for name in ("digits", "cifar10_notebook", "moco_v2_imagenet"):
        recipe_views, views = build_views(train_config([f"experiment={name}"]).augment), []
        for device in (torch.device("cpu"), setting.device):
            stream = batches(source, Plan(len(source), 16, 1, 0), recipe_views, device, 0)
            views.append([view.cpu() for batch in islice(stream, 2) for view in batch.views])
        worst = max((a - b).abs().max().item() for a, b in zip(*views, strict=True))
        yield below(f"views of 2 batches of {name}, largest difference from the CPU", worst, 1e-5)


def methods(setting: Setting) -> Iterator[Check]:
    """Compare steps on the GPU with those on the CPU, in float32, for the methods that `parity` does not run."""
    with tempfile.TemporaryDirectory() as folder:
        teacher, config = Path(folder, "teacher.safetensors"), train_config(["experiment=digits"])
        torch.manual_seed(1)
        save_encoder(teacher, encoder_of(config.model, config.data.channels).backbone, asdict(config), 0)
        for name in MORE_METHODS:
            more = [f"method.teacher={teacher}"] if name == "distill_digits" else []
            yield from same_losses(name, [f"experiment={name}", *more], setting)


def same_losses(name: str, fields: list[str], setting: Setting) -> Iterator[Check]:
    """Compare the losses of five steps on the GPU with the CPU's, and those with a CUDA graph with those without."""
    fields = [*fields, "precision=fp32"]
    found = losses_of(Recipe(fields, setting))
    worst = largest_difference(losses_of(Recipe(fields, setting, torch.device("cpu"))), found)
    yield below(f"loss of 5 steps of {name}, relative difference from the CPU", worst, 1e-4)
    if setting.device.type != "cuda":
        return
    for more in ([], ["compile=true"]) if name in COMPILED else ([],):
        found = losses_of(Recipe([*fields, *more], setting)) if more else found
        worst = largest_difference(found, losses_of(Recipe([*fields, *more, "cuda_graph=true"], setting)))
        what = " ".join([name, *more])
        yield below(f"loss of 5 steps of {what}, relative difference with a CUDA graph", worst, 1e-5)


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


def sanitizer(setting: Setting) -> Iterator[Check]:
    """Let torch's CUDA sanitizer look for races between the streams of the step and of the loader."""
    os.environ["MOCO_KERNELS"] = "0"  # the sanitizer sees torch's operations, but no kernels of Triton
    recipe = Recipe(["experiment=digits", "precision=fp32"], setting)
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        from torch.cuda._sanitizer import enable_cuda_sanitizer  # the import alone makes allocations slow

        enable_cuda_sanitizer()
    found = error_of_steps(recipe)
    yield equal("10 steps with the loader: error", found, "none")
    if not on_gpu:
        yield Check("races between streams", NEEDS_GPU)
        return
    with patch("torch.cuda.Stream.wait_event", lambda stream, event: None):
        found = error_of_steps(recipe)
    wanted = "CUDASanitizerErrors"
    yield Check("injected fault, a step that does not wait for its batch: error", found, wanted, wanted in found)


def error_of_steps(recipe: Recipe) -> str:
    """Take ten steps with the loader; return the error that ends them, or "none"."""
    try:
        for _ in islice(recipe.train(random_images(4 * recipe.config.batch_size, 16), epochs=3), 10):
            pass
        synchronize(recipe.device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.80}"
    return "none"


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


def cifar(setting: Setting) -> Iterator[Check]:
    """Measure the step of the CIFAR-10 notebook: time, launches, idle share of the GPU."""
    for what, emulated in LAUNCHES.items():
        if setting.tiny and what != "compile=false":
            continue
        recipe = Recipe(["experiment=cifar10_notebook", *what.split()], setting)
        each = milliseconds(recipe.step, setting.device, rounds=5, calls=1 if setting.tiny else 20)
        steps = 50_000 // recipe.config.batch_size
        yield Check(f"{what}: ms a step, {recipe.precision}", f"{each:.1f}")
        yield Check(f"{what}: seconds an epoch, without views and evaluation", f"{each * steps / 1e3:.2f}")
        kernels, launches, busy = profiled(recipe.step, setting.device)
        if "graph" in what:
            yield below(f"{what}: launches per step (emulated: {emulated})", launches, emulated + GRAPH_LAUNCHES)
        else:
            yield below(f"{what}: kernels per step (emulated: {emulated})", kernels, emulated + LIBRARY_KERNELS)
        if setting.device.type == "cuda":
            yield Check(f"{what}: share of the step in which the GPU computes", f"{100 * busy / each:.0f} %")


def profiled(step: Callable[[], object], device: torch.device) -> tuple[int, int, float]:
    """Return the kernels of a step, the host's launches, and the milliseconds that the GPU is busy; 0 on a CPU.

    A CUDA graph is one launch of many kernels. Copies and fills of memory are neither, as in docs/gpu.md.
    """
    step()
    synchronize(device)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
    with profile(activities=kinds) as found:
        step()
        synchronize(device)
    events = [each for each in found.events() if not each.is_user_annotation]  # such as the step of the optimizer
    on_gpu = [each for each in events if each.device_type.name == "CUDA"]
    kernels = [each for each in on_gpu if not each.name.startswith(("Memcpy", "Memset"))]
    launches = [each for each in events if re.match("cu(da)?(Launch|GraphLaunch)", each.name)]
    return len(kernels), len(launches), sum(each.device_time for each in on_gpu) / 1e3


def epochs(setting: Setting) -> Iterator[Check]:
    """Measure three epochs of the CIFAR-10 notebook on random images, from images in the GPU's memory to weights."""
    source = random_images(32 if setting.tiny else 50_000, 32)
    for what in ("compile=false", "cuda_graph=true", "compile=true cuda_graph=true"):
        if setting.tiny and what != "compile=false":
            continue
        recipe = Recipe(["experiment=cifar10_notebook", *what.split()], setting)
        steps, times = recipe.train(source, epochs=3), []
        for _ in range(3):
            began = perf_counter()
            *_, last = islice(steps, recipe.plan(len(source), 3).steps_per_epoch)
            finite = bool(last["loss"].isfinite())  # waits for the GPU
            times.append(perf_counter() - began)
        yield Check(f"{what}: seconds of epochs 2 and 3, without evaluation", f"{times[1]:.2f}, {times[2]:.2f}")
        yield equal(f"{what}: the last loss is finite", finite, True)


def overlap(setting: Setting) -> Iterator[Check]:
    """Measure the views of a batch alone, a step alone, and steps while the next batch is made on its own stream."""
    device, calls = setting.device, 1 if setting.tiny else 10
    for name, side in (("cifar10_notebook", 32), ("moco_v2_imagenet", 256)):
        recipe = Recipe([f"experiment={name}", "accumulate=1"], setting)
        stream = recipe.batches(random_images(2 * recipe.config.batch_size, side), epochs=100)
        views = milliseconds(partial(next, stream), device, 3, calls)
        step = milliseconds(recipe.step, device, 3, calls)
        both = milliseconds(partial(step_on_next, recipe, stream), device, 3, calls)
        stream.close()
        yield Check(f"{name}: ms of views alone, of a step alone, of both", f"{views:.1f}, {step:.1f}, {both:.1f}")
        hidden = (views + step - both) / min(views, step)
        yield Check(f"{name}: share of the shorter one that is hidden", f"{100 * hidden:.0f} %")


def step_on_next(recipe: Recipe, stream: Iterator[Batch]) -> None:
    """Take a step on the next batch of a stream."""
    recipe.step(next(stream))


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
