"""Many linear heads on fixed features, trained together; a validation part of the training split selects the best.

No function that chooses receives test data. Heads do not interact: each equals the same head trained separately.

Legend: M samples, B batch, D feature dimension of a layer, L classes, H heads (learning rates x weight decays).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import OptimConfig
from moco.data.base import Progress
from moco.data.keyed import VALIDATION
from moco.data.plan import Plan
from moco.distributed import rank, sum_over_ranks, world_size
from moco.evaluation.average_precision import average_precision
from moco.evaluation.subsets import split_each_class
from moco.optim.schedules import lr_factor

_CHUNK = 4096  # rows at once when all rows are processed; bounds memory, changes no result


@dataclass(frozen=True, eq=False)
class LabeledFeatures:
    """Features of the training split, of one layer or several."""

    features: Tensor  # (M, sum of D), on any device, or mapped from a file
    columns: Mapping[str, slice]  # the columns of each layer
    labels: NDArray[np.int64] | NDArray[np.bool_]  # (M,), or (M, L) if images can have several labels
    classes: int  # L
    device: torch.device  # of the computation
    groups: NDArray[np.int64] | None = None  # (M,); samples of one group are on one side of a split

    def rows(self, layer: str, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and labels (B,) or (B, L) of some rows on the device; reads only these from a file."""
        picked = self.features[torch.from_numpy(rows).to(self.features.device)]
        return picked[:, self.columns[layer]].to(self.device), torch.from_numpy(self.labels[rows]).to(self.device)

    def chunks(self, layer: str, rows: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and labels as `rows` does, at most `_CHUNK` rows at a time."""
        for start in range(0, len(rows), _CHUNK):
            yield self.rows(layer, rows[start : start + _CHUNK])


@dataclass(frozen=True)
class Setting:
    """The layer and the hyperparameters of one head."""

    layer: str
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Choice:
    """The best setting on the validation part, and the accuracy (or mAP, percent) of each setting there."""

    setting: Setting
    accuracy: float
    count: int  # of validation samples
    tried: list[tuple[Setting, float]]


@dataclass(frozen=True)
class Recipe:
    """The training of heads: SGD with momentum and a cosine learning rate, starting from zero weights."""

    epochs: int
    batch_size: int
    momentum: float
    normalize: str  # standard, l2 or none
    seed: int


@dataclass(frozen=True, eq=False)
class Scaling:
    """The scaling of features before a head: unit length, or (x - shift) / spread."""

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
        """Compute all heads' scores in one matrix product: (B, D) -> (B, H, L)."""
        heads, classes, _ = self.weight.shape
        flat = torch.addmm(self.bias.flatten(), scaled, self.weight.flatten(0, 1).T)
        return flat.view(len(scaled), heads, classes)


def scaling_of(data: LabeledFeatures, layer: str, rows: NDArray[np.int64], normalize: str) -> Scaling:
    """Compute the scaling from the given training rows; a constant dimension is only shifted."""
    columns = data.columns[layer]
    zero = torch.zeros(columns.stop - columns.start, device=data.device)
    if normalize != "standard":
        return Scaling(normalize == "l2", zero, torch.ones_like(zero))

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        sums = (function(x.double()).sum(dim=0) for x, _ in data.chunks(layer, rows))
        return sum(sums, start=zero.double()) / len(rows)

    mean = mean_of(lambda x: x)
    spread = mean_of(lambda x: (x - mean).square()).sqrt()
    varies = spread > 1e-6 * spread.max()
    return Scaling(False, mean.float(), torch.where(varies, spread, torch.ones_like(spread)).float())


def train_heads(
    data: LabeledFeatures,
    layer: str,
    rows: NDArray[np.int64],
    scaling: Scaling,
    grid: Sequence[tuple[float, float]],
    recipe: Recipe,
    progress: Progress = lambda *_: None,
) -> Heads:
    """Train one head per (learning rate, weight decay) of the grid on the given rows, all on the same batches.

    The loss of images with one class is the cross entropy; of images with several labels it is the sum over classes of
    the binary cross entropy, so that each class is a logistic regression of its own.
    Weight decay is that of torch.optim.SGD and applies to weights only, as in scikit-learn's LogisticRegression, whose
    C is 1 / (weight decay x samples).
    """
    plan = Plan(len(rows), min(recipe.batch_size, len(rows)), recipe.epochs, recipe.seed)
    lr, decay = torch.tensor(grid, device=data.device).T[:, :, None, None]  # (H, 1, 1) each
    weight = torch.zeros(len(grid), data.classes, len(scaling.shift), device=data.device)
    heads = Heads(weight, torch.zeros(len(grid), data.classes, device=data.device))
    velocity, bias_velocity = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    for step, (epoch, picked) in enumerate(plan.samples(0)):
        x, labels = data.rows(layer, rows[picked])
        x = scaling(x)  # (B, D)
        multi_label, scores = labels.ndim == 2, heads.scores(x)
        truth = (labels if multi_label else F.one_hot(labels, data.classes)).unsqueeze(1).long()  # (B, 1, L)
        # (B, H, L), the gradient of the mean loss with respect to the scores
        slope = ((scores.sigmoid() if multi_label else scores.softmax(dim=2)) - truth) / len(x)
        gradient = (slope.flatten(1).T @ x).view_as(heads.weight)  # (H, L, D)
        factor = lr_factor(step, plan.steps_per_epoch, plan.epochs, OptimConfig(schedule="cosine"))
        velocity.mul_(recipe.momentum).add_(gradient + decay * heads.weight)
        bias_velocity.mul_(recipe.momentum).add_(slope.sum(dim=0))
        heads.weight.sub_(factor * lr * velocity)
        heads.bias.sub_(factor * lr[:, :, 0] * bias_velocity)
        if (step + 1) % plan.steps_per_epoch == 0:
            progress(epoch + 1, plan.epochs)
    return heads


def choose(
    data: LabeledFeatures,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    part: float,
    recipe: Recipe,
    progress: Progress = lambda *_: None,
) -> Choice:
    """Train all heads on the training split without its validation part, and take the best head on that part.

    Each rank trains its share of a layer's heads. Among equal results the first layer wins, then the smaller
    learning rate, then the larger weight decay. A head with non-finite weights counts as 0 %.

    Args:
        data: the training split; the choice is among its layers.
        lrs, weight_decays: the grid.
        part: fraction of each class for validation.
        recipe: the training of each head.
        progress: counts the epochs of all layers.

    Raises:
        SubsetError: if no class can be split, see `split_each_class`.
    """
    train, held = split_each_class(data.labels, part, recipe.seed, VALIDATION, data.groups)
    grid = sorted(set(product(lrs, weight_decays)), key=lambda pair: (pair[0], -pair[1]))
    own_heads = range(rank(), len(grid), world_size())
    tried: list[tuple[Setting, float]] = []
    for number, layer in enumerate(data.columns):

        def layer_progress(done: int, epochs: int, number: int = number) -> None:
            progress(number * epochs + done, len(data.columns) * epochs)

        scores = torch.zeros(len(grid), dtype=torch.float64, device=data.device)
        if own_heads:
            scaling = scaling_of(data, layer, train, recipe.normalize)
            heads = train_heads(data, layer, train, scaling, [grid[i] for i in own_heads], recipe, layer_progress)
            if data.labels.ndim == 2:
                scores[list(own_heads)] = _mean_average_precisions(heads, data, layer, (train, held), scaling)
            else:
                scores[list(own_heads)] = _accuracies(heads, data, layer, held, scaling)
        settings = [Setting(layer, *pair) for pair in grid]
        tried += zip(settings, sum_over_ranks(scores).tolist(), strict=True)
    best = max(tried, key=lambda each: each[1])  # the first of equal results
    return Choice(best[0], best[1], len(held), tried)


def retrain(data: LabeledFeatures, setting: Setting, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Train one head with the chosen setting on all rows; every rank gets the same head.

    Returns:
        Weight (L, D) and bias (L,) with the scaling folded in: scores are features @ weight.T + bias, for features of
        unit length if `recipe.normalize` is l2.
    """
    rows = np.arange(len(data.labels))
    scaling = scaling_of(data, setting.layer, rows, recipe.normalize)
    heads = train_heads(data, setting.layer, rows, scaling, [(setting.lr, setting.weight_decay)], recipe)
    weight = heads.weight[0] / scaling.spread
    return weight, heads.bias[0] - weight @ scaling.shift


@torch.no_grad()
def _accuracies(heads: Heads, data: LabeledFeatures, layer: str, rows: NDArray[np.int64], scaling: Scaling) -> Tensor:
    """Compute each head's accuracy in percent, (H,), on the given rows."""
    correct = torch.zeros(len(heads.weight), dtype=torch.float64, device=data.device)
    for x, labels in data.chunks(layer, rows):
        correct += (heads.scores(scaling(x)).argmax(dim=2) == labels.unsqueeze(1)).sum(dim=0)
    return torch.where(_finite(heads), 100 * correct / len(rows), 0.0)


@torch.no_grad()
def _mean_average_precisions(
    heads: Heads,
    data: LabeledFeatures,
    layer: str,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    scaling: Scaling,
) -> Tensor:
    """Compute each head's mAP in percent, (H,), on the second of the given (training, validation) rows."""
    labels = np.asarray(data.labels, np.bool_)
    scores = torch.cat([heads.scores(scaling(x)).cpu() for x, _ in data.chunks(layer, rows[1])])  # (rows, H, L)
    found = [
        average_precision(scores[:, head], labels[rows[1]], labels[rows[0]]).mean if finite else 0.0
        for head, finite in enumerate(_finite(heads).tolist())
    ]
    return torch.tensor(found, dtype=torch.float64, device=data.device)


def _finite(heads: Heads) -> Tensor:
    """Return which heads, (H,), have finite weights."""
    return heads.weight.isfinite().all(dim=2).all(dim=1) & heads.bias.isfinite().all(dim=1)
