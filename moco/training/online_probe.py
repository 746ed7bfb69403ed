"""A linear classifier of the encoder's features, trained together with the encoder; no gradient reaches the encoder.

The classifier needs no further forward pass: in each step a hook keeps the backbone's features of the training images.
The features are standardized as by BN without weight and bias: in training with their mean and variance over the global
batch, in evaluation with running averages of this mean and variance. So one learning rate of Adam suits all backbones.

Legend: n local batch, D features, V views that the encoder sees, M images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.distributed import mean_over_ranks

LEARNING_RATE = 0.05  # times 1 / sqrt(D)
MOMENTUM = 0.1  # of the running averages, as in BN
EPSILON = 1e-5  # added to the variance


class OnlineProbe:
    """A linear classifier on detached features, with its optimizer.

    Args:
        backbone: of the encoder, images to features (N, D), with the attribute `num_features` = D.
        labels: the class of each training image, (images,), negative if unlabeled: the loss ignores such an image.
        classes: the number of classes.
        device: the device of the classifier, which must support float64.
    """

    def __init__(self, backbone: nn.Module, labels: NDArray[np.int64], classes: int, device: torch.device) -> None:
        self._labels = torch.from_numpy(labels).to(device)
        features: Any = backbone.num_features
        self.classifier = nn.Linear(features, classes, device=device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self._optimizer = torch.optim.Adam(self.classifier.parameters(), LEARNING_RATE / features**0.5)
        self._average = torch.zeros(2, features, dtype=torch.float64, device=device)  # mean and variance
        self._steps = 0
        self._seen: list[Tensor] = []  # the features of each forward pass of this step
        backbone.register_forward_hook(self._keep)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self._seen.append(features.detach())

    def discard(self) -> None:
        """Forget the features of a step that failed."""
        self._seen = []

    def step(self, index: Tensor, accumulate: int) -> dict[str, Tensor]:
        """Update the classifier with the features of a step, of all its images on all processes. Collective.

        Args:
            index: the image indices of the local batch, (n,).
            accumulate: number of micro-batches.

        Returns:
            "probe_loss" and "probe_accuracy" (0 ... 1) before the update, shape ().
        """
        seen, self._seen = self._seen, []
        images = _image_indices(seen, index.to(self._labels.device).chunk(accumulate))  # (V n,)
        labels = self._labels[images].clamp(min=-1)
        x = torch.cat(seen).to(labels.device).double()  # (V n, D)
        mean, square = mean_over_ranks(torch.stack([x.mean(dim=0), x.square().mean(dim=0)]))
        now = torch.stack([mean, (square - mean.square()).clamp(min=0)])
        self._average.lerp_(now, max(MOMENTUM, 1 / (1 + self._steps)))
        self._steps += 1
        logits = self.classifier(_standardized(x, now))  # (V n, classes)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        gradients = torch.autograd.grad(loss, list(self.classifier.parameters()))
        correct = (logits.argmax(dim=1) == labels).sum()
        # The mean over the known labels of all ranks, which may have different numbers of them.
        sums = [*gradients, loss.detach(), correct, (labels >= 0).sum()]
        total = mean_over_ranks(torch.cat([each.flatten().to(torch.float32) for each in sums]))
        *parts, count = total.split([each.numel() for each in sums])
        parts = [each / count.clamp(min=torch.finfo(torch.float32).tiny) for each in parts]
        for parameter, part in zip(self.classifier.parameters(), parts, strict=False):
            parameter.grad = part.view_as(parameter)
        self._optimizer.step()
        return {"probe_loss": parts[-2][0].to(index.device), "probe_accuracy": parts[-1][0].to(index.device)}

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: NDArray[np.int64]) -> float:
        """Return the accuracy on features (M, D) with known labels (M,), in percent."""
        device = self.classifier.weight.device
        found = self.classifier(_standardized(features.to(device).double(), self._average)).argmax(dim=1)
        return 100 * float((found == torch.from_numpy(labels).to(device)).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.classifier.load_state_dict(state["classifier"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.copy_(state["average"])
        self._steps = int(state["steps"])


def _image_indices(seen: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the image index of each row of the features, in the order of the forward passes.

    `seen` holds the features of each forward pass, and `parts` the image indices of each micro-batch. The passes of one
    micro-batch follow each other. A pass contains the images of its micro-batch once, or once per view.
    """
    passes = len(seen) // len(parts)  # per micro-batch
    each = [parts[number // passes].repeat(len(x) // len(parts[0])) for number, x in enumerate(seen)]
    return torch.cat(each)


def _standardized(features: Tensor, statistics: Tensor) -> Tensor:
    """Standardize features (M, D) with their mean and variance (2, D), all float64; returns float32."""
    mean, variance = statistics
    standardized: Tensor = (features - mean) * (variance + EPSILON).rsqrt()
    return standardized.float()
