"""The schema of `python -m moco.finetune`: types, what each field means, and the checks."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import at_least, one_of, require
from moco.config.subject import SubjectConfig, check_subject

DEFAULT_FRACTION = 0.01  # where nothing says which pictures have labels


@dataclass
class FinetuneConfig(SubjectConfig):
    """All of a fine-tuning."""

    encoders: list[str] = field(default_factory=list)
    """pretrained, untrained (the same network from random weights), or both; [untrained] with fraction=1.0 is the
    supervised baseline"""
    fraction: float | None = None
    """this part of each class's training pictures has a label, at least one picture; null, and neither of the next
    two: 0.01"""
    labels_per_class: int = 0
    """or so many of each class; 0: not this way"""
    subset_list: str = ""
    """or those that a text file lists, one name a line, as SimCLR's 1percent.txt does"""
    seeds: int = 1
    """repeats from `seed` on: each with its own pictures, first weights, order and augmentation"""
    epochs: int = 100
    """passes over the labeled pictures"""
    min_steps: int = 0
    """few labels: more epochs, until so many steps are made"""
    batch_size: int = 128
    """over all processes; as many as there are where there are fewer labeled pictures"""
    optimizer: str = "sgd"
    """sgd or adamw"""
    lr: float = 0.01
    """the backbone's peak, as it stands whatever the batch; a cosine to 0"""
    head_lr_factor: float = 1.0
    """the classifier's lr is so many times lr"""
    momentum: float = 0.9
    """of sgd"""
    nesterov: bool = False
    """of sgd"""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """of adamw"""
    weight_decay: float = 0.0
    """of weights that `exclude` does not leave out"""
    exclude: list[str] = field(default_factory=list)
    """what weight decay leaves out: bias, norm"""
    warmup: float = 0.0
    """part of the steps in which the lr rises from zero"""
    layer_decay: float | None = None
    """vision transformers and timm's networks: a layer's lr is so many times that of the layer above it;
    vectors are not decayed then"""
    drop_path: float | None = None
    """of the same networks: the rate at which the deepest block is left out in training"""
    label_smoothing: float = 0.0
    """so much of a target is spread over all classes; 0: none"""
    mixup: float = 0.0
    """alpha of MixUp; 0: none; with cutmix, each step draws one of the two"""
    cutmix: float = 0.0
    """alpha of CutMix; 0: none"""
    bn: str = "sync"
    """sync (statistics of the global batch) or frozen (the running statistics as they are)"""
    precision: str = "fp32"
    """fp32 or bf16"""
    validation: float = 0.0
    """to choose settings by: take this part of each class from the training split, label none of it, and judge on it;
    the held-out split stays closed"""
    view: dict[str, Any] = field(default_factory=dict)
    """where the training view (`moco.data.view.View`) differs from the run's first view, or, for other files, from
    crops of 8 to 100 % and a flip; each as +view.NAME=VALUE"""


def check_finetune(config: FinetuneConfig, processes: int = 1) -> None:
    """Refuses what cannot be fine-tuned, before any work starts.

    Args:
        config: the composed configuration.
        processes: W, over which the batch is divided.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_subject(config)
    one_of("optimizer", config.optimizer, ("sgd", "adamw"))
    one_of("bn", config.bn, ("sync", "frozen"))
    one_of("precision", config.precision, ("fp32", "bf16"))
    require(bool(config.encoders), "encoders=[] names none: set encoders=[pretrained,untrained], or one of them")
    for name in config.encoders:
        one_of("encoders", name, ("pretrained", "untrained"))
    require(len(set(config.encoders)) == len(config.encoders), f"encoders={config.encoders} names one twice")
    _check_labels(config)
    at_least(1, {"seeds": config.seeds, "epochs": config.epochs, "batch_size": config.batch_size})
    at_least(
        0,
        {
            "min_steps": config.min_steps,
            "weight_decay": config.weight_decay,
            "mixup": config.mixup,
            "cutmix": config.cutmix,
        },
    )
    for name, value in {"lr": config.lr, "head_lr_factor": config.head_lr_factor}.items():
        require(value > 0, f"{name}={value} must be above 0")
    below_one = {
        "momentum": config.momentum,
        "warmup": config.warmup,
        "label_smoothing": config.label_smoothing,
        "drop_path": config.drop_path,
        "validation": config.validation,
    }
    for each, number in below_one.items():
        require(number is None or 0 <= number < 1, f"{each}={number} must lie in 0 ... 1, and below 1")
    two = len(config.betas) == 2 and all(0 <= each < 1 for each in config.betas)
    require(two, f"betas={config.betas} must hold two numbers in 0 ... 1, and below 1")
    require(
        not config.nesterov or (config.optimizer == "sgd" and config.momentum > 0),
        f"nesterov=true needs optimizer=sgd with momentum above 0, not {config.optimizer} with {config.momentum}",
    )
    unknown = set(config.exclude) - {"bias", "norm"}
    require(not unknown, f"exclude names {', '.join(sorted(unknown))}; it can hold bias and norm")
    decay = config.layer_decay
    require(decay is None or 0 < decay <= 1, f"layer_decay={decay} must be above 0 and at most 1")
    require(
        config.batch_size % processes == 0,
        f"batch_size={config.batch_size} must be a multiple of the {processes} processes: "
        f"take {max(1, round(config.batch_size / processes)) * processes}",
    )


def fraction_of(config: FinetuneConfig) -> float | None:
    """The part of each class that has labels; None where `labels_per_class` or `subset_list` says which have."""
    if config.labels_per_class or config.subset_list:
        return None
    return config.fraction or DEFAULT_FRACTION


def _check_labels(config: FinetuneConfig) -> None:
    ways = {
        "fraction": config.fraction,
        "labels_per_class": config.labels_per_class or None,
        "subset_list": config.subset_list or None,
    }
    said = [f"{name}={value}" for name, value in ways.items() if value is not None]
    require(len(said) < 2, f"{' and '.join(said)} say which pictures have labels in {len(said)} ways: leave one")
    fraction = config.fraction
    require(fraction is None or 0 < fraction <= 1, f"fraction={fraction} must be above 0 and at most 1 (1.0: all)")
    at_least(0, {"labels_per_class": config.labels_per_class})
