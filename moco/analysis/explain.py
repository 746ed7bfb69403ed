"""What the temperature does to one query: numbers for a figure.

Legend: K negatives, B temperatures.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Explained(NamedTuple):
    """The loss of one query as a function of the temperature, float64; B temperatures, K + 1 candidates."""

    softmax: Tensor  # (B, 1 + K)
    loss: Tensor  # (B,), -log of the answer's softmax
    gradient: Tensor  # (B, 1 + K), by the similarities: below 0 for the answer; a row's sum is 0


THREE = (0.8, 0.5, 0.1)  # similarities to explain with: answer 0 is right, answer 1 wrong


@torch.no_grad()
def explain_temperature(similarity: Tensor, answer: int, temperatures: Tensor) -> Explained:
    """Softmax, loss and gradient of a few candidates at many temperatures: the numbers of an explaining figure.

        grid = torch.logspace(-2, 0, 100)
        right, wrong = (explain_temperature(torch.tensor(THREE), answer, grid) for answer in (0, 1))

    When the answer is right a low T ends the lesson early: loss and gradient vanish. When it is wrong a low T makes
    both large, and the hardest candidate gets all of the push.

    Args:
        similarity: of the candidates, shape (1 + K,); three of them make a readable figure.
        answer: which one is the positive.
        temperatures: above 0, shape (B,).

    Raises:
        ValueError: for an answer that is none of the candidates, or a temperature of 0 or less.
    """
    if similarity.ndim != 1 or not 0 <= answer < len(similarity):
        raise ValueError(f"answer={answer} must be one of the candidates 0 ... {similarity.numel() - 1}")
    if not bool((temperatures > 0).all()):
        raise ValueError(f"temperatures from {temperatures.min().item():g} on: all must be above 0")
    t = temperatures.double()[:, None]  # (B, 1)
    log_p = (similarity.double() / t).log_softmax(dim=1)  # (B, 1+K)
    softmax = log_p.exp()
    target = torch.zeros_like(softmax)
    target[:, answer] = 1
    return Explained(softmax, -log_p[:, answer], (softmax - target) / t)
