"""Compile a network with BN over groups as `compile=true` does for an H200: python -m tests.rehearsal.inductor

The network ends like a ResNet-18 for images of 32 pixels, with a batch of 512. The process must have the environment of
`tests.rehearsal.build` with `null`: the compiler is real, and the GPU is not.
"""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from moco.models.norm import convert_batch_norm
from moco.training.build import distribute, set_batch_norm_calls
from tests.rehearsal.run import configuration

BATCH, GROUP, CHANNELS, SIDE = 512, 64, 256, 8
DEVICE = torch.device("cuda", 0)


class Method(nn.Module):
    """A method with one network."""

    passes = 1

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * CHANNELS
        shortcut = nn.Sequential(nn.Conv2d(CHANNELS, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
        blocks = BasicBlock(CHANNELS, wide, 2, shortcut), BasicBlock(wide, wide)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 128)
        self.encoder = convert_batch_norm(nn.Sequential(*blocks, *head), "grouped", GROUP)


def main() -> None:
    """Compile the forward and the backward pass."""
    method = Method().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_batch_norm_calls(method, 1)
    distribute(configuration("cifar10_notebook", "compile=true"), method, DEVICE)
    images = torch.zeros(BATCH, CHANNELS, SIDE, SIDE, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = method.encoder(images.to(memory_format=torch.channels_last))
    out.float().mean().backward()


if __name__ == "__main__":
    main()
