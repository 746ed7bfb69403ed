"""Run commands of moco on an emulated device: python -m tests.rehearsal.commands DEVICE COMMANDS

DEVICE is cuda or mps. COMMANDS is a JSON list, such as ["knn device=cuda"]; a command on the CPU runs as usual. The
process must have the environment of `tests.rehearsal.build` or, for MPS, of `tests.rehearsal.mps`. After each command
on a CUDA device, a line of JSON lists how often the host would have waited at each line of code.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torchvision.ops import boxes

from moco.training import throughput
from scripts.canvases import CLASSES
from tests.rehearsal.device import SoftDevice, own_kernels
from tests.rehearsal.mps import MpsDevice


def on(folder: Path, device: str) -> list[str]:
    """Return the commands that train in folder/DEVICE and evaluate the run there, on any device."""
    rest = f"run={folder / device} device={device} threads=1"
    linear = f"linear seeds=1 batch_size=256 {rest}"
    return [
        "train experiment=digits epochs=1 optim.warmup_epochs=0 evaluate.every_epochs=0 logger=[] precision=fp32 "
        f"checkpoint.every_steps=3 checkpoint.keep_last=3 {rest}",
        f"knn {rest}",
        f"{linear} epochs=2 sweep.lrs=[0.1,1]",
        f"{linear} protocol=moco_v2 epochs=1 official.schedule=constant augment.flip_p=0.5",
        f"finetune seeds=1 min_steps=1 epochs=1 fraction=0.2 {rest}",
        f"embed {rest}",
        *(f"search {mode} {rest}" for mode in ("sample=8", "mode=duplicates", "mode=outliers")),
        f"report {rest}",
    ]


def others_on(folder: Path, device: str) -> list[str]:
    """Return the commands that do not support MPS, for the same run and the images of folder/canvases."""
    out, canvases, rest = folder / device, folder / "canvases", f"device={device} threads=1"
    encoder = f"checkpoint={out}/encoder.safetensors encoders=[pretrained] output={out} {rest}"
    labeled = " ".join(
        f"boxes.{name}={canvases}/{place}"
        for name, place in {
            "root": "train/images",
            "file": "train/boxes.json",
            "eval_root": "test/images",
            "eval_file": "test/boxes.json",
        }.items()
    )
    runs = '["device=cpu","threads=1","logger=[]"]'  # in processes of their own, which have no emulated device
    return [
        f"choose runs=[{out}] images=60 draws=2 probe_labels_per_class=1 output={out}/choose {rest}",
        f"temperature temperatures=[0.2] epochs=1 images=60 draws=2 overrides={runs} output={out}/temperature {rest}",
        f"transfer sets=[data] mode=few_shot episodes=3 {encoder}",
        f"segment masks.root={canvases}/train masks.eval_root={canvases}/test masks.classes=[{','.join(CLASSES)}] "
        f"masks.workers=0 crop=16 batch_size=4 steps=3 lr=0.01 {encoder}",
        f"detect {labeled} boxes.workers=0 sizes=[32] eval_size=32 max_size=48 width=8 box_samples=16 "
        f"anchor_samples=16 batch_size=2 steps=2 {encoder}",
    ]


def numbers(value: Any, place: str) -> dict[str, float]:
    """Return all numbers of a JSON value, by their place; without times."""
    if isinstance(value, dict):
        return {name: x for key, each in value.items() for name, x in numbers(each, f"{place}/{key}").items()}
    if isinstance(value, list):
        return {name: x for at, each in enumerate(value) for name, x in numbers(each, f"{place}/{at}").items()}
    timed = any(word in place for word in ("seconds", "time", "date"))
    return {place: float(value)} if isinstance(value, int | float) and not timed else {}


def results(folder: Path) -> dict[str, float]:
    """Return all numbers of the results of a run, by their place in the file."""
    files = [folder / "results.json", *sorted((folder / "search").glob("*.json"))]
    files += [
        file for file in (folder / "choose/choose.json", folder / "temperature/temperature.json") if file.exists()
    ]
    found: dict[str, float] = {}
    for file in files:
        found |= numbers(json.loads(file.read_text()), file.name)
    assert found
    return found


def main(device: str, commands: list[str]) -> None:
    """Run the commands, one after the other."""
    throughput.SIDE.update(dict.fromkeys(throughput.SIDE, 64))  # the runs do not need the rate of a matrix product
    # On a CPU, torchvision removes overlaps among many boxes level by level, which orders equal scores differently.
    same_boxes = patch("torchvision.ops.boxes._batched_nms_vanilla", boxes._batched_nms_coordinate_trick)
    with MpsDevice() if device == "mps" else SoftDevice() as emulated, own_kernels(used=False), same_boxes:
        for command in commands:
            name, *words = command.split()
            with patch("sys.argv", [f"moco.{name}", *words]):
                runpy.run_module(f"moco.{name}", run_name="__main__")
            if isinstance(emulated, SoftDevice):
                print(json.dumps({f"{kind}: {line}": count for (kind, line, _), count in emulated.waits.items()}))
                emulated.waits.clear()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
