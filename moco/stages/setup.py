"""From the configuration to the parts: the one place that takes a group of fields and calls a constructor."""

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco.config import AugmentConfig, ConfigError, DataConfig, RunWarning, TrainConfig, require
from moco.data.bad import without_bad
from moco.data.loader import Plan
from moco.data.sources import Progress, Sources, limited, load_source
from moco.data.view import View
from moco.distributed import is_main, on_main, world_size
from moco.engine.display import counting
from moco.losses import LearnedTemperature, Switches
from moco.methods import METHODS, AnyMethod
from moco.models.encoder import build_encoder, build_predictor


def pick_device(name: str) -> torch.device:
    """The device of this process; "auto" is a GPU where there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    require(name != "cuda" or torch.cuda.is_available(), "device=cuda, but torch sees no GPU here: set device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def open_sources(
    config: DataConfig, bank_size: int, keep_bad: bool = False, alive: Callable[[], None] = lambda: None
) -> Sources:
    """The data set, with at most `bank_size` reference images for the live kNN (0: all).

    Args:
        config: which data set.
        bank_size: see above.
        keep_bad: see `moco.data.sources.load_source`.
        alive: called now and then while pictures are decoded.

    Raises:
        FileNotFoundError, ValueError: see `moco.data.sources.load_source`.
    """

    def load(download: bool) -> Sources:
        with counting("decoding pictures", quiet=not is_main()) as shown:
            return load_source(
                config.name,
                config.root,
                download,
                config.labels,
                config.eval_root,
                config.resident,
                _signing(shown, alive),
                keep_bad,
                config.subset,
                config.split,
                config.eval_split,
                config.image_column,
                config.label_column,
                config.length,
                config.shuffle_buffer,
                config.allow_pipe,
            )

    if config.download:
        on_main(lambda: len(load(True).train))  # one rank downloads, then all of them read
    sources = load(False)
    return sources if sources.bank is None else replace(sources, bank=limited(sources.bank, bank_size))


def _signing(shown: Progress, alive: Callable[[], None]) -> Progress:
    """Shows how far work is, and gives a sign of life with it."""

    def progress(done: int, total: int) -> None:
        alive()
        shown(done, total)

    return progress


def without_bad_references(
    sources: Sources, config: DataConfig, alive: Callable[[], None]
) -> tuple[Sources, list[str]]:
    """The data set with a bank and a held-out split that can be read throughout, and a line on what was left out.

    What accuracy is measured with has no substitutes. Every picture of both is decoded once, which takes about as long
    as the first evaluation; each rank does a part. `alive` is called now and then.

    Raises:
        ImageError: if more of a split is bad than `data.max_bad`.
    """
    if sources.bank is None or sources.held_out is None:
        return sources, []
    said = []
    kept = []
    for name, source in (("reference", sources.bank), ("held-out", sources.held_out)):
        with counting(f"reading the {name} pictures", quiet=not is_main()) as shown:
            good, bad = without_bad(source, f"{name} pictures", config.max_bad, _signing(shown, alive))
        kept.append(good)
        if bad:
            first = min(bad)
            said.append(
                f"{len(bad)} of the {len(source):,} {name} pictures cannot be read and are left out of the live "
                f"accuracy, the first: {source.name(first)} ({bad[first]})"
            )
    return replace(sources, bank=kept[0], held_out=kept[1]), said


def build_views(config: AugmentConfig) -> list[View]:
    """The views' recipes: the group's fields, then those in which the second differs, and both again in turn.

    Raises:
        ConfigError: for a field of `second` that is none, or a value that cannot be.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in asdict(config).items()
        if name not in ("views", "second", "eval_resize")
    }
    unknown = set(config.second) - set(values)
    require(not unknown, f"augment.second names {', '.join(sorted(unknown))}; it can hold {', '.join(values)}")
    require("size" not in config.second, "augment.second cannot change size: both views have augment.size")
    second = {name: tuple(value) if isinstance(value, list) else value for name, value in config.second.items()}
    try:
        recipes = View(**values), View(**(values | second))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"augment.{error}") from error
    return [recipes[view % 2] for view in range(config.views)]


