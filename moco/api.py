"""The Python interface: `import moco`, then `moco.load_encoder("runs/digits")`."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import v2

from moco.composition import compose_overrides
from moco.config import TrainConfig, require
from moco.config.base import HUB
from moco.config.subject import ImagesConfig, SubjectConfig, check_subject
from moco.data.in_memory import to_pixels
from moco.data.pixel_format import RGB, PixelFormat, to_float
from moco.evaluation.features import EvalTransform, evaluation_view
from moco.evaluation.layers import LayerFeatures
from moco.evaluation.linear_probe import LinearHead, load_head
from moco.evaluation.subject import open_subject, weights_digest
from moco.interop.encoder_file import EncoderFile, build
from moco.interop.hub import is_hub_folder
from moco.train import train


class LoadedEncoder(nn.Module):
    """A backbone with the preprocessing of its images: `encoder(encoder.transform(image)[None])` is (1, D).

    Attributes:
        backbone: the network, in eval mode, without gradients: images (N, C, S, S) to features (N, D).
        transform: a transform of torchvision (v2) for one image, to a float tensor (C, S, S). It takes a PIL image of
            any mode; an array (H, W, C), (C, H, W) or (H, W); a tensor (C, H, W) or (H, W); or the path of an image
            file. Arrays and tensors must have the type of the run's images: uint8 unless data.dtype was set.
        num_features: D.
        info: a dict with "source" (the path of the file), "layout", "backbone", "options", "step" (optimizer steps of
            the training), "config" (of the run; empty for a file of another project), "images" (size, resize, mean
            and std of `transform`) and "sha256" (of the weights, as they were loaded).
    """

    def __init__(self, file: EncoderFile, transform: EvalTransform, bits: int | None = None) -> None:
        super().__init__()
        self.backbone = build(file).backbone
        data = file.config.get("data", {})
        pixel_format = PixelFormat(file.channels, data.get("dtype", RGB.dtype), bits or data.get("bits") or RGB.bits)
        self.transform = evaluation_transform(transform, pixel_format)
        self.num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        names = ("source", "layout", "backbone", "options", "step", "config")
        self.eval()
        self.info: dict[str, Any] = {name: getattr(file, name) for name in names} | {"images": asdict(transform)}
        self.info["sha256"] = weights_digest(file, "backbone")

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of prepared images (N, C, S, S)."""
        features: Tensor = self.backbone(images)
        return features


