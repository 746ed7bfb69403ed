"""The configuration of `python -m moco.detect`."""

import itertools
from dataclasses import dataclass, field

from moco.config.base import ResumableConfig, bounded, refuse_on_mps, require, require_divisible
from moco.config.subject import EncoderConfig, check_subject

DETECTORS = ("faster_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_fpn", "mask_rcnn_c4", "retinanet")


@dataclass
class BoxesConfig:
    """Images with the boxes of the objects in them, and for Mask R-CNN their masks."""

    layout: str = bounded("json", choices=("json", "coco", "voc"))
    """json: a file in COCO's format and a folder of images. coco: the folders of COCO (annotations/instances_SPLIT.json
    and SPLIT/). voc: the folders of Pascal VOC (JPEGImages, Annotations, ImageSets/Main), of one year or of several
    years."""
    root: str = bounded("", path=True)
    """json: the folder that contains the images, directly or in subfolders. coco: the folder of the data set. voc: the
    folder VOCdevkit, its parent, or a folder that contains JPEGImages."""
    file: str = bounded("", path=True)
    """For json: the file with the training images and their boxes."""
    eval_root: str = bounded("", path=True)
    """For json: the folder of the held-out images. Empty: root."""
    eval_file: str = bounded("", path=True)
    """For json: the file with the held-out images and their boxes."""
    hold_out: float = bounded(0.0, ge=0, lt=1)
    """For json: fraction of the images in boxes.file to hold out, if there is no eval_file."""
    split: list[str] = bounded([], unique=True)
    """For coco and voc: the splits for training. A split of voc is YEAR/NAME, or NAME if root contains JPEGImages.
    Empty: train2017 for coco; 2007/trainval and 2012/trainval for voc."""
    eval_split: list[str] = bounded([], unique=True)
    """For coco and voc: the splits for the evaluation. Empty: val2017 for coco; 2007/test for voc."""
    classes: list[str] = bounded([], unique=True)
    """For voc: names of the classes. Empty: the 20 classes of Pascal VOC."""
    bad_boxes: str = bounded("refuse", choices=("refuse", "drop"))
    """What happens if a box has no area, or reaches more than a pixel outside of its image: refuse (the command ends
    with an error), or drop (the box is left out)."""
    workers: int | None = bounded(None, ge=0, le=512)
    """Loader processes per training process; 0: load in the main process; null: the number of CPU cores divided by the
    number of training processes on this machine, but at least 1 and at most 16."""


