"""The schema of a pretraining configuration: types, what each field means, and the checks. Values are in `configs/`."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import at_least, one_of, require, require_finite
from moco.config.data import DataConfig, check_data_fields
from moco.config.method import MethodConfig, check_method


@dataclass
class AugmentConfig:
    """Both views' augmentation; each field is one of `moco.data.view.View` and explained there."""

    views: int = 2
    """of each image; more than two repeat the two recipes in turn"""
    size: int = 224
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    antialias: bool = True
    """false: crops are resized by plain interpolation; evaluation stays antialiased"""
    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False
    blur_p: float = 0.0
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5
    flip_p: float = 0.0
    affine_p: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])
    shear: float = 0.0
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    eval_resize: int = 0
    """shorter side before the central crop in evaluation; 0: the pictures have the size already"""
    second: dict[str, Any] = field(default_factory=dict)
    """fields in which the second view differs, e.g. {blur_p: 0.1, solarize_p: 0.2}"""


@dataclass
class ModelConfig:
    """The encoder."""

    backbone: str = "resnet50"
    """a torchvision ResNet, a ViT of moco.models.vit, convnet, or timm/NAME"""
    options: dict[str, Any] = field(default_factory=dict)
    """the backbone's own arguments, e.g. {stem: cifar}"""
    head_layers: int = 2
    """1: MoCo v1's linear head; 2: MoCo v2's MLP"""
    head_hidden: int = 0
    """width of the MLP; 0: as wide as the features"""
    head_norm: bool = False
    """BN behind each layer of the head, which then have no biases: MoCo v3"""
    dim: int = 128
    """C, the embedding"""
    predictor_layers: int = 0
    """MoCo v3's second head, behind the first and on the query's side alone; 0: none"""
    predictor_hidden: int = 0
    """width of the predictor's MLP; 0: as wide as the embedding"""
    predictor_last_norm: bool = True
    """BN behind the predictor's last layer too: v3 with a ViT; without one: v3 with a ResNet"""
    bn: str = "grouped"
    """grouped (over bn_group_size images), sync (over the global batch) or batch (over one process's forward pass)"""
    bn_group_size: int = 32
    """256 images on 8 GPUs, as published"""
    shuffle_keys: bool = True
    """shuffle the key batch over the global batch before its encoder"""


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "sgd"
    """sgd, lars or adamw"""
    lr: float = 0.03
    """the peak, before it is scaled"""
    base_batch: int | None = 256
    """lr is scaled by batch_size / base_batch; null: lr as it stands"""
    momentum: float = 0.9
    """of sgd and lars"""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """of adamw"""
    weight_decay: float = 1e-4
    """of weights that `exclude` does not leave out"""
    exclude: list[str] = field(default_factory=list)
    """what weight decay (and LARS's adaptation) leaves out: bias, norm"""
    trust: float = 0.001
    """of lars: a layer's rate is lr x trust x |w| / |gradient|"""
    trust_clip: bool = False
    """of lars: in place of that the smaller of lr and trust x |w| / |gradient|"""
    schedule: str = "cosine"
    """cosine, step or constant"""
    milestones: list[float] = field(default_factory=list)
    """epochs at which `step` multiplies the lr by gamma"""
    gamma: float = 0.1
    """see milestones"""
    warmup_epochs: float = 0.0
    """linear from zero to the peak lr in the first epochs"""
    lr_end: float = 0.0
    """where cosine ends, as a fraction of the peak"""
    per_epoch: bool = False
    """hold the lr within an epoch, as the official MoCo code does; false: change it every step"""
    clip_grad: float = 0.0
    """largest gradient norm; 0: no clipping"""
    skip_nonfinite: int = 0
    """how many steps with a non-finite loss or gradient a run leaves out before it ends; 0: it ends at the first"""


@dataclass
class EvaluateConfig:
    """The live kNN accuracy while training."""

    every_epochs: int = 1
    """live kNN every so many epochs, and before the first and after the last; 0: never"""
    k: int = 200
    """neighbors that vote"""
    temperature: float = 0.1
    """a vote weighs exp(similarity / temperature)"""
    features: str = "backbone"
    """backbone, or projection (the embedding that the loss sees)"""
    labels_per_class: int = 0
    """a reference set of so many labels a class, averaged over draws; 0: all labels"""
    draws: int = 100
    """how often labels_per_class labels are drawn; the figure is their mean and spread"""
    bank_size: int = 0
    """at most so many reference images, drawn once; 0: all"""
    raw_pixels: bool = False
    """also report kNN on the raw pixels"""
    batch_size: int = 512
    """images at once through the encoder; changes memory, not results"""


