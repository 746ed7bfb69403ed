"""The configuration of a pretraining run: types, bounds and meanings of all fields. Values are in `configs/`."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import (
    ConfigError,
    StoppableConfig,
    bounded,
    check_bounds,
    refuse_on_mps,
    require,
    require_divisible,
)
from moco.config.data import DataConfig, check_data_fields
from moco.config.evaluate import EvaluateConfig
from moco.config.method import MethodConfig


@dataclass
class AugmentConfig:
    """The augmentation of both views. The fields are those of `moco.data.view.View` and a few more."""

    views: int = bounded(2, ge=1)
    """Views per image. With more than two, the augmentations of the first and the second view alternate."""
    size: int = bounded(224, ge=1, le=65_536)
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    small_views: int = bounded(0, ge=0, le=64)
    """For MoCo and MoCo v3: number of further views per image, of small_size pixels, which are queries only
    (multi-crop, Caron et al., 2020). All pairs of a query view and a key view have the same weight in the loss."""
    small_size: int = bounded(96, ge=1, le=65_536)
    """Side of the small views in pixels."""
    small_scale: list[float] = bounded([0.05, 0.14], min_length=2, max_length=2)
    """Lowest and highest area of the small views, as a fraction of the image's area. With small views, a crop_scale
    that begins where small_scale ends, [0.14,1.0], is usual."""
    antialias: bool = True
    """Resize the crops with antialiasing; false: with plain interpolation. Evaluation always uses antialiasing."""
    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    per_channel: bool = False
    gray_p: float = 0.0
    gray_first: bool = False
    blur_p: float = 0.0
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5
    flip_p: float = 0.0
    vertical_flip_p: float = 0.0
    quarter_turn_p: float = 0.0
    affine_p: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])
    shear: float = 0.0
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: dict[str, Any] = field(default_factory=dict)
    channel_dropout_p: float = 0.0
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    eval_resize: int = bounded(0, ge=0, le=65_536)
    """Evaluation resizes the shorter side of an image to N pixels before the central crop; 0: N = augment.size."""
    second: dict[str, Any] = field(default_factory=dict)
    """Fields that differ for the second view, e.g. {blur_p: 0.1, solarize_p: 0.2}."""


@dataclass
class ModelConfig:
    """The encoder: backbone, projection head, predictor and batch normalization (BN)."""

    backbone: str = "resnet50"
    """The network: a torchvision ResNet, a ViT of moco.models.vit, convnet, or timm/NAME for a model of timm."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone's constructor, e.g. {stem: cifar}."""
    head_layers: int = bounded(2, ge=1)
    """Layers of the projection head. 1: the linear head of MoCo v1; 2: the MLP of MoCo v2."""
    head_hidden: int = bounded(0, ge=0)
    """Width of the head's hidden layers; 0: the width of the backbone's features."""
    head_norm: bool = False
    """Apply BN after each layer of the head and omit the biases, as in MoCo v3."""
    dim: int = bounded(128, ge=1)
    """Dimension of the embedding (C)."""
    predictor_layers: int = bounded(0, ge=0)
    """Layers of the predictor, the second head of MoCo v3, which only the query passes through; 0: no predictor."""
    predictor_hidden: int = bounded(0, ge=0)
    """Width of the predictor's hidden layers; 0: the dimension of the embedding."""
    predictor_last_norm: bool = True
    """Apply BN after the predictor's last layer too: true for MoCo v3 with a ViT, false with a ResNet."""
    bn: str = bounded("grouped", choices=("grouped", "sync", "batch"))
    """The images over which BN normalizes: grouped (bn_group_size images), sync (the global batch), or batch (the
    images of one forward pass of one process)."""
    bn_group_size: int = bounded(32, ge=1)
    """Images per BN group with bn=grouped. 32 corresponds to the published 256 images on 8 GPUs."""
    shuffle_keys: bool = True
    """Shuffle the images of the keys over all processes, so that BN does not reveal which key matches a query."""