@dataclass
class DetectConfig(ResumableConfig, EncoderConfig):
    """Train an object detector on each of several encoders, and evaluate it on held-out images."""

    encoders: list[str] = bounded([], path=True, min_length=1, unique=True, example="'encoders=[pretrained,untrained]'")
    """Encoders to compare. A detector is trained from each one, for the same number of steps. pretrained: the encoder
    of run or checkpoint; untrained: the same network with random weights; any other entry: the path of a run, or of a
    file that `checkpoint` accepts."""
    detector: str = bounded("faster_rcnn_fpn", choices=DETECTORS)
    """faster_rcnn_fpn, mask_rcnn_fpn: with a feature pyramid. faster_rcnn_c4, mask_rcnn_c4: proposals come from the
    feature map of a ResNet's third stage, and the ResNet's last stage processes each proposal. retinanet: a feature
    pyramid and no proposals."""
    norm: bool = True
    """Normalize the layers that the detector adds to the encoder. faster_rcnn_fpn and mask_rcnn_fpn: batch
    normalization over the global batch in the pyramid, the mask head and the box head. The box head has four
    convolutions with norm=true, and no convolutions with norm=false. faster_rcnn_c4 and mask_rcnn_c4: batch
    normalization after the ResNet's last stage. retinanet: batch normalization in the pyramid, group normalization in
    the head."""
    bn: str = bounded("sync", choices=("sync", "frozen"))
    """Batch normalization of the encoder: sync (statistics of the global batch), or frozen (its running statistics)."""
    precise_bn: int = bounded(0, ge=0)
    """For bn=sync: number of batches over which the running statistics are computed again after the training, with the
    final weights (PRECISE_BN of Detectron2); 0: keep the running statistics of the training."""
    width: int = bounded(256, ge=8, le=4096)
    """Channels of the feature pyramid and of the convolutions in the heads on it; the box head's fully connected layers
    have four times as many channels. In mask_rcnn_c4: channels of the mask head."""
    anchor_sizes: list[float] | None = bounded(None, ge=2, min_length=1)
    """Sides of the anchor boxes in pixels of the resized image. With a feature pyramid: one side for each level; with
    faster_rcnn_c4 and mask_rcnn_c4: all sides on the one feature map. Null: 8 times the stride of each level (4 times
    in retinanet), or 32, 64, ... 512 with faster_rcnn_c4 and mask_rcnn_c4. retinanet also uses 1.26 and 1.59 times each
    side."""
    anchor_samples: int = bounded(256, ge=2)
    """For R-CNNs: number of anchors per image that are sampled for the loss of the proposals."""
    box_samples: int = bounded(512, ge=2)
    """For R-CNNs: number of proposals per image that are sampled for the loss of the boxes."""
    seeds: int = bounded(1, ge=1)
    """Number of trainings per encoder, with the seeds `seed`, `seed` + 1, ... They differ in the random initial
    weights, the order and sizes of the images, and the sampled boxes."""
    steps: int = bounded(24_000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = bounded(16, ge=1, lt=65_536)
    """Images per step, over all processes."""
    sizes: list[int] = bounded([480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], ge=16, le=8192, min_length=1)
    """A training image is resized so that its shorter side has one of these lengths in pixels, chosen at random."""
    eval_size: int = bounded(800, ge=16, le=8192)
    """Shorter side in pixels to which an image is resized for the evaluation."""
    max_size: int = bounded(1333, ge=16, le=8192)
    """Upper limit for the longer side of a resized image, in pixels."""
    flip_p: float = bounded(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    lr: float = bounded(0.02, gt=0)
    """Learning rate (lr) after the warm-up. If you change batch_size, change lr by the same factor."""
    schedule: str = bounded("step", choices=("step", "cosine"))
    """Decrease of the lr: step (to a tenth at each of the `milestones`), or cosine (to 0)."""
    milestones: list[float] = bounded([0.75, 0.91666], gt=0, lt=1)
    """For schedule=step: when the lr decreases, as fractions of the steps."""
    warmup: float = bounded(0.00417, ge=0, lt=1)
    """Fraction of the steps, at the start of the training, in which the lr rises linearly to its peak."""
    momentum: float = bounded(0.9, ge=0, lt=1)
    """Momentum of the optimizer, which is SGD."""
    weight_decay: float = bounded(1e-4, ge=0)
    """Weight decay of all weights except those of normalization layers."""
    precision: str = bounded("fp32", choices=("fp32", "bf16"))
    """Number format of the computation in training."""
    mean: list[float] | None = bounded(None, ge=0, le=1, min_length=3, max_length=3)
    """Mean of each channel, subtracted from the pixels in 0 ... 1. Null: the values saved with the encoder, or
    ImageNet's if none are saved."""
    std: list[float] | None = bounded(None, gt=0, le=1, min_length=3, max_length=3)
    """Standard deviation of each channel, by which pixels are divided after the mean is subtracted. Null: the values
    saved with the encoder, or ImageNet's if none are saved."""
    boxes: BoxesConfig = field(default_factory=BoxesConfig)

    @property
    def masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.detector.startswith("mask")


# Fields of `BoxesConfig` that have an effect in some layouts only.
_OF_LAYOUT = {
    "json": ("file", "eval_root", "eval_file", "hold_out"),
    "coco": ("split", "eval_split"),
    "voc": ("split", "eval_split", "classes"),
}


def check_detect(config: DetectConfig, processes: int = 1) -> None:
    """Raise ConfigError for a configuration that is invalid, or whose batch cannot be divided over the processes."""
    check_subject(config)
    refuse_on_mps(config, "this command")
    boxes, default = config.boxes, BoxesConfig()
    require(bool(boxes.root), "boxes.root is empty: set boxes.root=DIR, and boxes.layout to the layout of its files")
    for name in dict.fromkeys(itertools.chain(*_OF_LAYOUT.values())):
        value, layouts = getattr(boxes, name), [layout for layout, names in _OF_LAYOUT.items() if name in names]
        error = (
            f"boxes.{name}={value} is for boxes.layout={' or '.join(layouts)}, not {boxes.layout}: remove one of them"
        )
        require(boxes.layout in layouts or value == getattr(default, name), error)
    if boxes.layout == "json":
        require(bool(boxes.file), "boxes.file is empty: set boxes.file=FILE.json, the boxes of the training images")
        parts = [f"boxes.eval_file={boxes.eval_file}"] * bool(boxes.eval_file)
        parts += [f"boxes.hold_out={boxes.hold_out}"] * bool(boxes.hold_out)
        require(len(parts) < 2, f"{' and '.join(parts)} both name held-out images: remove one of them")
        require(bool(parts), "there are no held-out images: set boxes.eval_file=FILE.json, or boxes.hold_out=0.2")
    precise = f"precise_bn={config.precise_bn}"
    error = f"{precise} has no effect with bn=frozen: set precise_bn=0, or bn=sync"
    require(config.bn == "sync" or not config.precise_bn, error)
    error = f"{precise} exceeds steps={config.steps}, whose batches it uses: lower it"
    require(config.precise_bn <= config.steps, error)
    masks = f"detector={config.detector} needs masks, which boxes.layout=voc does not have"
    fix = "set detector=faster_rcnn_fpn, or use a data set with masks, boxes.layout=coco or json"
    require(not (config.masks and boxes.layout == "voc"), f"{masks}: {fix}")
    largest = max(*config.sizes, config.eval_size)
    require(largest <= config.max_size, f"max_size={config.max_size} is below a size of {largest}: raise it")
    require_divisible(config.batch_size, processes, f"the {processes} processes")
