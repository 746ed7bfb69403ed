"""A trained detector as a file, and the objects that it finds in an image."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco.data.decode import decode
from moco.detection.network import DetectorSettings, build_detector
from moco.detection.training import Detections, detections_in
from moco.detection.views import ViewSettings, resized
from moco.interop.encoder_file import EncoderFile
from moco.interop.network_file import load_network, save_network


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector in eval mode, the names of its classes (numbered from 1), and the preparation of its images."""

    network: nn.Module
    classes: tuple[str, ...]
    views: ViewSettings

    @torch.no_grad()
    def find(self, path: str | Path) -> Detections:
        """Return the objects in an image file, by descending score.

        Raises:
            ImageError: if the file cannot be read.
        """
        pixels = decode(path)
        first = next(self.network.parameters())
        image = resized(pixels, self.views.eval_size, self.views)
        (found,) = self.network([image.to(first.device, first.dtype)])
        return detections_in(found, image, pixels.shape[2], pixels.shape[1])


def save_detector(
    path: Path, detector: Detector, form: DetectorSettings, backbone: str, options: Mapping[str, object]
) -> None:
    """Write a detector to a safetensors file that describes itself."""
    about = {"classes": detector.classes, "views": asdict(detector.views), "form": asdict(form)}
    save_network(path, detector.network, backbone, options, about)


def load_detector(path: str | Path) -> Detector:
    """Read a detector.safetensors of moco.detect, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: if the file does not exist.
        ForeignFileError: if the file is damaged, or is not a detector of moco.detect.
    """

    def build(encoder: EncoderFile, about: dict[str, Any]) -> nn.Module:
        ViewSettings(**about["views"])  # refuse unknown fields
        return build_detector(encoder, DetectorSettings(**about["form"]), len(about["classes"]), seed=0, untrained=True)

    network, about = load_network(path, "detector of moco.detect", ("classes", "views", "form"), build)
    return Detector(network, tuple(map(str, about["classes"])), ViewSettings(**about["views"]))
