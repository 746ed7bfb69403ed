"""Class folders of images, and the same images packed."""

from pathlib import Path
from typing import Any

from moco.config import DataConfig
from moco.config.pack import PackConfig
from moco.pack import pack
from tests.data.unreadable_files import encoded, noise


def class_folders(root: Path, count: int = 12, classes: tuple[str, ...] = ("cat", "dog"), first: int = 0) -> Path:
    """Write JPEGs of several sizes into class folders, with one PNG, and one PNG named .jpg."""
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        image = noise(first + i, height=20 + i, width=40)
        kind = "PNG" if i in (3, 4) else "JPEG"
        (folder / f"{first + i:02}.{'png' if i == 3 else 'jpg'}").write_bytes(encoded(image, kind))
    return root


def packed(output: Path, root: Path, **fields: Any) -> Path:
    """Pack a folder with `moco.pack`; the argument `data_NAME` sets `data.NAME`."""
    data: dict[str, Any] = {
        name.removeprefix("data_"): fields.pop(name) for name in list(fields) if name.startswith("data_")
    }
    shard_mb = fields.pop("shard_mb", 0.012)  # a few images of `class_folders` per shard
    usual: dict[str, Any] = {"name": "folder", "root": str(root), "workers": 0}
    settings = DataConfig(**(usual | data))
    pack(PackConfig(settings, str(output), shard_mb=shard_mb, **fields))
    return output
