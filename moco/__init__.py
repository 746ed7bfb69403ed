"""moco: Momentum Contrast, from pretraining to evaluation.

`import moco` is fast: torch is imported with the first use of a name below.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise SystemExit("moco runs on Linux and macOS: on Windows, use the Windows Subsystem for Linux (WSL)")

if TYPE_CHECKING:
    from moco import losses
    from moco.api import LoadedClassifier, LoadedEncoder, load_classifier, load_encoder, pretrain, train_config
    from moco.builder import KeyQueue, MoCo

__version__ = "0.1.0"
_OF_API = ("LoadedClassifier", "LoadedEncoder", "load_classifier", "load_encoder", "pretrain", "train_config")
__all__ = [
    "KeyQueue",
    "LoadedClassifier",
    "LoadedEncoder",
    "MoCo",
    "load_classifier",
    "load_encoder",
    "losses",
    "pretrain",
    "train_config",
]

_MODULES = dict.fromkeys(("KeyQueue", "MoCo"), "moco.builder")
_MODULES |= dict.fromkeys(_OF_API, "moco.api")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "losses":
        return importlib.import_module("moco.losses")
    if name not in _MODULES:
        raise AttributeError(f"module 'moco' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
