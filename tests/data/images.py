"""Files and folders of images, and a small encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco.data.base import Source
from moco.interop.encoder_file import save_encoder
from moco.models.backbones import build_backbone

CONFIG: dict[str, Any] = {
    "model": {"backbone": "convnet", "options": {"width": 4, "pool": 2}},
    "augment": {"size": 16, "eval_resize": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def encoder(path: Path, seed: int = 0) -> Path:
    """Write an untrained encoder to a file."""
    torch.manual_seed(seed)
    save_encoder(path, build_backbone("convnet", CONFIG["model"]["options"]), CONFIG, step=3)
    return path


def gradient(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    """Make an image similar to a photograph: a smooth gradient between four random corner colors."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def write_image(path: Path, color: int | tuple[int, int, int] = 0, size: tuple[int, int] = (6, 5)) -> None:
    """Write an image of one color, in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(path.suffix.lower())
    Image.new("RGB", size, (color,) * 3 if isinstance(color, int) else color).save(path, kind)


def folder(root: Path, count: int = 11) -> Path:
    """Write the gradients 00.png, 01.png, ..."""
    root.mkdir(parents=True)
    for i in range(count):
        gradient(i).save(root / f"{i:02}.png")
    return root


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]