class LoadedClassifier(nn.Module):
    """An encoder with the linear classifier that `moco.linear` trained on it.

    Attributes:
        encoder: a `LoadedEncoder`, whose `transform` prepares the images for the classifier.
        head: the linear layer, a `LinearHead`; `head.about` is the metadata of the file.
        classes: the names of the L classes, in the order of the scores.
    """

    def __init__(self, encoder: LoadedEncoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder, self.head, self.classes = encoder, head, list(head.about["classes"])
        self._features = LayerFeatures(encoder.backbone, [head.about["layer"]], encoder.info["images"]["size"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (N, L) of prepared images (N, C, S, S).

        If each image has one label, the softmax of the scores gives probabilities. If images can have several labels,
        the sigmoid of each score gives the probability of its class.
        """
        return self.head(self._features(images))


def train_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of `python -m moco.train` with these overrides, such as `["experiment=digits"]`.

    Raises:
        ConfigError: for an unknown field, or a value that does not fit its type.
    """
    require(not isinstance(overrides, str), f"overrides={overrides!r} must be a list, such as [{overrides!r}]")
    configs = compose_overrides(overrides)
    require(len(configs) == 1, f"overrides={list(overrides)} must describe one run: remove --multirun, --cfg or --help")
    return configs[0]


def pretrain(config: TrainConfig | Sequence[str] = ()) -> Path:
    """Pretrain an encoder, or resume the unfinished run in `config.run`, as `python -m moco.train` does.

    Args:
        config: a configuration, or the overrides of the command.

    Returns:
        The directory of the run, which `load_encoder` takes.

    Raises:
        ConfigError: for an invalid configuration.
        FileNotFoundError: if the data set does not exist.
        Preempted: if a signal or `stop_after` stopped the run before its end. The same call resumes it.
    """
    config = config if isinstance(config, TrainConfig) else train_config(config)
    train(config)
    return Path(config.run)


def load_encoder(
    source: str | Path,
    *,
    weights: str = "encoder",
    backbone: str | None = None,
    options: dict[str, Any] | None = None,
    size: int | None = None,
    resize: int | None = None,
    bits: int | None = None,
) -> LoadedEncoder:
    """Load a trained encoder for inference, or for further training (`encoder.requires_grad_()`).

    The features are those of `python -m moco.embed`.

    Args:
        source: the directory of a run, whose newest checkpoint is loaded; or a file: encoder.safetensors, a checkpoint,
            or a file of another project in a layout that `moco.interop.encoder_file` reads; or a folder of
            `moco.convert to=hub`; or `hf://USER/REPOSITORY` on the Hugging Face Hub.
        weights: "encoder", or "momentum_encoder" if the checkpoint holds one.
        backbone, options: the network, if the file does not name it, such as "resnet50".
        size, resize: side of the input images, and their shorter side before the central crop, in pixels. None: those
            of the run or the file, else 224 and 256.
        bits: the number of significant bits, 8 ... 16, of images that have 16 bits per channel and are converted to
            uint8 (see data.bits). None: that of the run's images, or 16 if it is unknown (commands such as
            moco.embed derive it from the images instead).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no encoder that can be read; the message says why.
    """
    require(bits is None or bits in range(8, 17), f"bits={bits} must be within 8 ... 16")
    path = str(source) if str(source).startswith(HUB) else str(Path(source).expanduser())
    field = "run" if Path(path).is_dir() and not is_hub_folder(Path(path)) else "checkpoint"
    images = ImagesConfig(size=size, resize=resize)
    config = SubjectConfig(weights=weights, backbone=backbone, options=options or {}, images=images)
    setattr(config, field, path)
    check_subject(config)
    subject = open_subject(config)
    return LoadedEncoder(subject.file, subject.transform, bits)


def load_classifier(file: str | Path, encoder: LoadedEncoder | None = None) -> LoadedClassifier:
    """Load the classifier that `python -m moco.linear` saved, together with its encoder.

    Args:
        file: `linear.safetensors`, or `linear_PROTOCOL.safetensors`.
        encoder: the encoder on which the classifier was trained. None: load it from the path recorded in `file`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the file is no classifier of moco.linear, or if it belongs to other weights or sizes of images.
    """
    path = Path(file).expanduser()
    head = load_head(path)
    about, look = head.about, head.about["look"]
    if encoder is None:
        network = {"backbone": about["backbone"], "options": about.get("options")}
        encoder = load_encoder(about["encoder"], **network, size=look["size"], resize=look["resize"])
    info, fix = encoder.info, "pass the classifier's own encoder, encoder=moco.load_encoder(...)"
    names = ("sha256",) if "sha256" in about else ("backbone", "step")  # earlier versions wrote no sha256
    whose = f"{path} belongs to the encoder {about['encoder']} (step {about['step']})"
    same = all(info[name] == about[name] for name in names)
    require(same, f"{whose}, and {info['source']} (step {info['step']}) has other weights: {fix}")
    prepared = {name: list(value) if isinstance(value, tuple) else value for name, value in info["images"].items()}
    require(prepared == look, f"{whose} with images prepared as {look}, not as {prepared}: {fix}")
    return LoadedClassifier(encoder, head)


def evaluation_transform(transform: EvalTransform, pixel_format: PixelFormat) -> v2.Compose:
    """Return the preprocessing of an evaluation as a transform of torchvision.

    Resizing works on tensors, as in all commands of moco: on PIL images it would give slightly different values.
    """
    if pixel_format._replace(bits=RGB.bits) == RGB:
        resize = [v2.Resize(transform.resize or transform.size, antialias=True), v2.CenterCrop(transform.size)]
    else:  # torchvision cannot resize uint16
        resize = [v2.Lambda(partial(evaluation_view, resize=transform.resize, size=transform.size))]
    return v2.Compose(
        [
            v2.Lambda(partial(to_pixels, pixel_format=pixel_format)),
            *resize,
            v2.Lambda(to_float),  # v2.ToDtype rounds differently
            v2.Normalize(list(transform.mean), list(transform.std)),
        ]
    )
