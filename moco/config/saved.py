"""The configuration of a run as a file of it holds it: checked before anything in it is used."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moco.config.train import TrainConfig

# Fields that other commands than moco.train use, and whose bounds are the same in all versions.
_BOUNDED = ("seed", "data.")


def invalid_field(config: Mapping[str, Any]) -> str:
    """Return "FIELD=VALUE" of the first field of a nested run configuration with another type than in the schema.

    Missing and unknown fields are accepted: other versions have other fields. "" if all types are right.
    """
    return _invalid(config, TrainConfig, "")


def _invalid(values: Any, schema: Any, prefix: str) -> str:
    if not isinstance(values, Mapping):
        return f"{prefix.rstrip('.')}={_short(values)}"
    hints = get_type_hints(schema)
    for each in fields(schema):
        if each.name not in values:
            continue
        kind, value, name = hints[each.name], values[each.name], f"{prefix}{each.name}"
        if is_dataclass(kind):
            if wrong := _invalid(value, kind, f"{name}."):
                return wrong
        elif not _has_type(value, kind) or (name.startswith(_BOUNDED) and not _within_bounds(each, value)):
            return f"{name}={_short(value)}"
    return ""


def _within_bounds(field: Any, value: Any) -> bool:
    bounds = field.metadata.get("bounds")
    return bounds is None or value is None or not bounds.error(field.name, value)


def _has_type(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_has_type(value, each) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_has_type(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
