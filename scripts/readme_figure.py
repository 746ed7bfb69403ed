"""Draw the figure of README.md from a run on the digits: two views, the accuracy while training, nearest neighbors.

python scripts/readme_figure.py runs/digits docs/figures/digits.png
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from moco.config import DataConfig
from moco.data.sources import Source, load_source
from moco.evaluation.features import EvalTransform, Inference, extract, pixels
from moco.files import WriteError, check_writable
from moco.interop.encoder_file import build, read_encoder
from moco.runs.metrics import read_metrics

QUERIES, NEIGHBORS = 5, 4
RIGHT, WRONG = "#1e9650", "#d9541e"


def main() -> None:
    """Read the run, search the neighbors and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of `python -m moco.train`")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    lacking = [
        name for name in ("views.png", "metrics.jsonl", "encoder.safetensors") if not (options.run / name).exists()
    ]
    if lacking:
        parser.error(f"{options.run} has no {' and no '.join(lacking)}: name the directory of a finished run")
    try:
        check_writable(options.output)
    except WriteError as error:
        parser.error(str(error))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3), layout="constrained")
        parts: Any = figure.subfigures(1, 3, width_ratios=[1.05, 1.0, 1.25])
        views, curve, neighbors = parts
        draw_views(views, imread(options.run / "views.png"))
        draw_curve(curve, options.run)
        draw_neighbors(neighbors, options.run)
        figure.savefig(options.output, dpi=150)


def draw_views(part: Any, image: Any) -> None:
    """Draw four of the eight pairs of views."""
    part.suptitle("two random views of each image:\ntheir embeddings must agree", fontsize=9)
    axes = part.subplots()
    axes.imshow(image[:, : image.shape[1] // 2])
    axes.axis("off")


def draw_curve(part: Any, run: Path) -> None:
    """Draw the live kNN accuracy beside its baselines."""
    part.suptitle("held-out accuracy while training\n(kNN, one label per class)", fontsize=9)
    axes = part.subplots()
    metrics = read_metrics(run / "metrics.jsonl")
    steps, values = metrics["accuracy/knn"]
    axes.plot(steps, values, marker="o", markersize=3, label="pretrained", color="#2f7ed8")
    for name, style in (("untrained", "--"), ("raw_pixels", ":")):
        axes.axhline(metrics[f"accuracy/{name}"][1][0], ls=style, color="#7d7d83", label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="%")
    axes.legend(frameon=False, fontsize=8)


def draw_neighbors(part: Any, run: Path) -> None:
    """Draw the neighbors of held-out digits, for raw pixels and for the encoder."""
    part.suptitle(
        "neighbors of held-out digits that raw pixels confuse\n(green: the same class, orange: another)", fontsize=9
    )
    sources = load_source(DataConfig(name="digits"))
    train, held_out = sources.train, sources.held_out
    assert held_out is not None
    file = read_encoder(run / "encoder.safetensors")
    size, resize, mean, std = (file.images[name] for name in ("size", "resize", "mean", "std"))
    transform = EvalTransform(size, resize, mean, std)
    found = {
        "raw pixels": ranked(train, held_out, pixels, transform.unnormalized()),
        "encoder": ranked(train, held_out, build(file).eval().backbone, transform),
    }
    rows = hardest(found["raw pixels"], train, held_out)
    grid = part.subplots(QUERIES, 2 * NEIGHBORS + 3)
    for line, row in zip(grid, rows, strict=True):
        for axes, (source, i) in zip(line, cells(row, found, train, held_out), strict=True):
            axes.set(xticks=[], yticks=[])
            if source is None:
                axes.axis("off")
                continue
            axes.imshow(source.image(i).permute(1, 2, 0))
            if source is train:
                right = labels(train)[i] == labels(held_out)[row]
                axes.spines[:].set(visible=True, linewidth=2, color=RIGHT if right else WRONG)
    for column, title in ((0, "query"), (2, "raw pixels"), (3 + NEIGHBORS, "encoder")):
        grid[0][column].set_title(title, fontsize=8, loc="left")


def labels(source: Source) -> Any:
    """Return the labels of a source that has some."""
    assert source.labels is not None
    return source.labels


def ranked(train: Source, held_out: Source, network: Any, transform: EvalTransform) -> Tensor:
    """Return the training images nearest to each held-out image, nearest first, (Q, NEIGHBORS)."""
    inference = Inference(torch.device("cpu"))
    bank, queries = (F.normalize(extract(network, each, transform, inference), dim=1) for each in (train, held_out))
    return (queries @ bank.T).topk(NEIGHBORS).indices


def hardest(found: Tensor, train: Source, held_out: Source) -> list[int]:
    """Return one held-out image of each of several classes, those with the most wrong neighbors."""
    truth = torch.from_numpy(labels(held_out))
    wrong = (torch.from_numpy(labels(train))[found] != truth[:, None]).sum(dim=1)
    order = wrong.argsort(descending=True, stable=True).tolist()
    by_class: dict[int, int] = {}
    for row in order:
        by_class.setdefault(int(truth[row]), row)
    return list(by_class.values())[:QUERIES]


def cells(row: int, found: dict[str, Tensor], train: Source, held_out: Source) -> list[tuple[Source | None, int]]:
    """Return the images of a line, with gaps (None): the query, and its neighbors in both spaces."""
    pixel, learned = ([(train, int(i)) for i in each[row]] for each in found.values())
    return [(held_out, row), (None, 0), *pixel, (None, 0), *learned]


if __name__ == "__main__":
    main()
