"""What every configuration shares: its errors, its checks, and where the YAML files are."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run; its message is one sentence for the user."""


class RunWarning(UserWarning):
    """Something that a run can go on with, but that a person should know; its message is one sentence."""


def config_dir() -> str:
    """The folder of the YAML files: inside an installed wheel, or at the top level of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"moco's configs are neither in {package / 'configs'} nor in {package.parent / 'configs'}")


def require(condition: bool, sentence: str) -> None:
    """Raises `ConfigError(sentence)` unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value of a field that is none of those allowed."""
    require(value in allowed, f"{name}={value!r} must be one of {', '.join(allowed)}")


def at_least(low: float, values: Mapping[str, float]) -> None:
    """Refuses any of the named values below `low`."""
    for name, value in values.items():
        wanted = "must not be negative" if low == 0 else f"must be at least {low:g}"
        require(value >= low, f"{name}={value} {wanted}")


def require_finite(config: Any) -> None:
    """Refuses a NaN or an infinity anywhere in a configuration."""
    for name, each in _numbers(asdict(config)):
        require(math.isfinite(each), f"{name}={each} must be a finite number")


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All floats of a nested configuration with their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float):
                yield f"{prefix}{name}", each
