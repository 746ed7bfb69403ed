"""What is evaluated while training."""

from typing import Any

import numpy as np
import torch

from moco.config import TrainConfig
from moco.data.arrays import ArraySource
from moco.data.base import Sources
from moco.data.plan import Plan
from moco.training.live_evaluation import LiveEvaluation


def test_held_out_images_that_are_reference_images_are_counted() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    every = ArraySource(images, list("abcdef"), np.array([0, 1, 0, 1, 0, 1]), ("x", "y"))
    train, method, beats = every.subset(np.array([0, 1, 2, 3])), None, []
    parts: Any = (torch.device("cpu"), Plan(4, 2, 1, 0), [], lambda: beats.append(1))
    for rows, lines in (([3, 4, 0], 1), ([4, 5], 0)):
        sources = Sources(train, train, every.subset(np.array(rows)))
        found = LiveEvaluation(TrainConfig(), method, sources, *parts).count_copies()  # type: ignore[arg-type]
        assert len(found) == lines
        assert all(line.startswith("2 of the 3 held-out images are byte-identical to training") for line in found)
    assert beats
    few = LiveEvaluation(TrainConfig(), method, Sources(train, train, every), *parts)  # type: ignore[arg-type]
    assert (
        few.title == "held-out kNN (k 4), standard error up to 20.4 points"
    )  # all four references vote, not evaluate.k=200
    unlabeled = LiveEvaluation(TrainConfig(), method, Sources(train), *parts)  # type: ignore[arg-type]
    assert unlabeled.count_copies() == []
    assert unlabeled.title.startswith("two crops of an image find each other among 4 images")