@dataclass
class OptimConfig:
    """The optimizer and its learning rate (lr) schedule."""

    name: str = bounded("sgd", choices=("sgd", "lars", "lars_timm", "adamw"))
    """The optimizer. lars: the LARS of MoCo v3's code; lars_timm: the LARS of timm. See `trust` for the difference."""
    lr: float = bounded(0.03, ge=0)
    """Peak learning rate, before it is scaled by the batch size (see base_batch)."""
    base_batch: int | None = bounded(256, ge=1)
    """Scale lr by batch_size / base_batch; null: do not scale it."""
    momentum: float = bounded(0.9, ge=0, lt=1)
    """Momentum of sgd, lars and lars_timm."""
    betas: list[float] = bounded([0.9, 0.999], ge=0, lt=1, min_length=2, max_length=2)
    """The two decay rates of adamw."""
    weight_decay: float = bounded(1e-4, ge=0)
    """Weight decay of all weights except those in `exclude`."""
    exclude: list[str] = bounded([], choices=("bias", "norm"))
    """Weights without weight decay: bias (all biases), norm (weights of normalization layers). With lars_timm, the
    excluded weights have no layer-wise rate either. With lars, one-dimensional weights never have weight decay or a
    layer-wise rate."""
    trust: float = bounded(0.001, gt=0)
    """Trust coefficient of lars and lars_timm: the layer-wise rate of a weight tensor w is lr x trust x |w| / d. With
    the gradient g of w, d is |g + weight_decay w| with lars, and |g| + weight_decay |w| with lars_timm."""
    trust_clip: bool = False
    """For lars and lars_timm: the layer-wise rate is instead min(lr, trust x |w| / d), with the d of `trust`."""
    schedule: str = bounded("cosine", choices=("cosine", "step", "constant"))
    """Decrease of the lr after the warm-up: cosine (to lr_end), step (at the milestones), or constant (none)."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which schedule=step multiplies the lr by gamma."""
    gamma: float = bounded(0.1, gt=0, le=1)
    """Factor of the lr at each milestone of schedule=step."""
    warmup_epochs: float = bounded(0.0, ge=0)
    """Epochs at the start in which the lr rises linearly to its peak."""
    warmup_from_zero: bool = False
    """Start the warm-up at lr 0, as in MoCo v3's code. The lr of step s = 0, 1, ... of a warm-up of n steps is then
    peak x s / n; false: peak x (s + 1) / n."""
    lr_end: float = bounded(0.0, ge=0, le=1)
    """Final lr of schedule=cosine, as a fraction of the peak."""
    per_epoch: bool = False
    """Change the lr only between epochs, as the official MoCo code does; false: change it every step."""
    clip_grad: float = bounded(0.0, ge=0)
    """Largest norm of the gradient, to which larger gradients are scaled down; 0: no clipping."""
    skip_nonfinite: int = bounded(0, ge=0)
    """Number of steps with a non-finite loss or gradient that a run skips before it ends; 0: end at the first one."""


@dataclass
class CheckpointConfig:
    """When checkpoints are saved and which ones are kept."""

    every_minutes: float = bounded(5.0, ge=0)
    """Save when N minutes have passed since the last checkpoint; 0: do not save by time."""
    every_steps: int = bounded(0, ge=0)
    """Save every N steps; 0: do not save by steps."""
    every_epochs: int = bounded(1, ge=0)
    """Save at the end of every N-th epoch; 0: not at the ends of epochs. The end of the run is always saved."""
    keep_epochs: int = bounded(0, ge=0)
    """Keep a checkpoint permanently every N epochs; 0: keep only the newest checkpoints, see keep_last."""
    keep_last: int = bounded(2, ge=1)
    """Number of newest checkpoints to keep, not counting the permanently kept ones. With 2 or more, a run can resume
    even if the newest checkpoint is unreadable."""
    keep_best: bool = False
    """Also keep the checkpoint with the best kNN accuracy so far, as checkpoints/best.pt, saved at each new best."""


