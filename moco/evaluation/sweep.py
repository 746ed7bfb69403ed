"""Many linear heads on fixed features, trained at once; a validation part of the training split names the best.

No function here that chooses takes test data. Heads do not touch each other: each is what it would be alone.

Legend: M samples, B batch, D dimension, L classes, H heads (learning rates x weight decays).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import OptimConfig
from moco.data.keyed import VALIDATION, permutation
from moco.data.plan import Plan
from moco.distributed import rank, sum_over_ranks, world_size
from moco.optim.schedules import lr_factor

Columns = Mapping[str, slice]  # of each layer within features (M, D)
Progress = Callable[[int, int], None]

_CHUNK = 4096  # rows at once where all of a split is passed through; bounds memory, changes no result


@dataclass(frozen=True)
class Setting:
    """What a head is trained with."""

    layer: str
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Choice:
    """The best setting on the validation part, and what each setting reached there (percent)."""

    setting: Setting
    accuracy: float
    count: int  # of the validation part
    tried: list[tuple[Setting, float]]


@dataclass(frozen=True)
class Recipe:
    """How heads are trained: SGD with momentum from zero weights, the learning rate along half a cosine."""

    epochs: int
    batch_size: int
    momentum: float
    normalize: str  # standard, l2 or none
    seed: int


@dataclass(frozen=True, eq=False)
class Scaling:
    """What happens to a feature before the head: nothing, unit length, or (x - shift) / spread."""

    unit: bool
    shift: Tensor  # (D,)
    spread: Tensor  # (D,)

    def __call__(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.unit else (features - self.shift) / self.spread


@dataclass(frozen=True, eq=False)
class Heads:
    """H linear heads on scaled features."""

    weight: Tensor  # (H, L, D)
    bias: Tensor  # (H, L)

    def scores(self, scaled: Tensor) -> Tensor:
        """(B, D) -> (B, H, L): one matrix product for all heads."""
        heads, classes, _ = self.weight.shape
        flat = torch.addmm(self.bias.flatten(), scaled, self.weight.flatten(0, 1).T)
        return flat.view(len(scaled), heads, classes)


def validation_rows(labels: NDArray[np.int64], part: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows to choose on, sorted: the same part of each class, at least one sample, never all.

    Raises:
        ValueError: if a class has one sample only.
    """
    order = permutation(seed, 0, len(labels), VALIDATION)
    chosen = []
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        if len(of_class) < 2:
            raise ValueError(
                f"class number {label} has one training picture only, and a choice needs two: one to learn from, one "
                "to choose by"
            )
        chosen.append(of_class[: min(len(of_class) - 1, max(1, round(part * len(of_class))))])
    held = np.sort(np.concatenate(chosen))
    return np.setdiff1d(order, held), held


def scaling_of(
    features: Tensor, columns: slice, rows: NDArray[np.int64], normalize: str, device: torch.device
) -> Scaling:
    """Mean and standard deviation of the given training rows; a dimension that does not vary is only shifted."""
    width = columns.stop - columns.start
    zero, one = torch.zeros(width, device=device), torch.ones(width, device=device)
    if normalize != "standard":
        return Scaling(normalize == "l2", zero, one)

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(width, dtype=torch.float64, device=device)
        for start in range(0, len(rows), _CHUNK):
            total += function(_take(features, rows[start : start + _CHUNK], columns, device).double()).sum(dim=0)
        return total / len(rows)

    mean = mean_of(lambda part: part)
    spread = mean_of(lambda part: (part - mean).square()).sqrt()
    varies = spread > 1e-6 * spread.max()
    return Scaling(False, mean.float(), torch.where(varies, spread, torch.ones_like(spread)).float())


def train_heads(
    features: Tensor,
    columns: slice,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    scaling: Scaling,
    classes: int,
    grid: Sequence[tuple[float, float]],
    recipe: Recipe,
    device: torch.device,
    progress: Progress | None = None,
) -> Heads:
    """Trains one head for each (learning rate, weight decay) of the grid, all on the same batches.

    Weight decay is that of torch.optim.SGD and of the weights alone; a bias is not decayed, as in scikit-learn's
    LogisticRegression, whose C is 1 / (weight decay x samples).

    Args:
        features: of all layers, (M, sum of D), on any device or a view of a file.
        columns: those of this layer.
        labels: (M,).
        rows: which samples to train on.
        scaling: of the features.
        classes: L.
        grid: H pairs.
        recipe: how.
        device: where to compute.
        progress: called with (epochs done, epochs).
    """
    plan = Plan(len(rows), min(recipe.batch_size, len(rows)), recipe.epochs, recipe.seed)
    lr = torch.tensor([each[0] for each in grid], device=device).view(-1, 1, 1)  # (H, 1, 1)
    decay = torch.tensor([each[1] for each in grid], device=device).view(-1, 1, 1)
    width = columns.stop - columns.start
    heads = Heads(torch.zeros(len(grid), classes, width, device=device), torch.zeros(len(grid), classes, device=device))
    speed, bias_speed = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    for step, (epoch, picked) in enumerate(plan.samples(0)):
        x = scaling(_take(features, rows[picked], columns, device))  # (B, D)
        truth = F.one_hot(torch.from_numpy(labels[rows[picked]]).to(device), classes).unsqueeze(1)  # (B, 1, L)
        slope = (heads.scores(x).softmax(dim=2) - truth) / len(x)  # (B, H, L): of the mean cross entropy
        gradient = (slope.flatten(1).T @ x).view_as(heads.weight)  # (H, L, D)
        factor = lr_factor(step, plan.steps_per_epoch, plan.epochs, OptimConfig(schedule="cosine"))
        speed.mul_(recipe.momentum).add_(gradient + decay * heads.weight)
        bias_speed.mul_(recipe.momentum).add_(slope.sum(dim=0))
        heads.weight.sub_(factor * lr * speed)
        heads.bias.sub_(factor * lr[:, :, 0] * bias_speed)
        if progress is not None and (step + 1) % plan.steps_per_epoch == 0:
            progress(epoch + 1, plan.epochs)
    return heads


