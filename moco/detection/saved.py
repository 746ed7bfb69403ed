"""A trained detector as a file, and the objects that it finds in an image."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moco.data.decode import decode
from moco.detection.network import DetectorSettings, build_detector
from moco.detection.training import Detections, detections_in
from moco.detection.views import ViewSettings, resized
from moco.files import cause
from moco.interop.encoder_file import EncoderFile, ForeignFileError, load_all
from moco.interop.weights import save_weights
from moco.untrusted import parse_json, refuse_special_file


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector in eval mode, the names of its classes 1, 2, ..., and the preparation of its images."""

    network: nn.Module
    classes: tuple[str, ...]
    views: ViewSettings

    @torch.no_grad()
    def find(self, path: str | Path) -> Detections:
        """Return the objects in an image file, those of the highest score first.

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
    about |= {"backbone": backbone, "options": dict(options)}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    save_weights(path, detector.network.state_dict(), metadata)


def load_detector(path: str | Path) -> Detector:
    """Read a detector.safetensors of moco.detect, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: if the file does not exist.
        ForeignFileError: if the file is damaged, or is not a detector of moco.detect.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        refuse_special_file(file)
        with safe_open(file, "pt") as opened:
            texts = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = {name: parse_json(texts[name]) for name in ("classes", "views", "form", "backbone", "options")}
        form, views = DetectorSettings(**about["form"]), ViewSettings(**about["views"])
        encoder = EncoderFile(str(file), "detector", str(about["backbone"]), dict(about["options"]), {})
        network = build_detector(encoder, form, len(about["classes"]), seed=0, untrained=True)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ForeignFileError(f"{file} cannot be read as a detector of moco.detect ({cause(error)})") from error
    load_all(network, weights, f"{file} does not fit {form.detector}")
    return Detector(network.eval().requires_grad_(False), tuple(map(str, about["classes"])), views)
