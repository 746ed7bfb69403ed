"""The plug-ins of docs/howto/extend.md, and a process in which plug-ins of a test leave nothing behind."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from moco import plugins
from moco.data.sources import SOURCES
from moco.data.view import STEPS
from moco.losses.contrast import SWITCHES
from moco.methods import METHODS
from moco.models.backbones import BACKBONES
from moco.runs.metrics import LOGGERS
from tests.docs.pages import REPOSITORY, blocks

REGISTRIES: tuple[plugins.Registry[Any], ...] = (METHODS, BACKBONES, SOURCES, STEPS, SWITCHES, LOGGERS)


def examples() -> dict[str, str]:
    """Return the text of each plug-in of the page by the name of its file, which is its first line."""
    found = [text for _, text in blocks(REPOSITORY / "docs/howto/extend.md", "python")]
    return {name[1]: text for text in found if (name := re.match(r"# (\w+\.py)\n", text))}


def write_examples(folder: Path) -> None:
    for name, text in examples().items():
        (folder / name).write_text(text)


@contextmanager
def temporary_plugins(folder: Path) -> Iterator[None]:
    """Find plug-ins in a folder, and forget them at the end."""
    before, loaded = [dict(each) for each in REGISTRIES], dict(plugins._loaded)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        repository: Any = ConfigStore.instance().repo
        for group, added in (("method", METHODS.added), ("data", SOURCES.added)):
            for name in added:
                repository.get(group, {}).pop(f"{name}.yaml", None)
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            dict.update(registry, entries)
        plugins._loaded.clear()
        plugins._loaded.update(loaded)
        own = [
            name
            for name, module in sys.modules.items()
            if str(getattr(module, "__file__", "")).startswith(f"{folder}/")
        ]
        for name in own:
            del sys.modules[name]