def choose(
    features: Tensor,
    columns: Columns,
    labels: NDArray[np.int64],
    classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    part: float,
    recipe: Recipe,
    device: torch.device,
    progress: Progress | None = None,
) -> Choice:
    """Trains all heads on the training split less its validation part, and takes the best there.

    Each rank trains its share of a layer's heads. Of equal accuracies the layer named first wins, then the smaller
    learning rate, then the larger weight decay. A head whose weights are not finite counts as 0 %.

    Args:
        features: (M, sum of D) of the training split.
        columns: where each layer stands in them; these are the layers to choose from.
        labels: (M,).
        classes: L.
        lrs, weight_decays: the grid.
        part: of each class that validates.
        recipe: how heads are trained.
        device: where.
        progress: called with (epochs done, epochs) over all layers.

    Raises:
        ValueError: see `validation_rows`.
    """
    train, held = validation_rows(labels, part, recipe.seed)
    grid = sorted(set(product(lrs, weight_decays)), key=lambda pair: (pair[0], -pair[1]))
    mine = range(rank(), len(grid), world_size())
    tried: list[tuple[Setting, float]] = []
    for number, (layer, where) in enumerate(columns.items()):

        def shown(done: int, epochs: int, number: int = number) -> None:
            if progress is not None:
                progress(number * epochs + done, len(columns) * epochs)

        scores = torch.zeros(len(grid), dtype=torch.float64, device=device)
        if mine:
            scaling = scaling_of(features, where, train, recipe.normalize, device)
            pairs = [grid[i] for i in mine]
            heads = train_heads(features, where, labels, train, scaling, classes, pairs, recipe, device, shown)
            scores[list(mine)] = _accuracies(heads, features, where, labels, held, scaling, device)
        tried += [
            (Setting(layer, *pair), score) for pair, score in zip(grid, sum_over_ranks(scores).tolist(), strict=True)
        ]
    best = max(tried, key=lambda each: each[1])  # the first of equals
    return Choice(best[0], best[1], len(held), tried)


def retrain(
    features: Tensor,
    columns: Columns,
    labels: NDArray[np.int64],
    classes: int,
    setting: Setting,
    recipe: Recipe,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """One head with the chosen setting on the whole training split, every rank the same.

    Returns:
        Weight (L, D) and bias (L,), the scaling folded in: scores are features @ weight.T + bias (of features of unit
        length where `recipe.normalize` is l2).
    """
    rows, where = np.arange(len(labels)), columns[setting.layer]
    scaling = scaling_of(features, where, rows, recipe.normalize, device)
    pair = (setting.lr, setting.weight_decay)
    heads = train_heads(features, where, labels, rows, scaling, classes, [pair], recipe, device)
    weight = heads.weight[0] / scaling.spread
    return weight, heads.bias[0] - weight @ scaling.shift


@torch.no_grad()
def _accuracies(
    heads: Heads,
    features: Tensor,
    columns: slice,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    scaling: Scaling,
    device: torch.device,
) -> Tensor:
    """Percent, (H,), on the given rows."""
    right = torch.zeros(len(heads.weight), dtype=torch.float64, device=device)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        predicted = heads.scores(scaling(_take(features, part, columns, device))).argmax(dim=2)  # (B, H)
        right += (predicted == torch.from_numpy(labels[part]).to(device).unsqueeze(1)).sum(dim=0)
    finite = heads.weight.isfinite().all(dim=2).all(dim=1) & heads.bias.isfinite().all(dim=1)
    return torch.where(finite, 100 * right / len(rows), 0.0)


def _take(features: Tensor, rows: NDArray[np.int64], columns: slice, device: torch.device) -> Tensor:
    """Some rows of one layer's features on the device; of features in a file only these rows are read."""
    picked = features[torch.from_numpy(rows).to(features.device)]
    return picked[:, columns].to(device)
