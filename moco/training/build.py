"""Build the parts of a run that need more than one call, from its configuration."""

import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moco.analysis.doctor import Facts, facts_of
from moco.config import RunWarning, TrainConfig, require
from moco.data.base import Sources
from moco.data.opening import open_sources
from moco.data.plan import Plan
from moco.data.sources import refuse_output_inside
from moco.distributed import on_rank_zero, world_size, wrap_ddp
from moco.methods.build import build_method
from moco.models.modes import checkpoint_activations, evaluating
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer, load_optimizer
from moco.runs.checkpoint import Checkpoint, list_checkpoints, load_newest, refuse_misfit
from moco.runs.directory import open_run
from moco.runs.metrics import METRICS
from moco.runtime.device import describe_devices, float64_device
from moco.runtime.memory import explain_out_of_memory
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.runtime.sharding import shard
from moco.runtime.watchdog import Watchdog
from moco.training.checks import check_gradients
from moco.training.consistency import Identity, open_consistently
from moco.training.graph import StepGraph
from moco.training.init_from import initial_file
from moco.training.monitor import Monitor
from moco.training.step import StepSettings
from moco.training.teacher import load_teacher

Labels = NDArray[np.int64]  # the class of each training image, (images,)


def open_data(config: TrainConfig, watchdog: Watchdog) -> tuple[Sources, Identity]:
    """Open the data set and check that all ranks have the same images."""
    data, bank_size = config.data, config.evaluate.bank_size
    refuse_output_inside(data, "run", config.run)
    keep_unreadable = data.on_bad_image == "replace"
    # Downloads run in other libraries, which report no progress, and videos are read from start to end.
    slow = data.download or data.name in ("huggingface", "video")
    with watchdog.paused() if slow else nullcontext():
        return open_consistently(
            lambda: open_sources(data, bank_size, keep_unreadable, watchdog.heartbeat, announce=False)
        )


def make_method(config: TrainConfig, labels: Labels | None, device: torch.device) -> Any:
    """Build the method with its initial weights."""
    queue = f", or method.queue_size below {config.method.queue_size}" * (config.method.queue_size > 0)
    fix = f"set model.backbone to a smaller one than {config.model.backbone}{queue}"
    with explain_out_of_memory(device, fix):
        teacher = load_teacher(config) if config.method.teacher else None
        torch.manual_seed(config.seed)  # for the initial weights and the random queue
        method = build_method(config, labels, teacher).to(device)
        if config.channels_last and not config.shard and device.type != "mps":  # FSDP and MPS need contiguous weights
            method.to(memory_format=torch.channels_last)
        if device.type == "mps":
            check_gradients(config, method.encoder, device)
    return method


def doctor_facts(config: TrainConfig, plan: Plan, in_memory: bool) -> Facts:
    """Return the settings that the training doctor needs. `in_memory`: whether the training images are in memory."""
    settings: dict[str, Any] = {"lr": config.optim.lr, "starts_trained": config.starts_trained}
    settings |= {"source": config.data.name, "in_memory": in_memory, "total_steps": plan.total_steps}
    settings["shuffled_keys"] = config.model.shuffle_keys and config.model.bn == "grouped"
    settings["batch_parts"] = world_size() * config.accumulate
    settings["bn_group"] = config.model.bn_group_size if config.model.bn == "grouped" else 1
    return facts_of(config.method, plan.length, config.batch_size, config.epochs, **settings)


def open_directory(config: TrainConfig) -> IO[str] | None:
    """Open the run directory. Return its open lock file on rank 0, and None on other ranks.

    The lock holds until the file is closed.
    """
    lock: list[IO[str]] = []

    def open_it() -> None:
        if config.init_from and not list_checkpoints(Path(config.run) / "checkpoints"):
            initial_file(config)  # a missing file is refused before the directory is made
        lock.append(open_run(Path(config.run), asdict(config), asdict(TrainConfig())))

    on_rank_zero(open_it)
    return lock[0] if lock else None


def load_state(config: TrainConfig) -> Checkpoint:
    """Return the newest checkpoint, which rank 0 reads; {} if there is none.

    A run that has metrics and no checkpoint starts again, with a warning.

    With `shard`, only rank 0 gets the weights and the optimizer's tensors: NCCL would send them all at once through
    the memory of each GPU, where they may not fit.
    """
    large: Checkpoint = {}

    def load() -> Checkpoint:
        run = Path(config.run)
        state = load_newest(run / "checkpoints") or {}
        if not state and (run / METRICS).is_file() and (run / METRICS).stat().st_size > 0:
            replaced = f"training starts again at step 0 and replaces {METRICS}"
            warnings.warn(f"run={run} contains no checkpoint: {replaced}", RunWarning, stacklevel=2)
        if config.shard and state:
            large.update(method=state["method"], optimizer=state["optimizer"])
            state |= {"method": {}, "optimizer": {**state["optimizer"], "state": {}}}
        return state

    return on_rank_zero(load) | large