@dataclass
class CheckpointConfig:
    """How often to save, and what to keep."""

    every_minutes: float = 5.0
    """save `last` so often, besides the end of each epoch"""
    every_steps: int = 0
    """and every so many steps; 0: never"""
    every_epochs: int = 1
    """save `last` at the end of so many epochs"""
    keep_epochs: int = 0
    """keep a checkpoint for good every so many epochs; 0: the last ones only"""
    keep_last: int = 2
    """how many of the newest to keep, so that an unreadable one has one before it"""
    keep_best: bool = False
    """also keep the one with the best live kNN accuracy so far, as checkpoints/best.pt; saves whenever there is one"""


@dataclass
class TrainConfig:
    """All of a pretraining run."""

    run: str = "runs/digits"
    """the run's directory; started again there, it resumes"""
    init_from: str = ""
    """start from this file's encoder (any that read_encoder reads, e.g. an official checkpoint); a resumed run does not
    read it again"""
    seed: int = 0
    """of the first weights, the order of the samples and every view"""
    epochs: int = 200
    """passes over the data set; the schedules end with the last"""
    batch_size: int = 256
    """images in one optimizer step, over all processes"""
    accumulate: int = 1
    """micro-batches in which a process takes its share of the batch"""
    device: str = "auto"
    """auto, cpu, cuda"""
    precision: str = "fp32"
    """fp32, bf16, fp16, or auto: bf16 where the device is faster with it (on a CPU that is measured), else fp32; a
    resumed run keeps what it had"""
    channels_last: bool = True
    """how images lie in memory; convolutions are faster so, the mathematics is the same"""
    compile: bool = False
    """torch.compile for the encoders: minutes at the start, faster steps"""
    profile: bool = False
    """write a torch profiler trace and table of a few steps into the run's directory, profile/"""
    threads: int = 0
    """CPU threads of a process; 0: torch's choice"""
    log_every: int = 10
    """steps between two records in metrics.jsonl and TensorBoard"""
    analyse_every: int = 5
    """records between two that also hold the measures of moco.analysis (alignment, uniformity, effective rank, ...);
    0: never"""
    stop_after: float = 0.0
    """minutes after which the process saves and ends with status 75, to be started again: set it below the time limit
    of a job by what a step, an evaluation and a checkpoint take; 0: never"""
    hang_after: float = 15.0
    """minutes in which no rank finished anything, a step or a batch of an evaluation, after which the process names the
    rank that hangs and ends with status 69; more than the longest step takes, with what is saved behind it; 0: wait
    for ever"""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def check(config: TrainConfig, processes: int = 1) -> None:
    """Refuses a configuration that cannot run, before any work starts.

    Args:
        config: the composed configuration.
        processes: W, over which the batch is divided.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    model, optim, evaluate = config.model, config.optim, config.evaluate
    one_of("precision", config.precision, ("auto", "fp32", "bf16", "fp16"))
    one_of("device", config.device, ("auto", "cpu", "cuda"))
    one_of("model.bn", model.bn, ("grouped", "sync", "batch"))
    one_of("optim.name", optim.name, ("sgd", "lars", "adamw"))
    one_of("optim.schedule", optim.schedule, ("cosine", "step", "constant"))
    one_of("evaluate.features", evaluate.features, ("backbone", "projection"))
    require_finite(config)
    at_least(
        1,
        {
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "accumulate": config.accumulate,
            "log_every": config.log_every,
            "model.head_layers": model.head_layers,
            "model.dim": model.dim,
            "augment.views": config.augment.views,
            "model.bn_group_size": model.bn_group_size,
            "evaluate.k": evaluate.k,
            "evaluate.batch_size": evaluate.batch_size,
            "evaluate.draws": evaluate.draws,
            "checkpoint.keep_last": config.checkpoint.keep_last,
        },
    )
    at_least(
        0,
        {
            "threads": config.threads,
            "analyse_every": config.analyse_every,
            "stop_after": config.stop_after,
            "hang_after": config.hang_after,
            "optim.lr": optim.lr,
            "optim.weight_decay": optim.weight_decay,
            "optim.warmup_epochs": optim.warmup_epochs,
            "optim.clip_grad": optim.clip_grad,
            "optim.skip_nonfinite": optim.skip_nonfinite,
            "evaluate.every_epochs": evaluate.every_epochs,
            "evaluate.labels_per_class": evaluate.labels_per_class,
            "evaluate.bank_size": evaluate.bank_size,
            "checkpoint.every_steps": config.checkpoint.every_steps,
            "checkpoint.every_minutes": config.checkpoint.every_minutes,
            "checkpoint.every_epochs": config.checkpoint.every_epochs,
            "checkpoint.keep_epochs": config.checkpoint.keep_epochs,
            "model.head_hidden": model.head_hidden,
            "model.predictor_layers": model.predictor_layers,
            "model.predictor_hidden": model.predictor_hidden,
        },
    )
    check_data_fields(config.data)
    check_method(config.method, config.batch_size, config.accumulate, config.augment.views)
    require(
        evaluate.every_epochs > 0 or not config.checkpoint.keep_best,
        f"checkpoint.keep_best=true needs the live kNN accuracy, which evaluate.every_epochs={evaluate.every_epochs} "
        "turns off: set evaluate.every_epochs=1 or checkpoint.keep_best=false",
    )
    require(evaluate.temperature > 0, f"evaluate.temperature={evaluate.temperature} must be above 0")
    require(0 <= config.seed < 2**64, f"seed={config.seed} must lie in 0 ... 2**64 - 1")
    require(bool(config.run.strip()), "run='' must name the run's directory, e.g. run=runs/first")
    require(
        optim.base_batch is None or optim.base_batch >= 1,
        f"optim.base_batch={optim.base_batch} must be at least 1, or null for an lr that is not scaled",
    )
    require(
        (optim.schedule == "step") == bool(optim.milestones),
        f"optim.milestones={optim.milestones} does not fit optim.schedule={optim.schedule}: "
        "the step schedule needs milestones and no other takes them",
    )
    unknown = set(optim.exclude) - {"bias", "norm"}
    require(not unknown, f"optim.exclude names {', '.join(sorted(unknown))}; it can hold bias and norm")
    betas = optim.betas
    two = len(betas) == 2 and all(0 <= each < 1 for each in betas)
    require(two, f"optim.betas={betas} must hold two numbers in 0 ... 1, and below 1")
    require(0 <= optim.momentum < 1, f"optim.momentum={optim.momentum} must lie in 0 ... 1, and below 1")
    require(optim.trust > 0, f"optim.trust={optim.trust} must be above 0")
    require(0 < optim.gamma <= 1, f"optim.gamma={optim.gamma} must be above 0 and at most 1")
    require(0 <= optim.lr_end <= 1, f"optim.lr_end={optim.lr_end} must lie in 0 ... 1: it is a fraction of the peak")
    require(
        model.bn != "sync" or config.accumulate == 1,
        f"accumulate={config.accumulate} would leave model.bn=sync one micro-batch to normalize over, not the global "
        "batch: set accumulate=1 or model.bn=grouped",
    )

    parts = processes * config.accumulate
    require(
        config.batch_size % parts == 0,
        f"batch_size={config.batch_size} must be a multiple of {parts} ({processes} processes x accumulate="
        f"{config.accumulate}): take {max(1, round(config.batch_size / parts)) * parts}",
    )
    micro_batch = config.batch_size // parts
    require(
        model.bn != "grouped" or model.bn_group_size > 1,
        f"model.bn_group_size={model.bn_group_size}: one image has no variance to normalize by; set at least 2",
    )
    require(
        model.bn != "grouped" or micro_batch % model.bn_group_size == 0,
        f"model.bn_group_size={model.bn_group_size} must divide the {micro_batch} images of a process's forward pass "
        f"(batch_size={config.batch_size} / {processes} processes / accumulate={config.accumulate}): "
        f"take {_largest_divisor(micro_batch, model.bn_group_size)}, or model.bn=sync",
    )


def _largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)
