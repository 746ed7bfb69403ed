"""Backbones by name: images (N, C, S, S) to features (N, D). `timm/NAME` is any timm model."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torchvision.models
from torch import Tensor, nn

from moco.config import ConfigError, require
from moco.files import cause
from moco.models.vit import vit, vit_base, vit_conv_base, vit_conv_small, vit_small
from moco.plugins import Registry
from moco.runtime.retries import quiet_retries


class ConvNet(nn.Module):
    """Five 3x3 convolutions with BN, then average pooling: a small encoder for small images on a CPU.

    Args:
        width: channels of the first layer; D = 8 * width * pool**2.
        strides: of the five layers, e.g. (1, 2, 1, 2, 1): 16 px images end as 4x4 maps.
        pool: side of the feature map after pooling. 1 is global pooling; larger values keep the position, which is
            informative for centered images such as handwriting.
        channels: C, of the images.
    """

    map_layer = "layers"

    def __init__(
        self, width: int = 32, strides: tuple[int, ...] = (1, 2, 1, 2, 1), pool: int = 1, channels: int = 3
    ) -> None:
        super().__init__()
        if width < 1 or pool < 1 or len(strides) != 5 or min(strides) < 1:
            raise ValueError(
                f"options.width={width} and options.pool={pool} must be at least 1, and "
                f"options.strides={list(strides)} "
                "five numbers of at least 1"
            )
        widths = [width, 2 * width, 4 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in zip([channels, *widths[:-1]], widths, strides, strict=True):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.num_features = widths[-1] * pool**2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.layers(x)).flatten(1)  # (N, 8 * width * pool**2)
        return out


def _resnet(name: str, /, stem: str = "imagenet", channels: int = 3, **options: Any) -> nn.Module:
    """Return torchvision's ResNet. The stem "cifar" is that of SimCLR and of the official MoCo CIFAR-10 notebook."""
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"options.stem={stem!r} must be 'imagenet' or 'cifar'")
    network: Any = getattr(torchvision.models, name)(weights=None, **options)
    network.num_features, network.map_layer = network.fc.in_features, "layer4"
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    return network  # type: ignore[no-any-return]


BACKBONES: Registry[Callable[..., nn.Module]] = Registry(
    "model.backbone",
    {
        "convnet": ConvNet,
        **{name: partial(_resnet, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
        "vit": vit,
        "vit_small": vit_small,
        "vit_base": vit_base,
        "vit_conv_small": vit_conv_small,
        "vit_conv_base": vit_conv_base,
    },
)


def published_preprocessing(name: str) -> dict[str, Any]:
    """Return the size, resize, mean and std with which timm evaluates `timm/NAME`; {} for other networks."""
    if not name.startswith("timm/"):
        return {}
    import timm

    known = timm.models.get_pretrained_cfg(name.removeprefix("timm/"))
    if known is None:  # timm knows no values for this name
        return {}
    size = known.input_size[-1]
    return {"size": size, "resize": int(size / known.crop_pct), "mean": list(known.mean), "std": list(known.std)}


def published_weights(name: str) -> str:
    """Return the repository on the Hugging Face Hub with timm's weights of the model `name`; "" if there is none."""
    import timm

    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        return ""
    repo = str(known.hf_hub_id or "") if known is not None else ""
    return repo if repo.startswith("timm/") else ""  # other repositories may have no model.safetensors


def _timm_model(name: str, options: Mapping[str, Any], group: str) -> nn.Module:
    """Return `timm/NAME` without its classifier; raise ValueError for an unknown name or missing weights."""
    import timm  # takes a second

    known = name.removeprefix("timm/")
    if not timm.is_model(known):
        close = ", ".join(difflib.get_close_matches(known, timm.list_models(), n=5))
        raise ValueError(f"{group}backbone={name!r}: timm has no such model; similar names: {close or 'none'}")
    try:
        with quiet_retries():
            network: Any = timm.create_model(known, num_classes=0, **options)
    except (TypeError, ValueError):
        raise
    except Exception as error:  # timm and the libraries below it raise many types
        if not options.get("pretrained"):
            raise
        repo = published_weights(known)
        file = f"model.safetensors of huggingface.co/{repo}" if repo else "the file"
        raise ValueError(
            f"{group}options={dict(options)}: the published weights of {group}backbone={name!r} cannot be loaded "
            f"({cause(error).splitlines()[0]}); check the connection, or download {file} on another machine and set "
            "pretrained=false and init_from=FILE"
        ) from error
    # In some models (MobileNetV3, VGG), a hidden layer of the head widens the features; timm's num_features ignores it.
    network.num_features = network.head_hidden_size
    stages = getattr(network, "feature_info", None)
    last = stages[-1]["module"] if stages else ""
    network.map_layer = "norm" if isinstance(getattr(network, "norm", None), nn.Module) else last
    return network  # type: ignore[no-any-return]


def with_channels(options: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return the options of a backbone for images with `channels` channels; every backbone takes three by default."""
    return {**options} if channels == 3 else {**options, "channels": channels}


def build_backbone(name: str, options: Mapping[str, Any], group: str = "model.") -> nn.Module:
    """Return a backbone without its classifier; its attribute `num_features` is D.

    The attribute `map_layer` names the layer that returns its feature map, or a ViT's tokens; "" if it is not known.

    Args:
        name: a key of `BACKBONES`, or `timm/NAME` for any model of timm.
        options: keyword arguments of the constructor, e.g. {"stem": "cifar"}. "channels" is the number of channels of
            the images. timm receives it as `in_chans` and adapts published weights of the first layer to it: timm sums
            the weights over the channels, or repeats and scales them.
        group: the prefix of the fields `backbone` and `options` in error messages; "" for none.

    Raises:
        ValueError: for an unknown name, an invalid option, or published weights that cannot be loaded.
    """
    try:
        if name.startswith("timm/"):
            options = {("in_chans" if each == "channels" else each): value for each, value in options.items()}
            return _timm_model(name, options, group)
        if name not in BACKBONES:
            import timm

            fix = f"set {group}backbone=timm/{name}"
            require(not timm.is_model(name), f"{group}backbone={name!r} is a model of timm: {fix}")
        return BACKBONES.find(name, also="timm/NAME", field=f"{group}backbone")(**options)
    except ValueError as error:
        if str(error).startswith("options."):
            raise ConfigError(f"{group}{error}") from error
        raise
    except (TypeError, AttributeError, AssertionError, LookupError, ArithmeticError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        reason = first.removesuffix(" but expected one of:")  # torch lists all alternatives
        both = ", or set both with model=NAME, such as model=resnet18_cifar or model=resnet50"
        raise ConfigError(
            f"{group}options={dict(options)} is invalid for {group}backbone={name!r}: {reason}; correct one of them"
            + both * (group == "model.")
        ) from error