def devices_used(state: Checkpoint, device: torch.device, unfinished: bool) -> str:
    """Return the devices of all attempts of a run, each once: those in its checkpoint, and `device` if `unfinished`."""
    used = state["computed_on"].split(", then ") if "computed_on" in state else []
    now = describe_devices(device)
    return ", then ".join(dict.fromkeys([*used, now] if unfinished or not used else used))


def load_weights(config: TrainConfig, method: nn.Module, state: Checkpoint) -> None:
    """Load the weights of a checkpoint; with `shard`, on rank 0 only, see `load_state`.

    With `shard`, the other ranks get the weights afterwards, by `broadcast_module`.
    """
    if config.shard:
        on_rank_zero(lambda: method.load_state_dict(state["method"]))
    else:
        method.load_state_dict(state["method"])


def choose_precision(
    config: TrainConfig, state: Checkpoint, encoder: nn.Module, device: torch.device
) -> tuple[str, str]:
    """Return the precision and the reason for it. With precision=auto a resumed run keeps its precision."""
    if state and config.precision == "auto":
        saved = state.get("precision", "fp32")
        fix = f"device=mps does not support precision={saved}, in which the run was trained: set another device"
        require(device.type != "mps" or saved == "fp32", fix)
        return saved, "as before"
    images = config.augment.size, device, config.data.channels
    return on_rank_zero(lambda: pick_precision(config.precision, encoder, *images))


def set_batch_norm_calls(method: Any, accumulate: int) -> None:
    """Tell the grouped BN layers the number and order of calls: f_k view by view, f_q micro-batch by micro-batch."""
    for name, network in method.named_children():
        set_calls_per_step(network, method.passes, accumulate, view_by_view=name == "momentum_encoder")


def distribute(config: TrainConfig, method: nn.Module, device: torch.device) -> nn.Module:
    """Compile the networks of the method, if configured; with several ranks, shard them or wrap the method in DDP.

    With `cuda_graph`, `StepGraph` averages the gradients instead of DDP.
    """
    if config.activation_checkpointing:
        checkpoint_activations(method.get_submodule("encoder.backbone"), config.model.backbone)
    if config.shard:
        shard(method, device)
        _refuse_mixed_weights(config, method, device)
        return method
    if config.compile:
        for name, network in method.named_children():
            if name not in ("queue", "dense_queue", "learned_temperature"):
                network.compile(options=_compiler_options())
    return method if config.cuda_graph else wrap_ddp(method, device)


def step_settings(
    config: TrainConfig, method: nn.Module, device: torch.device, precision: str, check_finite: bool
) -> StepSettings:
    """Return the settings of every step; the caller sets `lr` and `momentum`, which have schedules.

    Raises:
        ConfigError: for `cuda_graph=true` without a GPU.
    """
    on_gpu = device.type == "cuda"
    require(on_gpu or not config.cuda_graph, f"cuda_graph=true needs a GPU, not {device.type}: set cuda_graph=false")
    graph = StepGraph(method.parameters()) if config.cuda_graph else None
    settings = config.accumulate, PRECISIONS[precision], config.optim.clip_grad, check_finite, graph
    return StepSettings(0.0, 0.0, *settings)


@torch.no_grad()
def _refuse_mixed_weights(config: TrainConfig, method: nn.Module, device: torch.device) -> None:
    """Raise ConfigError if FSDP cannot gather the weights: some encoders call a layer's `forward`, not the layer."""
    encoder, size = method.get_submodule("encoder"), config.augment.size
    try:
        with evaluating(encoder):
            encoder(torch.zeros(1, config.data.channels, size, size, device=device))
    except RuntimeError as error:
        name = config.model.backbone
        require("DTensor" not in str(error), f"model.backbone={name} does not work with shard=true: set shard=false")
        raise


def make_optimizer(config: TrainConfig, method: nn.Module, state: Checkpoint) -> torch.optim.Optimizer:
    """Build the optimizer, with the state of a checkpoint, if any."""
    with refuse_misfit(Path(config.run) / "checkpoints"):
        optimizer = build_optimizer(method, config.optim, saved=state.get("optimizer"))
        if state:
            load_optimizer(optimizer, state["optimizer"], method)
    return optimizer


def _compiler_options() -> dict[str, Any]:
    """Return options that turn off a fusion of torch 2.14's compiler: it fails in the backward pass of grouped BN."""
    from torch._inductor import config  # takes a second

    name = "mix_order_reduction"
    return {f"triton.{name}": False} if hasattr(config.triton, name) else {}


def make_monitor(
    config: TrainConfig, method: Any, labels: Labels | None, device: torch.device, precision: str
) -> Monitor:
    """Build the monitor of the representation."""
    micro_batch = config.batch_size // world_size() // config.accumulate
    return Monitor(
        method,
        None if labels is None else torch.from_numpy(labels).to(float64_device(device)),
        keys_per_step=config.batch_size * config.method.keys_per_image,
        shuffled=config.model.shuffle_keys and config.model.bn == "grouped",
        precision=PRECISIONS[precision],
        every=config.log_every * config.analyse_every if micro_batch > 1 else 0,  # a single image has no spread
    )
