"""Small inputs for every command: images, a run, an encoder, features, odd paths."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

TINY = ("device=cpu", "threads=1")
TRAIN = (
    *("data=folder", "data.labels=folder", "data.workers=0", "augment.size=16", "augment.eval_resize=16", "epochs=1"),
    *("batch_size=8", "model.backbone=convnet", "++model.options.width=4", "++model.options.pool=2", "model.dim=8"),
    *("model.bn_group_size=8", "method.queue_size=16", "evaluate.k=3", "log_every=1", "analyse_every=1"),
)


def call(command: str, *arguments: str) -> None:
    """Do what `python -m moco.COMMAND` does, in this process."""
    sys.modules.pop(f"moco.{command}", None)  # runpy would warn
    with mock.patch.object(sys, "argv", [command, *arguments]):
        runpy.run_module(f"moco.{command}", run_name="__main__")


def build(root: Path) -> None:
    """Write images/train/CLASS, images/test/CLASS, run/, features/, odd/ and a file below a folder."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            folder = root / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                pixels[..., 0] = 255 * (label == "dog")
                Image.fromarray(pixels).save(folder / f"{i}.png")
    for i in range(5):
        for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
            (root / "masked" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, shape, dtype=np.uint8)).save(root / "masked" / kind / f"{i}.png")
    write_boxes(root / "masked")
    call("train", *baseline("train", root), f"run={root / 'run'}", "epochs=4", "checkpoint.keep_epochs=1")
    call("embed", *TINY, f"run={root / 'run'}", f"output={root / 'features'}", "data.workers=0")
    odd = root / "odd"
    odd.mkdir()
    (odd / "file").write_text("text\n")
    (odd / "empty").touch()
    (odd / "folder").mkdir()
    (odd / "broken").symlink_to("gone")
    (odd / "cycle").symlink_to("cycle")
    os.mkfifo(odd / "fifo")
    shutil.copy(root / "images/train/cat/0.png", odd / "image.png")
    (odd / "cut.safetensors").write_bytes((root / "run/encoder.safetensors").read_bytes()[:200])


def write_boxes(root: Path) -> None:
    """Write boxes.json, with a box for each image below `root`."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in range(5)]
    boxes = [{"id": i + 1, "image_id": i, "category_id": 1 + i % 2, "bbox": [i, 2, 8, 9]} for i in range(5)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))


def baseline(command: str, root: Path) -> list[str]:
    """Return the overrides of a small valid call, which writes below the working directory."""
    images = [f"data.root={root / 'images/train'}", f"data.eval_root={root / 'images/test'}"]
    run = f"run={root / 'run'}"
    data = ["data=folder", "data.labels=folder", "data.workers=0", *images]
    subject = [*TINY, run, "output=out", "data.workers=0"]
    return {
        "train": ["experiment=digits", *TINY, *TRAIN, *images, "run=out", "optim.warmup_epochs=0"],
        "check_data": [*data, "output=out.json"],
        "pack": [*data, "output=out"],
        "knn": [*subject, "k=[3]", "temperature=[0.1]"],
        "linear": [*subject, "protocol=moco_v2_digits", "epochs=1", "batch_size=8"],
        "finetune": [*subject, "epochs=1", "batch_size=8", "seeds=1", "encoders=[pretrained]"],
        "transfer": [*subject, f"sets=[{root / 'images'}]", "encoders=[pretrained]"],
        "segment": [
            *(*TINY, run, "output=out", f"masks.root={root / 'masked'}", "masks.hold_out=0.4", "masks.workers=0"),
            *("encoders=[pretrained]", "head=linear", "steps=2", "batch_size=2", "crop=16", "save_every=0"),
        ],
        "detect": [
            *(
                *TINY,
                run,
                "output=out",
                f"boxes.root={root / 'masked/images'}",
                f"boxes.file={root / 'masked/boxes.json'}",
            ),
            *(
                "boxes.hold_out=0.4",
                "boxes.workers=0",
                "encoders=[pretrained]",
                "steps=2",
                "batch_size=2",
                "sizes=[16]",
            ),
            *("eval_size=16", "max_size=32", "width=8", "box_samples=8", "anchor_samples=8", "save_every=0"),
        ],
        "embed": [*TINY, run, "output=out", "data.workers=0"],
        "search": [*TINY, f"index={root / 'features'}", "output=out", "sample=2", "data.workers=0"],
        "report": [*TINY, run, "output=out.html", "pictures=12", "queries=2", "map=none", "data.workers=0"],
        "temperature": [*TINY, "mode=explain", "temperatures=[0.1,0.5]", "output=out"],
        "choose": [*TINY, f"runs=[{root / 'run'}]", "output=out", "draws=2"],
        "convert": [*subject, "to=safetensors", "output=out.safetensors", "pictures=2"],
    }[command]
