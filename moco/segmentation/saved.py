"""A trained segmentation network as a file, and the classes of the pixels of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moco.data.decode import decode
from moco.interop.encoder_file import EncoderFile
from moco.interop.network_file import load_network, save_network
from moco.segmentation.crop import normalized
from moco.segmentation.network import build_network


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A segmentation network in eval mode, the names of its classes 0, 1, ..., and the normalization of its images."""

    network: nn.Module
    classes: tuple[str, ...]
    mean: Sequence[float]
    std: Sequence[float]

    @torch.no_grad()
    def find(self, path: str | Path) -> NDArray[np.int64]:
        """Return the class of each pixel of an image file, (H, W).

        Raises:
            ImageError: if the file cannot be read.
        """
        first = next(self.network.parameters())
        image = normalized(decode(path), self.mean, self.std)[None].to(first.device, first.dtype)
        classes: NDArray[np.int64] = self.network(image).argmax(dim=1)[0].cpu().numpy()
        return classes


def save_segmenter(path: Path, segmenter: Segmenter, head: str, backbone: str, options: Mapping[str, object]) -> None:
    """Write a segmentation network to a safetensors file that describes itself."""
    normalization = {"mean": list(segmenter.mean), "std": list(segmenter.std)}
    about = {"classes": segmenter.classes, "head": head} | normalization
    save_network(path, segmenter.network, backbone, options, about)


def load_segmenter(path: str | Path) -> Segmenter:
    """Read a network.safetensors of moco.segment, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: if the file does not exist.
        ForeignFileError: if the file is damaged, or is not a network of moco.segment.
    """

    def build(encoder: EncoderFile, about: dict[str, Any]) -> nn.Module:
        normalized(torch.zeros(3, 1, 1), about["mean"], about["std"])  # refuse values of a damaged file
        head, classes = about["head"], len(about["classes"])
        return build_network(encoder, head, classes, seed=0, untrained=True, frozen=False, bn="sync")

    network, about = load_network(path, "network of moco.segment", ("classes", "head", "mean", "std"), build)
    return Segmenter(network, tuple(map(str, about["classes"])), about["mean"], about["std"])