def build_method(config: TrainConfig, labels: NDArray[np.int64] | None = None) -> AnyMethod:
    """The method that `method.name` names, on a new encoder.

    Args:
        config: the run's.
        labels: of the training images, (samples,); None where there are none. Only `method.labels` makes use of them.

    Raises:
        ConfigError: for a name that is none, a predictor for a method that has none, or labels that are missing.
        ValueError: see `moco.models.encoder.build_encoder`.
    """
    model, method = config.model, config.method
    require(method.name in METHODS, f"method.name={method.name!r} must be one of {', '.join(METHODS)}")
    require(
        model.predictor_layers == 0 or method.name == "moco_v3",
        f"model.predictor_layers={model.predictor_layers}: {method.name} has no predictor; "
        "set model.predictor_layers=0 or method=moco_v3",
    )
    require(
        not method.labels or labels is not None,
        f"method.labels=true, but the training images of data.name={config.data.name} have no labels: set "
        "data.labels=folder for a folder with a subfolder a class, or method.labels=false",
    )
    bn: Any = model.bn
    encoder = build_encoder(
        model.backbone,
        model.options,
        model.head_layers,
        model.head_hidden,
        model.dim,
        bn,
        model.bn_group_size,
        model.head_norm,
    )
    parts: dict[str, Any] = {"encoder": encoder, "temperature": method.temperature}
    if method.name in ("moco", "simclr"):
        parts["labels"] = torch.from_numpy(labels) if method.labels and labels is not None else None
        if method.temperature_schedule == "learned":
            parts["learned_temperature"] = LearnedTemperature(
                method.temperature, method.temperature_low, method.temperature_high
            )
    if method.name == "simclr":
        parts |= {
            "candidates": method.candidates,
            "contrast_mode": method.contrast_mode,
            "base_temperature": method.base_temperature,
            "margin": method.margin,
            "margin_kind": method.margin_kind,
        }
    if method.name == "moco":
        parts |= {
            "dim": model.dim,
            "queue_size": method.queue_size,
            "queue_start": method.queue_start,
            "mask_own_keys": method.mask_own_keys,
            "symmetric": method.symmetric,
            "reduction": method.reduction,
            "switches": Switches(**{each.name: getattr(method, each.name) for each in fields(Switches)}),
            "seed": config.seed,
        }
    if method.name == "moco_v3":
        parts["predictor"] = build_predictor(
            model.dim,
            model.predictor_hidden,
            model.predictor_layers,
            model.predictor_last_norm,
            bn,
            model.bn_group_size,
        )
    return METHODS[method.name](**parts)


def data_parallel(method: nn.Module, device: torch.device) -> nn.Module:
    """DDP around the method, or the method itself in a world of one.

    Buffers stay out of DDP: it would send the queue, 33 MB, before every forward, and rank 0's copy would win.
    """
    if world_size() == 1:
        return method
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch >= 2.15, before
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None, **options)


def check_against_data(config: TrainConfig, plan: Plan) -> None:
    """What only shows once the data set's size is known.

    Raises:
        ConfigError: if an epoch would not fill one batch.
    """
    require(
        plan.steps_per_epoch > 0,
        f"batch_size={config.batch_size} exceeds the {plan.length} images of data.name={config.data.name}: lower it",
    )
    if config.optim.warmup_epochs >= config.epochs:
        warnings.warn(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is not over within epochs={config.epochs}: "
            "the learning rate never reaches its peak; set optim.warmup_epochs=0",
            RunWarning,
            stacklevel=2,
        )
    per_step = config.batch_size * (2 if config.method.symmetric else 1)
    queue = config.method.queue_size
    if queue >= plan.length * (2 if config.method.symmetric else 1):
        fit_in = max(per_step, plan.length // 2 // per_step * per_step)
        warnings.warn(
            f"method.queue_size={queue} holds every one of the {plan.length} images at least once, so each query meets "
            f"its own old keys (masked: {config.method.mask_own_keys}) and very stale ones; "
            f"set method.queue_size={fit_in} or less",
            RunWarning,
            stacklevel=2,
        )
    if config.method.name == "simclr":
        if config.model.bn == "grouped":
            warnings.warn(
                "model.bn=grouped normalises an image's views in groups of the same images, which gives each other "
                "away, and simclr shuffles nothing: set model.bn=sync",
                RunWarning,
                stacklevel=2,
            )
        return
    parts = config.batch_size // world_size() // config.accumulate
    group = config.model.bn_group_size if config.model.bn == "grouped" else parts
    if config.model.shuffle_keys and config.model.bn != "sync" and group >= config.batch_size:
        warnings.warn(
            f"model.shuffle_keys has nothing to shuffle between: BN sees all {config.batch_size} images as one group, "
            "and query and key of an image share it; set model.bn=grouped with a smaller model.bn_group_size",
            RunWarning,
            stacklevel=2,
        )