@dataclass
class TrainConfig(StoppableConfig):
    """Pretrain an encoder."""

    run: str = bounded("runs/digits", min_length=1, path=True, example="run=runs/first")
    """Directory of the run. If it holds an unfinished run, that run resumes."""
    init_from: str = bounded("", path=True)
    """File with the encoder's initial weights: a checkpoint of moco.train, encoder.safetensors, or a file of another
    project, such as official MoCo; hf://USER/REPOSITORY names a file on the Hugging Face Hub. Head, predictor and queue
    are loaded too if they fit. A resumed run does not read the file again."""
    recipe: str = ""
    """Name of the recipe, set by experiment=NAME and recorded in the run. If a command resumes the run with another
    configuration, the error names this recipe."""
    seed: int = bounded(0, ge=0, lt=2**64)
    """Seed of the initial weights, the order of the images and all augmentations."""
    epochs: int = bounded(200, ge=1)
    """Passes over the data set. All schedules span this number of epochs."""
    batch_size: int = bounded(256, ge=1)
    """Images per optimizer step, over all processes."""
    accumulate: int = bounded(1, ge=1)
    """Number of micro-batches into which each process divides its part of the batch, to need less memory."""
    precision: str = bounded("fp32", choices=("auto", "fp32", "bf16", "fp16"))
    """Number format of the computation. auto: bf16 on a GPU that has units for it, or on a CPU if a short measurement
    shows that it is at least 1.2 times as fast; else fp32. A resumed run keeps its precision."""
    channels_last: bool = True
    """Store weights and feature maps in channels-last memory format. Convolutions are then faster; results are equal up
    to rounding. It has no effect with device=mps, where some versions of torch compute wrong gradients with this
    format, see docs/gpu.md."""
    compile: bool = False
    """Compile the encoders with torch.compile. This takes minutes at the start and makes each step faster."""
    cuda_graph: bool = False
    """Record the forward and backward passes of a step as a CUDA graph, and replay it in later steps: the host launches
    one graph instead of hundreds of kernels. compile=true can be set too. The steps that analyse_every selects use no
    graph and need memory of their own. With several processes, keys are encoded without the graph, and only MoCo v1,
    v2, v2+ and SupMoCo can be trained, without model.bn=sync."""
    shard: bool = False
    """Divide the weights (also those of the momentum encoder), gradients and optimizer state among the processes (FSDP2
    of torch), for networks that do not fit on a GPU otherwise; false: each process holds all of them (DDP). The results
    are the same; channels_last has no effect. A run may resume with another value."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks for the backward pass, which computes all other activations again.
    This is slower, needs less memory and gives the same results. For ViTs, and other timm models without BN."""
    profile: bool = False
    """Profile a few steps with torch's profiler, and write a trace and a table into profile/ in the run's directory."""
    logger: list[str] = bounded(["tensorboard"], unique=True)
    """Where metrics are written in addition to metrics.jsonl: tensorboard, wandb (extra wandb), mlflow (extra mlflow),
    and the loggers of plug-ins."""
    analyse_every: int = bounded(5, ge=0)
    """Add alignment, uniformity, effective rank and other measures to every N-th record of metrics.jsonl; 0: never."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def starts_trained(self) -> bool:
        """Whether the encoder starts from trained weights: those of a file, or the published ones of timm."""
        return bool(self.init_from or self.model.options.get("pretrained"))


def check(config: TrainConfig, processes: int = 1) -> None:
    """Raise ConfigError for a configuration that is invalid with this number of processes."""
    check_bounds(config)
    check_data_fields(config.data)
    config.method.check(config)
    evaluate, optim = config.evaluate, config.optim
    off = f"evaluate.every_epochs={evaluate.every_epochs}"
    error = f"checkpoint.keep_best=true needs the kNN accuracy, but {off} turns it off: set evaluate.every_epochs=1"
    require(evaluate.every_epochs > 0 or not config.checkpoint.keep_best, error)
    require(
        (optim.schedule == "step") == bool(optim.milestones),
        f"optim.milestones={optim.milestones} does not fit optim.schedule={optim.schedule}: "
        "set milestones if and only if schedule=step",
    )
    require(
        not (optim.warmup_from_zero and optim.per_epoch and optim.warmup_epochs > 0),
        "optim.warmup_from_zero=true with optim.per_epoch=true would hold the learning rate at 0 for an epoch: set one "
        "of them to false",
    )
    require(
        optim.name != "lars_timm" or optim.weight_decay > 0,
        f"optim.weight_decay={optim.weight_decay} with optim.name=lars_timm would turn off layer-wise rates: set "
        "optim.weight_decay above 0, or optim.name=lars",
    )
    size, resize = config.augment.size, config.augment.eval_resize
    fits = resize == 0 or resize >= size
    require(fits, f"augment.eval_resize={resize} is below augment.size={size}: raise it, or set it to 0")
    _check_small_views(config.augment)
    _check_mps(config)
    _check_shard(config)
    _check_batch(config, processes)
    if config.cuda_graph:
        _check_cuda_graph(config, processes)


def _check_cuda_graph(config: TrainConfig, processes: int) -> None:
    """Refuse what a CUDA graph cannot repeat, such as numbers that change between steps, or collectives."""
    off = "set cuda_graph=false"
    require(config.device != "cpu", f"cuda_graph=true needs a GPU, but device={config.device}: {off}")
    exchanges = [] if config.method.is_local else [f"method={config.method.name}"]
    exchanges += ["model.bn=sync"] * (config.model.bn == "sync")
    why = f"{' and '.join(exchanges)} may exchange results between the {processes} processes"
    require(processes == 1 or not exchanges, f"cuda_graph=true repeats the work of one process, but {why}: {off}")
    require(not config.evaluate.online_probe, f"cuda_graph=true hides the features from evaluate.online_probe: {off}")
    changing = ", ".join(config.method.changing())
    require(not changing, f"cuda_graph=true repeats one step, but {changing} changes from step to step: {off}")


def _check_mps(config: TrainConfig) -> None:
    """Refuse what torch cannot do on the GPU of a Mac, and what was not tested there."""
    names = ("compile", "cuda_graph", "shard", "activation_checkpointing")
    precision = [f"precision={config.precision}"] * (config.precision not in ("auto", "fp32"))
    precision += [f"evaluate.precision={config.evaluate.precision}"] * (config.evaluate.precision != "fp32")
    refuse_on_mps(config, *(f"{name}=true" for name in names if getattr(config, name)), *precision)


def _check_small_views(augment: AugmentConfig) -> None:
    size, small = augment.size, augment.small_size
    fix = "lower it, together with augment.small_scale if the images are small"
    fits = augment.small_views == 0 or small <= size
    require(fits, f"augment.small_size={small} exceeds augment.size={size}: {fix}")


def _check_shard(config: TrainConfig) -> None:
    """Check that the other fields suit `shard` and `activation_checkpointing`."""
    chosen = [f"{name}=true" for name in ("shard", "activation_checkpointing") if getattr(config, name)]
    for name in ("compile", "cuda_graph"):
        error = f"{name}=true with {' and '.join(chosen)} is not supported: set {name}=false"
        require(not (getattr(config, name) and chosen), error)
    learned = config.shard and config.method.temperature_schedule == "learned"
    fix = "set method.temperature_schedule=constant or shard=false"
    require(not learned, f"method.temperature_schedule=learned trains one number that shard=true cannot divide: {fix}")


def bn_sync_fields(config: TrainConfig, processes: int) -> str:
    """Return the overrides that set model.bn=sync and turn off the settings that cannot be combined with it."""
    graph = config.cuda_graph and processes > 1
    return "model.bn=sync" + " accumulate=1" * (config.accumulate > 1) + " cuda_graph=false" * graph


def _check_batch(config: TrainConfig, processes: int) -> None:
    """Check that the batch divides over processes, micro-batches and BN groups. Each error names values that pass."""
    model, parts = config.model, processes * config.accumulate
    micro_batch, rest = divmod(config.batch_size, parts)
    smaller = 0 if rest else _largest_divisor(micro_batch, model.bn_group_size)
    if model.bn == "sync" and config.accumulate > 1:
        nearest = _nearest_batch(config, processes)
        fixes = ["accumulate=1" + f" batch_size={nearest}" * (nearest != config.batch_size)]
        fixes += [f"model.bn=grouped model.bn_group_size={smaller}"] if smaller else []
        both = f"accumulate={config.accumulate} with model.bn=sync"
        raise ConfigError(f"{both} would normalize over one micro-batch, not the batch: set {' or '.join(fixes)}")
    if model.bn == "grouped" and model.bn_group_size == 1:
        largest = 0 if rest else _largest_divisor(micro_batch, max(micro_batch // 2, 2))
        fix = f"{largest}" if largest else f"2 batch_size={_nearest_batch(config, parts)}"
        raise ConfigError(f"model.bn_group_size=1: BN over one image has no variance; set model.bn_group_size={fix}")
    counted = f"{processes} process{'es' * (processes > 1)}"
    divisor = f"{parts} ({counted} x accumulate={config.accumulate})"
    require_divisible(config.batch_size, parts, divisor, _batch_fixes(config, parts))
    if model.bn == "grouped":
        _check_groups(config, processes, smaller)
    else:
        given = f"batch_size={config.batch_size} with model.bn={model.bn}, {counted} and accumulate={config.accumulate}"
        error = f"{given}: BN over one image has no variance; set batch_size={_nearest_batch(config, parts)}"
        require((config.batch_size if model.bn == "sync" else micro_batch) > 1, error)


def _check_groups(config: TrainConfig, processes: int, smaller: int) -> None:
    """Check that the size of BN groups divides a micro-batch. `smaller` is a smaller size that divides it, or 0."""
    parts, group = processes * config.accumulate, config.model.bn_group_size
    micro_batch = config.batch_size // parts
    fixes = [f"batch_size={_nearest_batch(config, parts)}"]
    fixes += [f"model.bn_group_size={smaller}"] if smaller else []
    lower = [each for each in range(1, config.accumulate) if config.batch_size % (processes * each * group) == 0]
    fixes += [f"accumulate={each}" for each in lower[-1:]]
    fixes += [bn_sync_fields(config, processes)] if config.batch_size > 1 else []
    require(
        micro_batch % group == 0,
        f"model.bn_group_size={group} must divide the number of images, {micro_batch}, of a process's forward pass "
        f"(batch_size={config.batch_size} / {processes} process{'es' * (processes > 1)} / "
        f"accumulate={config.accumulate}): set {', '.join(fixes[:-1])}{' or ' * (len(fixes) > 1)}{fixes[-1]}",
    )


def _largest_divisor(images: int, most: int) -> int:
    """Return the largest divisor of a number of images within 2 ... `most`; 0 if there is none."""
    return max((each for each in range(2, min(images, most) + 1) if images % each == 0), default=0)


def _nearest_batch(config: TrainConfig, parts: int) -> int:
    """Return the nearest batch size that can be divided into `parts` and BN groups, with at least two images for BN."""
    model = config.model
    unit = parts * (max(2, model.bn_group_size) if model.bn == "grouped" else 1)
    lowest = 2 * parts if model.bn == "batch" else 2
    return max(-(-lowest // unit), round(config.batch_size / unit)) * unit


def _batch_fixes(config: TrainConfig, parts: int) -> str:
    """Return the overrides with which the batch can be divided into `parts`, for these BN groups or smaller ones."""
    nearest, multiple = _nearest_batch(config, parts), max(2, round(config.batch_size / parts)) * parts
    group = _largest_divisor(multiple // parts, config.model.bn_group_size)
    other = config.model.bn == "grouped" and multiple != nearest and group
    return f"batch_size={nearest}" + (f", or batch_size={multiple} model.bn_group_size={group}" if other else "")
