"""Multinomial logistic regression with an L2 penalty, whose strength is chosen on validation samples.

    Kornblith, Shlens & Le, "Do better ImageNet models transfer better?", CVPR 2019, appendix A.2

The objective is that of scikit-learn's LogisticRegression with C = 1 / strength: the sum of the cross entropies plus
strength / 2 times the squared weights; the bias has no penalty. torch's L-BFGS minimizes the objective in float64, from
the strongest penalty to the weakest. Each fit starts from the solution of the previous fit. All ranks compute the same
result.

Legend: N training samples, M other samples, D feature dimension, L classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.data.base import Progress

STRENGTHS = tuple(float(each) for each in np.logspace(5, -6, 45))  # the protocol's, the strongest first
# The most L-BFGS steps of a fit. While a strength is chosen, fewer suffice: each fit starts from the previous solution.
_STEPS, _STEPS_TO_CHOOSE = 1000, 100
_TOLERANCE = 1e-6  # of the largest component of the gradient of the mean loss, for features of mean square 1

Score = Callable[[Tensor], float]  # class scores (M, L) of the validation samples -> a number, the higher the better


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier, float64."""

    weight: Tensor  # (L, D)
    bias: Tensor  # (L,)

    def __call__(self, features: Tensor) -> Tensor:
        """Return the class scores, (M, D) -> (M, L)."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class Choice:
    """The chosen strength, and the validation score of each strength."""

    strength: float
    scores: tuple[float, ...]  # in the order of the strengths


def fit_path(
    features: Tensor,
    labels: NDArray[np.int64],
    classes: int,
    strengths: Sequence[float],
    start: Classifier | None = None,
    steps: int = _STEPS,
) -> Iterator[Classifier]:
    """Yield the classifier of each strength; the first starts from `start`, or from zero.

    Args:
        features: (N, D), on the device of the computation.
        labels: (N,).
        classes: L.
        strengths: from the strongest to the weakest.
        start: the classifier from which the first strength starts, fitted to similar samples.
        steps: the most steps of L-BFGS for each strength.
    """
    # A shift leaves the solution unchanged, because the bias has no penalty. So does one scale for all features,
    # because the penalty is divided by the square of the scale. Both let L-BFGS converge in far fewer steps.
    x = features.double()
    shift = x.mean(dim=0)  # (D,)
    x = x - shift
    scale = x.square().mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    x = x / scale  # (N, D)
    truth = torch.from_numpy(labels).to(x.device)
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if start is not None:
        weight, bias = start.weight * scale, start.bias + start.weight @ shift
    for strength in strengths:
        weight, bias = _minimize(x, truth, strength / scale.square() / len(x), (weight, bias), steps)
        original = weight / scale
        yield Classifier(original, bias - original @ shift)


def _minimize(
    x: Tensor, truth: Tensor, penalty: Tensor, start: tuple[Tensor, Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """Minimize the mean cross entropy plus penalty / 2 times the squared weights, from the given weight and bias."""
    weight, bias = (each.clone().requires_grad_() for each in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), truth) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def choose_and_fit(
    parts: tuple[tuple[Tensor, NDArray[np.int64]], tuple[Tensor, NDArray[np.int64]]],
    classes: int,
    score: Score,
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress = lambda *_: None,
) -> tuple[Classifier, Choice]:
    """Choose the strength that scores best on the validation samples, then fit all samples with it.

    Of several strengths with the same score, the strongest is chosen.

    Args:
        parts: features (N, D) and labels (N,) of the training samples, and of the validation samples.
        classes: L.
        score: rates the class scores of the validation samples.
        strengths: from the strongest to the weakest.
        progress: called with (fits done, number of fits).

    Returns:
        The classifier fitted to all samples, and the choice of its strength.
    """
    (features, labels), (held, held_labels) = parts
    scores: list[float] = []
    best: Classifier | None = None
    for fitted in fit_path(features, labels, classes, strengths, steps=_STEPS_TO_CHOOSE):
        scores.append(score(fitted(held)))
        if scores[-1] > max(scores[:-1], default=-np.inf):
            best = fitted
        progress(len(scores), len(strengths) + 1)
    assert best is not None
    strength = strengths[int(np.argmax(scores))]
    everything = torch.cat([features, held]), np.concatenate([labels, held_labels])
    (final,) = fit_path(*everything, classes, [strength], best)
    progress(len(strengths) + 1, len(strengths) + 1)
    return final, Choice(strength, tuple(scores))
