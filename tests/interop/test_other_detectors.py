"""Detectron2 and MMDetection find every weight of a ResNet-50 in the files of moco.convert.

Neither is installed here. Names, shapes and the way of loading are written from their published formats: Detectron2's
modeling/backbone/resnet.py, and its checkpoint/c2_model_loading.py, which matches names by their ends; MMDetection's
models/backbones/resnet.py, and load_checkpoint of MMEngine.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moco.interop.write import FORMATS
from tests.interop.networks import source, trained

BLOCKS = (3, 4, 6, 3)  # of a ResNet-50
NORM = ("weight", "bias", "running_mean", "running_var")
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def written(to: str, folder: Path) -> Path:
    path, network = folder / "resnet50", trained("resnet50")
    FORMATS[to].write(path, source(network, "resnet50"), network)
    return path


def convolutions() -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
    """Yield stage (0 to 3), block, part and shape of every convolution of the bottlenecks."""
    fan_in = 64
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            if block == 0:
                yield stage, block, "shortcut", (4 * width, fan_in, 1, 1)
            yield stage, block, "conv1", (width, fan_in, 1, 1)
            yield stage, block, "conv2", (width, width, 3, 3)
            yield stage, block, "conv3", (4 * width, width, 1, 1)
            fan_in = 4 * width


def of_detectron2() -> Shapes:
    """Yield the names and shapes in a Faster R-CNN-C4: the last stage belongs to the heads."""
    parts: list[tuple[str, tuple[int, ...]]] = [("backbone.stem.conv1", (64, 3, 7, 7))]
    for stage, block, part, shape in convolutions():
        parts.append((f"{'roi_heads' if stage == 3 else 'backbone'}.res{stage + 2}.{block}.{part}", shape))
    for name, shape in parts:
        yield f"{name}.weight", shape
        for each in NORM:
            yield f"{name}.norm.{each}", shape[:1]


def of_mmdetection() -> Shapes:
    parts: list[tuple[str, str, tuple[int, ...]]] = [("conv1", "bn1", (64, 3, 7, 7))]
    for stage, block, part, shape in convolutions():
        prefix = f"layer{stage + 1}.{block}"
        names = ("downsample.0", "downsample.1") if part == "shortcut" else (part, part.replace("conv", "bn"))
        parts.append((f"{prefix}.{names[0]}", f"{prefix}.{names[1]}", shape))
    for convolution, norm, shape in parts:
        yield f"{convolution}.weight", shape
        for each in NORM:
            yield f"{norm}.{each}", shape[:1]


def test_detectron2_finds_every_weight(tmp_path: Path) -> None:
    content = pickle.loads(written("detectron2", tmp_path).read_bytes())
    assert content["matching_heuristics"] is True  # match names by their ends
    model, used, total = content["model"], set(), 0.0
    for name, shape in of_detectron2():
        # A name in the file matches if it equals the end of the model's name; the longest one is taken.
        found = [each for each in model if name == each or name.endswith(f".{each}")]
        assert len(found) == 1, name
        assert model[found[0]].shape == shape, name
        used.add(found[0])
        total += float(model[found[0]].astype("float64").sum())
    assert used == set(model)
    state = trained("resnet50").state_dict().items()
    assert total == pytest.approx(sum(float(v.double().sum()) for k, v in state if "num_batches" not in k), rel=1e-9)


def test_mmdetection_finds_every_weight(tmp_path: Path) -> None:
    content = torch.load(written("torchvision", tmp_path), weights_only=True)
    state = content.get("state_dict", content)
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    expected = dict(of_mmdetection())
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert {name for name in state if "num_batches_tracked" not in name} == set(expected)
    for name, value in trained("resnet50").state_dict().items():
        assert torch.equal(state[name], value)
