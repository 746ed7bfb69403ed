"""Pictures in folders, and the same ones packed."""

from pathlib import Path
from typing import Any

from moco.config import DataConfig
from moco.config.pack import PackConfig
from moco.pack import pack
from tests.data.broken import encoded, noise


def pictures(root: Path, count: int = 12, classes: tuple[str, ...] = ("cat", "dog"), first: int = 0) -> Path:
    """JPEGs of several sizes in class folders, one PNG among them, and one file of the wrong ending."""
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        image = noise(first + i, height=20 + i, width=40)
        kind = "PNG" if i in (3, 4) else "JPEG"
        (folder / f"{first + i:02}.{'png' if i == 3 else 'jpg'}").write_bytes(encoded(image, kind))
    return root


def packed(output: Path, root: Path, **fields: Any) -> Path:
    """`moco.pack` of a folder; `data_NAME` goes to `data.NAME`."""
    data: dict[str, Any] = {
        name.removeprefix("data_"): fields.pop(name) for name in list(fields) if name.startswith("data_")
    }
    shard_mb = fields.pop("shard_mb", 0.012)  # a few pictures of `pictures` in each
    usual: dict[str, Any] = {"name": "folder", "root": str(root), "workers": 0}
    settings = DataConfig(**(usual | data))
    pack(PackConfig(settings, str(output), shard_mb=shard_mb, **fields))
    return output
