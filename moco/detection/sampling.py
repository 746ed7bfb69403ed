"""The loss of a detector on the global batch, so that W processes train as one.

torchvision's R-CNNs draw the anchors and proposals for the loss at random, and divide each loss by the number drawn in
the batch of one process. Here the draw for an image depends only on its key, a number computed from (seed, epoch,
sample index), and each loss is divided by the number drawn in the global batch.

Legend: W processes, a anchors or proposals of an image.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moco.distributed import sum_over_ranks, world_size
from moco.models.norm import untracked


class KeyedSampler:
    """Takes the place of torchvision's BalancedPositiveNegativeSampler.

    Args:
        number: how many anchors or proposals to draw per image; if an image has fewer, all of them are drawn.
        positive: the largest fraction of `number` that may be positive.
    """

    def __init__(self, number: int, positive: float) -> None:
        self.number, self.positive = number, positive
        self.keys: Sequence[int] = ()  # the keys of the images of the next call
        self.drawn, self.drawn_positive = 0, 0  # how many were drawn in the last call: in total, and positives

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw anchors or proposals of each image.

        Args:
            labels: for each image, (a,): above 0 positive, 0 negative, below 0 not to be drawn.

        Returns:
            Two lists with one mask (a,) per image. 1 marks the drawn positives in the first list, and the drawn
            negatives in the second.
        """
        found: tuple[list[Tensor], list[Tensor]] = [], []
        self.drawn = self.drawn_positive = 0
        for key, each in zip(self.keys, labels, strict=True):
            generator = torch.Generator().manual_seed(key)  # on the CPU: the same choice on every device
            positives, negatives = torch.where(each > 0)[0], torch.where(each == 0)[0]
            count = min(len(positives), int(self.number * self.positive))
            for number, candidates, masks in (
                (count, positives, found[0]),
                (min(len(negatives), self.number - count), negatives, found[1]),
            ):
                order = torch.randperm(len(candidates), generator=generator)[:number].to(each.device)
                masks.append(torch.zeros_like(each, dtype=torch.uint8).index_fill_(0, candidates[order], 1))
                self.drawn += number
            self.drawn_positive += count
        return found


class SharedStage(nn.Module):
    """The mask branch of a C4 detector: the stage of the box branch, with the same weights, without pooling.

    In training, the stage runs a second time, on the positive proposals. Only the box branch updates the running
    statistics of BN.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple, so that the state dict holds its weights only once

    def forward(self, maps: Tensor) -> Tensor:
        with untracked(self._stage[0], backward=True):
            return cast(Tensor, self._stage[0](maps))


class DetectorLoss(nn.Module):
    """The sum of a detector's losses; its mean over ranks is the loss of the global batch.

    Args:
        network: the detector.
        anchor_samples, box_samples: how many anchors and proposals an R-CNN draws per image.
    """

    def __init__(self, network: nn.Module, anchor_samples: int, box_samples: int) -> None:
        super().__init__()
        self.network = network
        rcnn = hasattr(network, "rpn")
        self._samplers = [KeyedSampler(anchor_samples, 0.5), KeyedSampler(box_samples, 0.25)] if rcnn else []
        for part, sampler in zip((network.rpn, network.roi_heads) if rcnn else (), self._samplers, strict=True):
            cast(Any, part).fg_bg_sampler = sampler

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], keys: list[tuple[int, ...]]) -> Tensor:
        """Return this rank's loss.

        Args:
            images: normalized (3, H, W), of any sizes.
            targets: boxes, labels and masks of each image, as torchvision takes them.
            keys: for each image, one number per sampler.
        """
        for number, sampler in enumerate(self._samplers):
            sampler.keys = [each[number] for each in keys]
        losses: dict[str, Tensor] = self.network(images, targets)
        if not self._samplers:  # RetinaNet's losses are means over the images, of which each rank has the same number
            return torch.stack(list(losses.values())).sum()
        anchors, boxes = self._samplers
        counts = torch.tensor([anchors.drawn, boxes.drawn, boxes.drawn_positive], dtype=torch.float64)
        counts = counts.to(images[0].device, torch.promote_types(images[0].dtype, torch.float32))
        shares = counts * world_size() / sum_over_ranks(counts).clamp(min=1)
        place = {"loss_objectness": 0, "loss_rpn_box_reg": 0, "loss_classifier": 1, "loss_box_reg": 1, "loss_mask": 2}
        return torch.stack([loss * shares[place[name]] for name, loss in losses.items()]).sum()
