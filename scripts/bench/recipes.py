"""The views of the recipes in configs/augment/."""

from pathlib import Path

import yaml

from moco.config import config_dir
from moco.config.train import AugmentConfig
from moco.data.opening import build_views
from moco.data.view import View


def views(name: str) -> list[View]:
    """Return both views of configs/augment/NAME.yaml."""
    values = yaml.safe_load(Path(config_dir(), "augment", f"{name}.yaml").read_text(encoding="utf-8"))
    return build_views(AugmentConfig(**values))
