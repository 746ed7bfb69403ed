"""Small substitutes for what the documentation's commands name: IMAGES, CIFAR, ImageNet, an official file, a run.

Also the overrides that make each command small. They follow the command's own arguments, so those are parsed and
checked first; then batch size, epochs and network are replaced by smaller ones.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torchvision
import yaml
from PIL import Image

from moco.models.backbones import build_backbone
from tests.data.images import gradient
from tests.data.videos import av, write_video
from tests.detection.examples import voc_object, write_json, write_voc
from tests.docs.pages import REPOSITORY, blocks
from tests.plugins import write_examples

CLASSES = ("cat", "dog")
# Names on the pages, and the names of their substitutes.
RENAMED = {"/data/imagenet": "imagenet", "moco.NAME": "moco.train", "=NAME": "=digits"}

DIGITS = ["epochs=3", "batch_size=256", "model.options.width=4", "evaluate.draws=2"]
DIGITS += ["checkpoint.keep_epochs=1", "checkpoint.every_steps=1", "checkpoint.keep_last=3"]
SMALL = ["epochs=1", "batch_size=16", "accumulate=1", "model=convnet", "model.backbone=convnet"]
SMALL += ["model.options.width=4", "model.bn_group_size=8", "augment.size=32", "augment.eval_resize=36"]
SMALL += ["model.head_hidden=16", "model.dim=16", "augment.small_size=16", "activation_checkpointing=false"]
SMALL += ["data.workers=0", "optim.warmup_epochs=0", "evaluate.k=5", "precision=fp32", "threads=1"]
NO_QUEUE = ["model.bn=sync", "model.shuffle_keys=false"]
TWO_HEADS = ["model.predictor_layers=2", "model.head_norm=true", "model.head_hidden=16", "model.predictor_hidden=16"]
SWEEP = ["epochs=1", "sweep.lrs=[0.1]", "sweep.weight_decays=[0.0]"]
FEW = ["threads=1", "data.workers=0"]
SMALL_SEGMENT = ["output_stride=null", "threads=1", "masks.workers=0", "steps=2", "batch_size=2", "crop=32", "seeds=1"]
SMALL_DETECT = ["threads=1", "boxes.workers=0", "steps=2", "batch_size=2", "sizes=[32]", "eval_size=32", "max_size=64"]
SMALL_DETECT += ["width=16", "box_samples=16", "anchor_samples=16", "seeds=1", "precise_bn=0"]
SMALL_TRANSFER = ["ways=2", "shots=1", "queries=1", "finetune.epochs=1", "finetune.min_steps=1"]


def small(module: str, arguments: tuple[str, ...]) -> list[str]:
    """Return the overrides that make `python -m MODULE ARGUMENTS` small.

    Raises:
        ValueError: for an unknown command: the documentation has a new one.
    """
    if module == "moco.train":
        return small_training(arguments)
    if module == "moco.linear":
        official = any(each.startswith("protocol=moco") for each in arguments)
        images = ["images.size=32", "images.resize=36"] * any(each.startswith("data=imagenet") for each in arguments)
        return [*FEW, *(["epochs=1"] if official else SWEEP), *images]
    if module == "moco.temperature" and "mode=explain" not in arguments:
        training = [*(each for each in DIGITS if "epochs" not in each), "evaluate.every_epochs=0", "device=cpu"]
        fields = ["temperatures=[0.2]", "seeds=1", "epochs=1", "images=60", "draws=2", "bins=10", "keep_epochs=1"]
        return [*fields, f"overrides={json.dumps(training)}"]
    found = {
        "moco.temperature": [],
        "moco.knn": [*FEW, *(["draws=2"] if any("labels_per_class" in each for each in arguments) else [])],
        "moco.finetune": [*FEW, "epochs=1", "min_steps=1", "seeds=1"],
        "moco.transfer": [*FEW, "episodes=3", *SMALL_TRANSFER],
        "moco.segment": [*SMALL_SEGMENT],
        "moco.detect": [*SMALL_DETECT],
        "moco.embed": FEW,
        "moco.search": ["threads=1"],
        "moco.convert": [*FEW, "pictures=2"],
        "moco.check_data": ["data.workers=1"],
        "moco.pack": ["workers=1", "data.workers=1"],
        "moco.report": [*FEW, "pictures=20", "perplexity=3", "queries=2", "references=20", "images_at_once=20"],
        "moco.choose": ["images=60", "draws=2", "probe_labels_per_class=1", "threads=1"],
    }.get(module)
    if found is None:
        raise ValueError(f"{module} is new in the documentation: add overrides for it to tests/docs/stand_ins.py")
    return found


def small_training(arguments: tuple[str, ...]) -> list[str]:
    """Return the overrides for a training command, by its recipe."""
    recipe = next((each.partition("=")[2] for each in arguments if each.startswith("experiment=")), "digits")
    if "digits" in recipe or recipe == "mine":
        # The small teacher has 512 features, not 2048.
        return [*DIGITS, *["model.dim=512"] * ("experiment=distill_digits" in arguments)]
    if "init_from=FILE" in arguments:  # a ResNet-18
        return [
            "method.queue_size=32",
            *(each for each in SMALL if not each.startswith(("model=", "model.backbone", "model.opt"))),
        ]
    if "v3" in recipe:
        return [*SMALL, *NO_QUEUE, *TWO_HEADS, *without_options(recipe, arguments)]
    return [*SMALL, *(NO_QUEUE if recipe.startswith(("simclr", "supcon")) else ["method.queue_size=32"])]


def without_options(recipe: str, arguments: tuple[str, ...]) -> list[str]:
    """Remove the backbone options of the recipe and the command, which the small backbone does not have."""
    added = [each.partition("=")[0].removeprefix("+") for each in arguments if each.startswith("+model.options.")]
    recipe_values = yaml.safe_load(
        (REPOSITORY / "configs" / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
    )
    return [f"~model.options.{name}" for name in recipe_values.get("model", {}).get("options", {})] + [
        f"~{each}" for each in added
    ]


class SmallCifar:
    """torchvision's CIFAR10 and CIFAR100 without the archive: 40 gradients, 20 held out."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        seeds = range(40) if train else range(100, 120)
        self.data = np.stack([np.asarray(gradient(seed, 32, 32)) for seed in seeds])  # (N, 32, 32, 3)
        self.targets = [seed % 2 for seed in seeds]
        self.classes = list(CLASSES)


