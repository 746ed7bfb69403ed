"""The configuration of `python -m moco.segment`."""

from dataclasses import dataclass, field

from moco.config.base import ResumableConfig, bounded, refuse_on_mps, require, require_divisible
from moco.config.subject import EncoderConfig, check_subject


@dataclass
class MasksConfig:
    """Images and their masks. A mask is an image of the same size whose pixel values are class numbers."""

    layout: str = bounded("folder", choices=("folder", "voc", "cityscapes"))
    """folder: images/NAME.jpg and masks/NAME.png below root; other file formats are accepted too, except JPEG for
    masks. voc: Pascal VOC's folders (JPEGImages, SegmentationClass, ImageSets). cityscapes: leftImg8bit and gtFine,
    with the 19 classes of the benchmark."""
    root: str = bounded("", path=True)
    """Folder of the data set."""
    eval_root: str = bounded("", path=True)
    """For layout=folder: another folder, with the folders images/ and masks/ of the held-out images."""
    hold_out: float = bounded(0.0, ge=0, lt=1)
    """For layout=folder: fraction of the images of root to hold out, if there is no eval_root."""
    split: str = "train"
    """For voc and cityscapes: the split for training. The larger VOC training split of the literature is trainaug."""
    eval_split: str = "val"
    """For voc and cityscapes: the split for the evaluation."""
    classes: list[str] = bounded([], unique=True, max_length=255)
    """For layout=folder: names of the classes 0, 1, ... Empty: each number from 0 to the highest one in the masks is a
    class, named by the number."""
    ignore: int = bounded(255, ge=0, le=255)
    """For layout=folder: the value of mask pixels without a class, which are left out of the loss and of the results.
    With layout=voc, the value is always 255."""
    workers: int | None = bounded(None, ge=0, le=512)
    """Loader processes per training process; 0: load in the main process; null: the number of CPU cores divided by the
    number of training processes on this machine, but at least 1 and at most 16."""


@dataclass
class SegmentConfig(ResumableConfig, EncoderConfig):
    """Train a segmentation network on an encoder, and evaluate it on held-out images."""

    encoders: list[str] = bounded([], path=True, min_length=1, unique=True, example="'encoders=[pretrained,untrained]'")
    """Encoders to compare. A segmentation network is trained from each one, for the same number of steps. pretrained:
    the encoder of run or checkpoint; untrained: the same network with random weights; any other entry: the path of a
    run, or of a file that `checkpoint` accepts."""
    head: str = bounded("fcn_moco", choices=("linear", "fcn", "fcn_moco", "deeplabv3"))
    """The layers on the feature map. linear: a 1x1 convolution. fcn_moco: two 3x3 convolutions of 256 channels with
    dilation 6 and BN, as in the MoCo paper. fcn, deeplabv3: the heads of torchvision."""
    frozen: bool = False
    """Train the head only; the encoder keeps its weights and its BN statistics."""
    output_stride: int | None = bounded(None, ge=8, le=32)
    """Pixels of the image per position of the feature map: 8, 16 or 32. It can be set for ResNet-50 and deeper ResNets;
    their last stages then have dilated convolutions instead of strides. Null: the network's own stride."""
    seeds: int = bounded(1, ge=1)
    """Number of trainings per encoder, with the seeds `seed`, `seed` + 1, ... They differ in the random initial
    weights, the order of the images and the crops."""
    steps: int = bounded(30_000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = bounded(16, ge=2)
    """Images per step, over all processes."""
    crop: int = bounded(513, ge=1, le=8192)
    """Side of the square training crops in pixels."""
    scale: list[float] = bounded([0.5, 2.0], gt=0, min_length=2, max_length=2)
    """Range of the random factor by which an image is resized before it is cropped."""
    flip_p: float = bounded(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    lr: float = bounded(0.003, gt=0)
    """Peak learning rate (lr)."""
    schedule: str = bounded("step", choices=("step", "cosine"))
    """Decrease of the lr: step (to a tenth after 70 % and again after 90 % of the steps), or cosine (to 0)."""
    warmup: float = bounded(0.0, ge=0, lt=1)
    """Fraction of the steps, at the start of the training, in which the lr rises linearly to its peak."""
    head_lr_factor: float = bounded(1.0, gt=0)
    """Ratio of the head's learning rate to that of the encoder."""
    momentum: float = bounded(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = bounded(1e-4, ge=0)
    """Weight decay of all weights."""
    bn: str = bounded("sync", choices=("sync", "frozen"))
    """Batch normalization of the encoder: sync (statistics of the global batch), or frozen (its running statistics)."""
    precision: str = bounded("fp32", choices=("fp32", "bf16"))
    """Number format of the computation in training."""
    mean: list[float] | None = bounded(None, ge=0, le=1, min_length=3, max_length=3)
    """Mean of each channel, subtracted from the pixels in 0 ... 1. Null: the values saved with the encoder, or
    ImageNet's if none are saved."""
    std: list[float] | None = bounded(None, gt=0, le=1, min_length=3, max_length=3)
    """Standard deviation of each channel, by which pixels are divided after the mean is subtracted. Null: the values
    saved with the encoder, or ImageNet's if none are saved."""
    masks: MasksConfig = field(default_factory=MasksConfig)


def check_segment(config: SegmentConfig, processes: int = 1) -> None:
    """Raise ConfigError for a configuration that is invalid, or whose batch cannot be divided over the processes."""
    check_subject(config)
    refuse_on_mps(config, "this command")
    masks = config.masks
    require(bool(masks.root), "masks.root is empty: set masks.root=DIR, and masks.layout to the layout of its files")
    if masks.layout == "folder":
        parts = [f"masks.eval_root={masks.eval_root}"] * bool(masks.eval_root)
        parts += [f"masks.hold_out={masks.hold_out}"] * bool(masks.hold_out)
        require(len(parts) < 2, f"{' and '.join(parts)} both name held-out images: remove one of them")
        require(bool(parts), "there are no held-out images: set masks.eval_root=DIR, or masks.hold_out=0.2")
    else:
        default = MasksConfig()
        names = ("eval_root", "hold_out", "classes", "ignore")
        own = {name: value for name in names if (value := getattr(masks, name)) != getattr(default, name)}
        each = " and ".join(f"masks.{name}={value}" for name, value in own.items())
        require(not own, f"{each} is only for masks.layout=folder, not for layout={masks.layout}: remove it")
    low, high = config.scale
    require(low <= high, f"scale={config.scale} must be a range: the smaller factor first")
    require(config.output_stride in (None, 8, 16, 32), f"output_stride={config.output_stride} must be 8, 16 or 32")
    require_divisible(config.batch_size, processes, f"the {processes} processes")