def tree(root: Path, each: int, first: int) -> None:
    """Write images to ROOT/CLASS/NUMBER.png, `each` per class."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(each):
            gradient(first + 2 * number + label).save(root / name / f"{number:02}.png")


def official_file(path: Path) -> None:
    """A file in facebookresearch/moco's layout: a ResNet-18 with random weights, both encoders and a queue."""
    torch.manual_seed(0)
    state = build_backbone("resnet18", {}).state_dict()
    encoders = {f"module.encoder_{which}.{name}": value for which in "qk" for name, value in state.items()}
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": encoders}, path)


def small_voc(root: Path) -> None:
    """Write six images of Pascal VOC's layout, with masks of two classes."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, numbers in (("trainaug", range(4)), ("val", range(4, 6))):
        for number in numbers:
            gradient(number, 40, 40).save(root / "JPEGImages" / f"{number}.jpg")
            mask = np.tile(np.arange(40, dtype=np.uint8) // 20, (40, 1))
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{number}.png")
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{each}\n" for each in numbers))


def small_boxes(root: Path) -> None:
    """Write Pascal VOC's and COCO's layouts, and ALL.json with boxes in IMAGES."""
    for year, split in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        for number in range(2):
            name = f"{split}{number}"
            write_voc(root / "VOCdevkit", year, split, voc_object("cat", (5, 5, 20, 15)), name)
    for split in ("train2017", "val2017"):
        file = write_json(root / "COCO" / split, both=True)
        (root / "COCO/annotations").mkdir(exist_ok=True)
        file.rename(root / "COCO/annotations" / f"instances_{split}.json")
    names = sorted(path.name for path in (root / "IMAGES").iterdir())
    numbers = range(len(names))
    content = {
        "images": [
            {"id": each, "file_name": name, "width": 64, "height": 48}
            for each, name in zip(numbers, names, strict=True)
        ],
        "annotations": [
            {"id": 1 + each, "image_id": each, "category_id": 1, "bbox": [4, 5, 20, 30]} for each in range(36)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / "ALL.json").write_text(json.dumps(content))


def make(root: Path) -> None:
    """Write all data and plug-ins that pages name, except runs."""
    tree(root / "TRAIN", each=20, first=0)
    write_examples(root)
    tree(root / "TEST", each=8, first=100)
    for place, target in {
        "CIFAR/train": "../TRAIN",
        "CIFAR/test": "../TEST",
        "imagenet/train": "../TRAIN",
        "imagenet/val": "../TEST",
        "scripts": str(REPOSITORY / "scripts"),
        "RUN": "runs/cifar10_cpu",  # the run that results.md trains before it uses this name
    }.items():
        (root / place).parent.mkdir(exist_ok=True)
        os.symlink(target, root / place)
    (root / "IMAGES").mkdir()
    for number, name in enumerate(["a", "b", *(f"{i:02}" for i in range(34))]):
        gradient(number).save(root / "IMAGES" / f"{name}.jpg")
    for number in range(4 * (av is not None)):
        write_video(root / "VIDEOS" / f"{number}.mp4", 30, numbers=range(30 * number, 30 * number + 30), rate=5)
    official_file(root / "moco_v2_800ep_pretrain.pth.tar")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), root / "FILE")
    small_voc(root / "VOCdevkit" / "VOC2012")
    small_boxes(root)
    (root / "DIR" / "experiment").mkdir(parents=True)
    (recipe,) = [text for _, text in blocks(REPOSITORY / "docs/howto/use.md", "yaml")]
    (root / "DIR" / "experiment" / "mine.yaml").write_text(recipe)
